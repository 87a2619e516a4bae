"""Objectives: what a row is trained on, under which mask.

An objective takes a row's arrays [seq] and random numbers of the row's own. It returns the arrays,
changed or with others added, and the mask that the row is attended with: the arguments of
`lib.kernels.Mask`. Arrays that it adds are [seq ...], of any dtype.

It may ask for more by the names of its parameters: `tokenizer`, `progress` (of the phase, 0 to 1),
`log` (see `data.Evaluation`) and `document`, the row's first one (see `data.Documents.document`).
"""
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lib.bind import parameters
from lib.errors import InputError
from lib.fields import Share

CAUSAL = {"kind": "causal", "window": 0}
BIDIRECTIONAL = {"kind": "bidirectional", "window": 0}
KINDS = {"causal", "prefix", "bidirectional"}


def causal(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """The plain objective: predict each next token of a document."""
    return row, CAUSAL


def one_segment(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """Predict each next token, attending across all documents of a row, whose positions run on."""
    real = joined(row["segments"])
    positions = np.arange(len(real), dtype=np.int32) * real
    return row | {"segments": real, "positions": positions}, CAUSAL


def masked(row: dict, rng: np.random.Generator, tokenizer, share: Share = 0.15):
    """Predict a share of the tokens from both sides; see `hide` (BERT, Devlin et al. 2019)."""
    chosen = choose(row["weights"] > 0, share, rng)
    made = hide(row, chosen, rng, tokenizer)
    return made, BIDIRECTIONAL


def choose(
    possible: np.ndarray,
    share: float,
    rng: np.random.Generator,
    first: np.ndarray | None = None,
) -> np.ndarray:
    """A share of the possible positions, bool [seq], drawn at random.

    possible: bool [seq]. first: of these those that are taken before any other, bool [seq].
    """
    rank = rng.random(len(possible))
    if first is not None:
        rank = rank + ~first
    rank[~possible] = np.inf
    total = int(possible.sum())
    number = round(share * total)
    order = np.argsort(rank)
    chosen = np.zeros(len(possible), bool)
    chosen[order[:number]] = True
    return chosen


def hide(row: dict, chosen: np.ndarray, rng: np.random.Generator, tokenizer) -> dict:
    """The row with tokens hidden as BERT hides them, and weights on these alone.

    Inputs are the row's targets: a position predicts itself. Of 10 that are chosen, 8 become bos,
    which no target is, 1 a piece drawn from all, and 1 stays.
    """
    clean = row["targets"]
    dice = rng.random(len(clean))
    drawn = rng.integers(0, tokenizer.vocab, len(clean))
    put = np.where(dice < 0.9, drawn, clean)
    put = np.where(dice < 0.8, tokenizer.bos, put)
    tokens = np.where(chosen, put, clean)
    changed = {
        "tokens": tokens.astype(np.int32),
        "weights": chosen.astype(np.float32),
    }
    return row | changed


def is_made(found, row: dict) -> bool:
    """Whether what an objective made of a row's arrays is arrays of its length, and a mask."""
    if not isinstance(found, tuple):
        return False
    if [type(part) for part in found] != [dict, dict]:
        return False
    made, mask = found
    if mask.keys() != CAUSAL.keys():
        return False
    if mask["kind"] not in KINDS or not row.keys() <= made.keys():
        return False
    shape = row["tokens"].shape
    for x in made.values():
        if not isinstance(x, np.ndarray) or x.shape[:1] != shape:
            return False
    return True


def in_vocabulary(row: dict, last: int) -> bool:
    """Whether a row's tokens are ids, no target that counts is below 0, and weights are finite.

    last: the largest id. Targets may be larger: they may be labels of a config's own `outputs`.
    """
    weights, ids = row["weights"], row["tokens"]
    counted = row["targets"][weights != 0]
    if ids.dtype.kind not in "iu" or np.any(counted < 0):
        return False
    inside = (ids >= 0) & (ids <= last)
    finite = np.isfinite(weights)
    return bool(inside.all() and finite.all())


def declared(objective: Callable, name: str, default: Any = None) -> Any:
    """What an objective declares of itself, as an attribute of its function."""
    function = getattr(objective, "func", objective)  # of a partial
    return getattr(function, name, default)


def generator_for(objective: Callable, *key: int) -> np.random.Generator | None:
    """Random numbers of one row; None where an objective declares that it draws none."""
    if not declared(objective, "draws", True):
        return None
    return np.random.default_rng(key)


def as_planned(segments: np.ndarray) -> np.ndarray:
    """Segments [seq] as they are."""
    return segments


def joined(segments: np.ndarray) -> np.ndarray:
    """All of a row's segments [seq] as one."""
    return (segments > 0).astype(np.int32)


causal.masks = one_segment.masks = (CAUSAL,)
masked.masks = (BIDIRECTIONAL,)
causal.segments, one_segment.segments = as_planned, joined  # so no process need make the row
causal.draws = one_segment.draws = False  # so no generator is made, which takes longer than they


def objective_of(objective: Callable | dict[str, Callable], source: str) -> Callable:
    """The objective of a source's rows; causal where a dictionary does not name the source."""
    if callable(objective):
        return objective
    return objective.get(source, causal)


def asks(objective: Callable | dict[str, Callable], name: str) -> bool:
    """Whether an objective, or one of a dictionary of them, has a parameter of this name."""
    every = [objective] if callable(objective) else objective.values()
    return any(name in parameters(each) for each in every)


def declared_masks(objectives: Iterable[Callable]) -> tuple[dict, ...]:
    """All masks that objectives give, if each has an attribute `masks` that says so; else ().

    A batch has one mask. Where masks are declared, it follows from the declaration. Elsewhere it
    follows from all rows of the batch, so that each process of a run makes those of the others too.
    """
    found = []
    for objective in objectives:
        masks = declared(objective, "masks")
        if not masks:
            return ()
        found += [mask for mask in masks if mask not in found]
    return tuple(found)


def join_masks(masks: Sequence[dict], name: str) -> dict:
    """The mask that serves rows of all these: theirs or, where they differ in kind, a prefix mask.

    Raises InputError, which names the objective, where they differ in more or a kind is unknown.
    """
    first = masks[0]
    joined = first | {"kind": "prefix"}
    unlike = [mask for mask in masks if mask != first]
    for mask in unlike:
        known = {mask["kind"], first["kind"]} <= KINDS
        if not known or mask | {"kind": "prefix"} != joined:
            raise InputError(
                f"{name} gives rows of one batch the masks {first} and {mask}; allowed are the "
                "kinds causal, prefix and bidirectional, with the same window"
            )
    return joined if unlike else first


def mark_prefix(row: dict, kind: str, name: str) -> dict:
    """The row with a `prefix` [seq] by which a prefix mask attends it as its own kind does."""
    if kind == "prefix" and "prefix" not in row:
        raise InputError(
            f"{name} gives a row a prefix mask; allowed is one with an array prefix [seq] beside it"
        )
    marks = {
        "causal": np.zeros_like(row["segments"]),
        "prefix": row.get("prefix"),
        "bidirectional": row["segments"] > 0,
    }
    return row | {"prefix": marks[kind].astype(np.int32)}


def stack(
    made: dict[int, tuple[dict, dict]],
    own: np.ndarray,
    declared: Sequence[dict],
    name: str,
) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays [rows, seq] of the rows `own`, mask of the batch), from what an objective gave.

    made: {row: (arrays, mask)}, of all rows of the batch unless the objective has `declared` masks.
    Raises InputError, which names the objective, where rows of one batch do not go together: an
    array that one has, all must have. Nobody could fill it in for the others, since a process may
    see none that has it.
    """
    rows = {r: row for r, (row, _) in made.items()}
    masks = {r: mask for r, (_, mask) in made.items()}
    check_declared(masks.values(), declared, name)
    possible = declared or list(masks.values())
    joined = join_masks(possible, name)
    if any(mask != joined for mask in possible):
        for r, mask in masks.items():
            rows[r] = mark_prefix(rows[r], mask["kind"], name)
    check_keys(list(rows.values()), name)
    mine = [rows[r] for r in own]
    arrays = {key: np.stack([row[key] for row in mine]) for key in mine[0]}
    return arrays, joined


def check_declared(masks: Iterable[dict], declared: Sequence[dict], name: str):
    """Raise InputError for a mask that is not among those `declared`, if there are any."""
    for mask in masks:
        if declared and mask not in declared:
            raise InputError(
                f"{name} gives the mask {mask}; allowed are those that it declares, {declared}"
            )


def check_keys(rows: Sequence[dict], name: str):
    """Raise InputError where rows of one batch have unlike arrays."""
    keys = rows[0].keys()
    for row in rows:
        if row.keys() != keys:
            raise InputError(
                f"{name} gives rows of one batch the arrays {', '.join(keys)} and "
                f"{', '.join(row)}; allowed are the same in all"
            )
