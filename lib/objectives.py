"""Objectives: what a row is trained on, under which mask.

An objective takes a row's arrays [seq] and random numbers of the row's own. It returns the arrays,
changed or with others added, and the mask that the row is attended with: the arguments of
`lib.kernels.Mask`.
"""
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lib.errors import InputError

CAUSAL = {"kind": "causal", "window": 0}
KINDS = {"causal", "prefix", "bidirectional"}


def causal(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """The plain objective: predict each next token of a document."""
    return row, CAUSAL


def one_segment(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """Predict each next token, attending across all documents of a row, whose positions run on."""
    real = (row["segments"] > 0).astype(np.int32)
    positions = np.arange(len(real), dtype=np.int32) * real
    return row | {"segments": real, "positions": positions}, CAUSAL


causal.masks = one_segment.masks = (CAUSAL,)


def declared_masks(objective: Callable) -> tuple[dict, ...]:
    """All masks that an objective gives, if it has an attribute `masks` that says so; else ().

    A batch has one mask. Where masks are declared, it follows from the declaration. Elsewhere it
    follows from all rows of the batch, so that each process of a run makes those of the others too.
    """
    function = getattr(objective, "func", objective)  # of a partial
    return getattr(function, "masks", ())


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
    Raises InputError, which names the objective, where rows of one batch do not go together.
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
