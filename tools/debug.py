"""What `python train.py CONFIG --debug` does: the first batch over and over, without jit, with NaN checks.

The first phase's model, edits applied, at its peak rate.

It must be learnt by heart: the loss has to fall below half of what it was, or the exit code is 2. An
operation that makes a NaN stops it and is named. Leaves no run. --steps N: how many updates at most.
"""
import jax
import numpy as np

from lib.arguments import Arguments
from lib.errors import InputError
from lib.kernels import Mask
from lib.sharding import put
from model import groups
from train import edit_model, first, make_step, parse, prepare


def main(arguments: list[str]) -> list[float]:
    """Command line; gives the losses."""
    parser = Arguments("debug", __doc__)
    parser.add_argument("--steps", type=int, default=50)
    known, rest = parser.parse_known_args(arguments)
    config, file = parse(rest)
    run = prepare(config, file)
    batch, phase = run.loader.batch(1), run.config.phases[0]
    arrays, mask = put(batch.arrays, run.mesh), Mask(**batch.mask)
    losses = []
    state, model = first(run), run.plan.models[0]
    with jax.disable_jit(), jax.debug_nans(True):
        if 0 in run.plan.edits:
            state = edit_model(run, state, 0)
        step = make_step(run.config, model, phase.accumulate, run.plan.frozen(0))
        lr = {g: np.float32(run.plan.lr[g][:phase.steps + 1].max()) for g in groups(model)}
        try:
            while len(losses) < known.steps and (not losses or losses[-1] > losses[0] / 2):
                state, metrics = step(state, arrays, lr, mask)
                losses.append(float(metrics["train/loss"]))
                print(f"step {len(losses)}: loss {losses[-1]:.4f}, "
                      f"grad norm {float(metrics['train/grad_norm']):.4f}", flush=True)
        except FloatingPointError as error:
            raise InputError(f"debug: step {len(losses) + 1} makes a NaN: {error}") from error
    if not losses or losses[-1] > losses[0] / 2:
        raise InputError(f"debug: {len(losses)} steps on one batch leave a loss of {losses[-1:]}, from "
                              f"{losses[:1]}; below half of that is expected: look at schedule.peak, the "
                              "objective and the loss")
    print(f"one batch is learnt: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return losses
