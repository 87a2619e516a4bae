"""The loss that a phase trains on, of dev rows that are made as the phase makes its own."""
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data import Loader, Rows, shuffled
from lib.evaluate import Setting, open_source
from lib.kernels import Mask
from lib.objectives import causal, declared_masks, generator_for, objective_of, stack
from lib.sharding import put
from model import cross_entropy, weighted_mean


def is_plain(loss, phase, sources) -> bool:
    """Whether what a phase trains on is what bits per byte say too: the nats of each next token.

    loss: its `train.Loss`. sources: their names.
    """
    objectives = [objective_of(phase.objective, name) for name in sources]
    causal_alone = all(objective == causal for objective in objectives)
    return causal_alone and loss.token_loss == cross_entropy and loss.reduce == weighted_mean


@lru_cache(maxsize=8)
def summing(loss, mesh: Mesh) -> Callable:
    """A `train.Loss` as a compiled function, sums(params, step, arrays, mask).

    It gives (numerator, (denominator, metrics)) to each process. Rows are spread over the mesh.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=everywhere, static_argnames="mask")
    def jitted(params, step, arrays, mask):
        return loss.sums(params, {}, arrays, step, mask)

    def sums(params, step, arrays, mask):
        with jax.set_mesh(mesh):
            return jitted(params, step, put(arrays, mesh), mask=mask)

    return sums


def dev_rows(setting: Setting, loader: Loader, source: int) -> Rows:
    """The rows that the phase's packing makes of a source's dev documents; there may be none."""
    config = setting.config
    phase = setting.phase
    sources = config.data.sources.values()
    return Rows(
        setting.cache(loader.names[source], "dev"),
        phase.seq,
        phase.packing,
        shuffled,
        config.data.window,
        setting.tokenizer,
        (config.seed, source),
        split="dev",
        marks=any(each.marks for each in sources),
    )


def batches(
    setting: Setting, loader: Loader, source: int, taken: int
) -> Iterator[tuple[dict[str, np.ndarray], Mask]]:
    """The dev batches of a source as they are trained on after `taken` steps: (arrays, mask).

    There are as many whole batches as `eval_tokens` allow; a source that has less than one repeats
    its rows. With `accumulate` a batch is a part of the step's.
    """
    phase = setting.phase
    rows = dev_rows(setting, loader, source)
    there = rows_there(rows, setting)
    if not there:
        return
    size = phase.batch // phase.accumulate
    number = max(1, there // size)
    every = np.arange(size)
    trained = loader.draws[loader.within(taken)[0]].trained
    names = dict.fromkeys([*trained, loader.names[source]])
    masks = declared_masks(objective_of(phase.objective, name) for name in names)
    make = row_maker(setting, loader, source, rows, taken)
    for first in range(0, number * size, size):
        made = {r: make((first + r) % there) for r in every.tolist()}
        arrays, mask = stack(made, every, masks, "the objective of a phase")
        yield arrays, Mask(**mask)


def rows_there(rows: Rows, setting: Setting) -> int:
    """How many rows there are within `eval_tokens`; of a streamed source, of its first windows."""
    most = max(1, setting.config.eval_tokens // setting.phase.seq)
    if setting.config.data.stream:
        return min(most, rows.ends[-1])
    return min(most, rows.epoch)


def row_maker(
    setting: Setting, loader: Loader, source: int, rows: Rows, taken: int
) -> Callable[[int], tuple[dict, dict]]:
    """number of a dev row -> (arrays [seq], mask), as the objective makes it after `taken` steps.

    Its random numbers depend on the config's seed, the source and the row's number alone.
    """
    seed = setting.config.seed
    phase, step = loader.within(taken)
    step = max(0, step - 1)  # of the phase, from 0: the last that was taken
    log = loader.draws[phase].decisions(step)
    progress = step / setting.phase.steps
    objective = objective_of(setting.phase.objective, loader.names[source])

    def make(number: int):
        row = rows.get(number)
        row.arrays["source"] = np.full_like(row.arrays["tokens"], source)
        rng = generator_for(objective, seed, source, number)
        return loader.made(objective, row, rng, progress, log)

    return make


def own_losses(
    sums: Callable,
    params,
    step,
    taken: int,
    setting: Setting,
    loader: Loader,
) -> dict[str, float]:
    """`eval/SOURCE/own`, the loss of the phase on dev rows, and `eval/SOURCE/METRIC` of `reduce`.

    A source without dev documents is left out. sums: of `summing`. step: of the state. taken: how
    many steps that is.
    """
    found = {}
    for source, name in enumerate(loader.names):
        if not open_source(setting, name, "dev", 1).places:
            continue
        totals = []
        for arrays, mask in batches(setting, loader, source, taken):
            total = sums(params, step, arrays, mask)
            totals.append(jax.device_get(total))
        if not totals:
            continue
        for figure, value in joined(totals).items():
            found[f"eval/{name}/{figure}"] = value
    return found


def joined(totals: list) -> dict[str, float]:
    """`own` and the metrics of several batches, each (numerator, (denominator, metrics)).

    The loss is the sum of the numerators over that of the denominators; a metric is a mean.
    """
    numerator = denominator = 0.0
    metrics = {}
    for total, (count, given) in totals:
        numerator += float(total)
        denominator += float(count)
        for metric, value in given.items():
            metrics.setdefault(metric, []).append(float(value))
    found = {"own": numerator / max(denominator, 1e-9)}
    for metric, values in metrics.items():
        found[metric] = sum(values) / len(values)
    return found
