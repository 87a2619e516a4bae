"""What a config's own `evals` measure, and what they are told."""
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jax.sharding import Mesh

from lib.bind import bind
from lib.continuations import continue_prompts
from lib.errors import InputError
from lib.evaluate import HeldOut, Setting, open_source
from lib.generate import sampling
from lib.kernels import Mask
from lib.seams import EVALS, is_number, require_gave
from lib.sharding import ROWS, parts, put
from lib.sources import SPLITS
from model import CAUSAL


def sharded_apply(scores: Callable, step: int, mesh: Mesh) -> Callable:
    """`apply` as an `evals` gets it: (params, ids [b t] or batch [, mask]) -> logits [b t v].

    batch: a dictionary of arrays [b t ...], see `model.whole`. The rows are spread over the mesh,
    filled up with rows of zeros where it does not divide them. scores: of `evaluators`.
    """

    def apply(params, batch, mask: Mask = CAUSAL):
        if not isinstance(batch, dict):
            batch = {"tokens": np.asarray(batch, np.int32)}
        arrays = {name: np.asarray(x) for name, x in batch.items()}
        n = len(next(iter(arrays.values())))
        missing = -n % parts(mesh, ROWS)
        filled = {name: with_rows(x, missing) for name, x in arrays.items()}
        placed = put(filled, mesh, n + missing)
        return scores(params, step, placed, mask)[:n]

    return apply


def with_rows(x: np.ndarray, missing: int) -> np.ndarray:
    """An array [b ...] with so many rows of zeros after its own."""
    rest = [(0, 0)] * (x.ndim - 1)
    return np.pad(x, [(0, missing), *rest])


def generate(
    params,
    step: int,
    setting: Setting,
    prompts: Sequence[str | Sequence[int]],
    tokens: int | None = None,
    temperature: float = 0.0,
    stops: Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """The text that the model makes after each of `prompts`, all of them as one batch.

    prompts: texts, which bos is put in front of, or ids as they are. tokens: of a text at most; the
    config's `sample_tokens` by default. temperature: 0 takes the likeliest token. stops: texts
    before which one ends. seed: of the first row's draws; each further row has one more.
    """
    config, tokenizer = setting.config, setting.tokenizer
    if tokens is None:
        tokens = config.sample_tokens
    if not len(prompts):
        return []
    how = sampling(temperature)
    found = continue_prompts(params, config, tokenizer, step, prompts, how, tokens, seed, stops)
    return [one.text for one in found]


def held_out(
    setting: Setting, source: str, split: str = "dev", most: int | None = None
) -> HeldOut:
    """The documents of a split of a source, in the rows and batches of the present phase.

    `batches()` of it gives pairs of a batch's arrays and the document of each position [b t], -1
    where it is not counted; `texts()` gives the documents in UTF-8, and `paths` their paths. most:
    only the first documents by the hash of their path that have at most so many tokens together.
    """
    names = setting.caches if split == "train" else setting.caches | setting.held_out
    for name, found, allowed in (
        ("source", source, names),
        ("split", split, SPLITS),
    ):
        if found not in allowed:
            raise InputError(
                f"held_out of an evals: {name} is {found!r}; allowed are {', '.join(allowed)}"
            )
    return open_source(setting, source, split, most)


def own_evals(scores: Callable, params, step: int, setting: Setting) -> dict[str, float]:
    """What a config's own `evals` measure.

    Each is called with params and `apply`, and with what else it asks for by name: `tokenizer`,
    `config`, `generate` and `held_out`, see above.
    """
    apply = sharded_apply(scores, step, setting.mesh)
    given = {
        "tokenizer": setting.tokenizer,
        "config": setting.config,
        "generate": partial(generate, params, step, setting),
        "held_out": partial(held_out, setting),
    }
    found = {}
    for function in setting.config.evals:
        own = bind(function, **given)(params, apply)
        fine = isinstance(own, dict) and all(isinstance(name, str) for name in own)
        require_gave(fine and all(map(is_number, own.values())), EVALS, function, own)
        found |= own
    return found
