"""Held-out bits per byte."""
import gzip
import inspect
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lib.cache import Cache
from lib.corpus import open_caches
from lib.disk import digest
from lib.kernels import Mask
from lib.packing import DOCUMENT, LENGTH, QUIET, ROW, START, fill
from lib.sharding import MeshConfig, make_mesh, put, shardings
from lib.sources import SPLITS
from lib.tokenizers import Tokenizer
from model import ModelConfig, apply, losses, reparametrised, table


def evaluators(run, config: ModelConfig, mesh: Mesh) -> tuple[Callable, Callable]:
    """Jitted, causal: losses(params, step, arrays) -> [b t]; scores(params, step, ids) -> logits [b t v].

    The rows of `arrays` are spread over the mesh; each process gets all of the results.
    """
    def held(params, step, arrays):
        used = reparametrised(run.reparam, params, step, arrays)
        return losses(used, arrays, Mask("causal", 0), config)

    def scores(params, step, ids):
        return apply(reparametrised(run.reparam, params, step, dict(tokens=ids)), ids, config)

    def on_mesh(function, place=lambda rows: rows):
        jitted = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))

        def called(params, step, rows):
            with jax.set_mesh(mesh):
                return jitted(params, step, place(rows))
        return called

    return on_mesh(held, partial(put, mesh=mesh)), on_mesh(scores)


def windows(lengths: np.ndarray, seq: int, overlap: int) -> np.ndarray:
    """The plan of evaluation: each position is predicted once, in a document too long for a row with at least
    `overlap` positions before it (the first row aside). Pieces fill rows in order, one segment each.
    """
    plan, row, used, segment = [], 0, 0, 0
    for document, n in enumerate(lengths):
        for start in [0, *range(seq - overlap, n - overlap, seq - overlap)]:
            length = min(seq, n - start)
            if used + length > seq:
                row, used, segment = row + 1, 0, 0
            segment, used = segment + 1, used + length
            plan.append((row, segment, document, start, length, overlap if start else 0))
    return np.array(plan, np.int64).reshape(-1, 6)


class HeldOut(NamedTuple):
    """Documents of a split as batches: (arrays, document of each position, -1 where none counts)."""

    paths: list[str]
    bytes: np.ndarray  # int64 [documents]
    texts: Callable[[], Iterator[bytes]]  # UTF-8 of each document
    batches: Callable[[], Iterator[tuple[dict, np.ndarray]]]


def held_out(cache: Cache, split: str, tokenizer: Tokenizer, seq: int, batch: int, overlap: int,
             most: int | None = None, shards: int | None = None) -> HeldOut:
    """The documents of a split, all or the first (by path hash) that have at most `most` tokens together.

    shards: of the first so many alone, where the cache may still be growing.
    """
    found = []  # (hash, shard, number, positions, bytes)
    for i in range(cache.wait() if shards is None else min(shards, cache.wait(shards))):
        shard = cache.shard(i)
        which = np.flatnonzero(shard.split == SPLITS.index(split))
        paths = [d["path"] for d in shard.documents()] if len(which) else []
        found += [(digest(paths[n]), paths[n], i, n, shard.offsets[n + 1] - shard.offsets[n] + 1,
                   shard.bytes[n]) for n in which.tolist()]
    found.sort()
    if most is not None:
        found = found[:max(1, int(np.searchsorted(np.cumsum([f[4] for f in found]), most, side="right")))]

    def ids(document: int) -> np.ndarray:
        shard, n = cache.shard(found[document][2]), found[document][3]
        return shard.tokens[shard.offsets[n]:shard.offsets[n + 1]]

    def batches():
        plan = windows(np.array([f[4] for f in found], np.int64), seq, overlap)
        quiet = np.array([cache.shard(f[2]).quiet[f[3]] for f in found], np.int64)[plan[:, DOCUMENT]]
        plan[:, QUIET] = np.clip(quiet - plan[:, START], plan[:, QUIET], plan[:, LENGTH])
        for start in range(0, int(plan[-1, ROW]) + 1 if len(plan) else 0, batch):
            arrays = fill(plan, np.arange(start, start + batch), seq, ids, tokenizer)
            whose = np.where(arrays["weights"] > 0, arrays.pop("document"), -1)
            yield arrays | dict(source=np.zeros((batch, seq), np.int32)), whose

    return HeldOut([f[1] for f in found], np.array([f[5] for f in found], np.int64),
                   lambda: (tokenizer.decode(ids(d)).encode("utf-8") for d in range(len(found))), batches)


def per_byte(nats: np.ndarray, size: np.ndarray) -> dict[str, float]:
    """`bpb`, bits per byte of texts that need `nats` [n] and have `size` [n] bytes, and its standard error
    `bpb_se`, that of a ratio of sums.
    """
    n, bits, whole = len(nats), nats / math.log(2), float(size.sum())
    bpb = float(bits.sum()) / whole
    spread = float(np.sum((bits - bpb * size) ** 2))
    return dict(bpb=bpb, bpb_se=math.sqrt(spread * n / (n - 1)) / whole if n > 1 else math.nan)


def bits_per_byte(losses: Callable, held: HeldOut) -> dict[str, float]:
    """`loss` (nats per token) of held-out documents, and what `per_byte` says; losses: arrays -> [b, t]."""
    nats, tokens = np.zeros(len(held.paths)), 0
    for arrays, document in held.batches():
        counted = document >= 0
        np.add.at(nats, document[counted], np.asarray(losses(arrays), np.float64)[counted])
        tokens += int(counted.sum())
    return dict(loss=float(nats.sum()) / tokens) | per_byte(nats, held.bytes)


def measure(losses: Callable, caches: dict, split: str, config, phase,
            tokenizer: Tokenizer, most: int | None = None) -> tuple[dict, dict[str, HeldOut]]:
    """({source: figures of `bits_per_byte`}, {source: documents}) on a split, by rows like a phase's.

    losses: arrays -> nats [b, t]. A streamed source is measured on the first window's documents.
    """
    shards = config.data.window if config.data.stream else None
    held = {name: held_out(cache, split, tokenizer, phase.seq, phase.batch, config.overlap, most, shards)
            for name, cache in caches.items()}
    return {name: bits_per_byte(losses, h) for name, h in held.items() if h.paths}, held


def sharded_apply(scores: Callable, step: int, mesh) -> Callable:
    """`apply` as an `evals` gets it: (params, ids [b t]) -> logits [b t v], rows spread over a mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def apply(params, ids):
        ids = np.asarray(ids, np.int32)
        rows = np.pad(ids, ((0, -len(ids) % parts), (0, 0)))
        return scores(params, step, put(dict(tokens=rows), mesh)["tokens"])[:len(ids)]

    return apply


def own_evals(config, tokenizer: Tokenizer, params, apply: Callable) -> dict[str, float]:
    """What a config's own `evals` measure; they get `tokenizer` and `config` too, where they take these."""
    row, given = {}, dict(tokenizer=tokenizer, config=config)
    for function in config.evals:
        takes = inspect.signature(function).parameters
        row |= function(params, apply, **{name: given[name] for name in given if name in takes})
    return row


def evaluate_during(config, phase: int, caches: dict, tokenizer: Tokenizer, mesh, state, losses: Callable,
                    scores: Callable) -> dict[str, float]:
    """{metric: value} of a run as it stands, on the fixed subset of dev and by its config's own `evals`.

    losses, scores: of `model.evaluators`.
    """
    row, params = {}, state.params
    if config.data.dev:
        found, _ = measure(partial(losses, params, state.step), caches, "dev", config,
                           config.phases[phase], tokenizer, config.eval_tokens)
        row = {f"eval/{name}/{k}": v for name, of in found.items() for k, v in of.items()}
    return row | own_evals(config, tokenizer, params, sharded_apply(scores, state.step, mesh))


def compressed(texts: list[bytes]) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 need for texts, each compressed alone."""
    def xz(text: bytes) -> bytes:
        """With no more of a window than there is text: the same bytes in a tenth of the time."""
        window = max(2**12, min(len(text), 2**26))
        return lzma.compress(text, filters=[dict(id=lzma.FILTER_LZMA2, preset=9, dict_size=window)])

    bits = {"gzip_bpb": lambda t: 8 * len(gzip.compress(t, 9)), "xz_bpb": lambda t: 8 * len(xz(t))}
    return {name: sum(map(size, texts)) / sum(map(len, texts)) for name, size in bits.items()}


def mesh_here(config):
    """The run's mesh where that fits the devices here, else all of them for rows."""
    try:
        mesh = make_mesh(config.mesh)
        shardings(table(config.model), mesh)
    except ValueError:
        return make_mesh(MeshConfig())
    return mesh


def test_split(config, tokenizer: Tokenizer, losses: Callable, mesh) -> dict:
    """What is known of the test split, printed too; losses: arrays -> [b t]."""
    parts, phase = mesh.shape["data"] * mesh.shape["fsdp"], config.phases[-1]
    phase = replace(phase, batch=-(-phase.batch // parts) * parts)
    caches = open_caches(config, tokenizer)
    found, held = measure(losses, caches, "test", config, phase, tokenizer)
    result = {f"eval/{name}.test/{k}": v for name, of in found.items() for k, v in of.items()}
    texts = [t for h in held.values() for t in h.texts()]
    result |= compressed(texts) | {"held_out_paths": [p for h in held.values() for p in h.paths]}
    for name, h in held.items():
        bpb, error = (result[f"eval/{name}.test/{k}"] for k in ("bpb", "bpb_se"))
        print(f"held-out {name}: {bpb:.3f} +- {error:.3f} bits per byte "
              f"({len(h.paths)} documents, {h.bytes.sum():,} bytes)")
    print("the same documents, each compressed alone: "
          f"gzip -9 {result['gzip_bpb']:.3f}, xz -9 {result['xz_bpb']:.3f}")
    return result
