"""What `python train.py CONFIG --debug` does: one batch again and again, with NaN checks.

It runs without jit. The model is the first phase's, edits applied, the batch its first, at the
phase's peak rate. The batch must be learnt by heart: the loss has to fall below half of what it
was, or the exit code is 2. An operation that makes a NaN ends it and is named. No run is left
behind. --steps N: how many updates at most.
"""
import itertools

import jax
import numpy as np

from lib.arguments import Arguments
from lib.errors import InputError
from lib.kernels import Mask
from lib.sharding import put
from model import groups
from train import edit_model, first, make_step, parse, prepare


def updates(config, file: str):
    """Metrics of one update after another of a run's first batch."""
    run = prepare(config, file)
    batch, phase, model = run.loader.batch(1), run.config.phases[0], run.plan.models[0]
    arrays, mask = put(batch.arrays, run.mesh), Mask(**batch.mask)
    state = first(run)
    with jax.disable_jit(), jax.debug_nans(True):
        if 0 in run.plan.edits:
            state = edit_model(run, state, 0)
        step = make_step(run.config, model, phase, run.plan.frozen(0))
        lr = {}
        for group in groups(model):
            lr[group] = np.float32(run.plan.lr[group][:phase.steps + 1].max())
        while True:
            state, metrics = step(state, arrays, lr, mask)
            yield metrics


def main(arguments: list[str]) -> list[float]:
    """Command line; returns the losses."""
    parser = Arguments("debug", __doc__)
    parser.add_argument("--steps", type=int, default=50)
    known, rest = parser.parse_known_args(arguments)
    losses = []
    learnt = False
    try:
        for metrics in itertools.islice(updates(*parse(rest)), known.steps):
            losses.append(float(metrics["train/loss"]))
            norm = float(metrics["train/grad_norm"])
            print(f"step {len(losses)}: loss {losses[-1]:.4f}, grad norm {norm:.4f}", flush=True)
            learnt = losses[-1] <= losses[0] / 2
            if learnt:
                break
    except FloatingPointError as error:
        raise InputError(f"debug: step {len(losses) + 1} makes a NaN: {error}") from error
    if not learnt:
        raise InputError(
            f"debug: {len(losses)} steps on one batch leave a loss of {losses[-1:]}, from "
            f"{losses[:1]}; below half of that is expected: look at schedule.peak, the objective "
            "and the loss"
        )
    print(f"one batch is learnt: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return losses
