"""Held-out bits per byte of a checkpoint, beside gzip and xz, and minimal pairs; writes RUN/eval.json.

The evaluations during a run use `measure` from here as well.
"""
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import model
import train


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


def held_out(cache: data.Cache, split: str, tokenizer: data.Tokenizer, seq: int, batch: int, overlap: int,
             most: int | None = None, shards: int | None = None) -> HeldOut:
    """The documents of a split, all or the first (by path hash) that have at most `most` tokens together.

    shards: of the first so many alone, where the cache may still be growing.
    """
    found = []  # (hash, shard, number, positions, bytes)
    for i in range(cache.wait() if shards is None else min(shards, cache.wait(shards))):
        shard = cache.shard(i)
        which = np.flatnonzero(shard.split == data.SPLITS.index(split))
        paths = [d["path"] for d in shard.documents()] if len(which) else []
        found += [(data.digest(paths[n]), paths[n], i, n, shard.offsets[n + 1] - shard.offsets[n] + 1,
                   shard.bytes[n]) for n in which.tolist()]
    found.sort()
    if most is not None:
        found = found[:max(1, int(np.searchsorted(np.cumsum([f[4] for f in found]), most, side="right")))]

    def ids(document: int) -> np.ndarray:
        shard, n = cache.shard(found[document][2]), found[document][3]
        return shard.tokens[shard.offsets[n]:shard.offsets[n + 1]]

    def batches():
        plan = windows(np.array([f[4] for f in found], np.int64), seq, overlap)
        quiet = np.array([cache.shard(f[2]).quiet[f[3]] for f in found], np.int64)[plan[:, data.DOCUMENT]]
        plan[:, data.QUIET] = np.clip(quiet - plan[:, data.START], plan[:, data.QUIET], plan[:, data.LENGTH])
        for start in range(0, int(plan[-1, data.ROW]) + 1 if len(plan) else 0, batch):
            arrays = data.fill(plan, np.arange(start, start + batch), seq, ids, tokenizer)
            whose = np.where(arrays["weights"] > 0, arrays.pop("document"), -1)
            yield arrays | dict(source=np.zeros((batch, seq), np.int32)), whose

    return HeldOut([f[1] for f in found], np.array([f[5] for f in found], np.int64),
                   lambda: (tokenizer.decode(ids(d)).encode("utf-8") for d in range(len(found))), batches)


def bits_per_byte(losses: Callable, held: HeldOut) -> dict[str, float]:
    """`loss` (nats per token) and `bpb` of held-out documents with the latter's standard error `bpb_se`.

    losses: arrays -> [b, t]. The standard error is that of a ratio of sums over documents.
    """
    nats, tokens = np.zeros(len(held.paths)), 0
    for arrays, document in held.batches():
        counted = document >= 0
        np.add.at(nats, document[counted], np.asarray(losses(arrays), np.float64)[counted])
        tokens += int(counted.sum())
    n, size, bits = len(nats), float(held.bytes.sum()), nats / math.log(2)
    bpb = float(bits.sum()) / size
    spread = float(np.sum((bits - bpb * held.bytes) ** 2))
    return dict(loss=float(nats.sum()) / tokens, bpb=bpb,
                bpb_se=math.sqrt(spread * n / (n - 1)) / size if n > 1 else math.nan)


def measure(losses: Callable, caches: dict, split: str, config: train.Config, phase: train.Phase,
            tokenizer: data.Tokenizer, most: int | None = None) -> tuple[dict, dict[str, HeldOut]]:
    """({source: figures of `bits_per_byte`}, {source: documents}) on a split, by rows like a phase's.

    losses: arrays -> nats [b, t]. A streamed source is measured on the first window's documents.
    """
    shards = config.data.window if config.data.stream else None
    held = {name: held_out(cache, split, tokenizer, phase.seq, phase.batch, config.overlap, most, shards)
            for name, cache in caches.items()}
    return {name: bits_per_byte(losses, h) for name, h in held.items() if h.paths}, held


def during(run: train.Run, step: int, losses: Callable, scores: Callable) -> dict[str, float]:
    """{metric: value} of a run as it stands, on the fixed subset of dev and by its config's own `evals`.

    losses, scores: of `model.evaluators`.
    """
    config, params, row = run.config, run.state.params, {}
    if config.data.dev:
        found, _ = measure(partial(losses, params, run.state.step), run.caches, "dev", config,
                           config.phases[run.loader.phase_of(step)], run.tokenizer, config.eval_tokens)
        row = {f"eval/{name}/{k}": v for name, own in found.items() for k, v in own.items()}
    for own in config.evals:
        row |= own(params, lambda params, ids: scores(params, run.state.step, ids))
    return row


def compressed(texts: list[bytes]) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 need for texts, each compressed alone."""
    bits = {"gzip_bpb": lambda t: 8 * len(gzip.compress(t, 9)),
            "xz_bpb": lambda t: 8 * len(lzma.compress(t, preset=9))}
    return {name: sum(map(size, texts)) / sum(map(len, texts)) for name, size in bits.items()}


def minimal_pairs(folder: Path, losses, params, tokenizer) -> dict[str, float]:
    """Share of BLiMP pairs whose good sentence is the likelier, by paradigm, with its standard error."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise data.InputError(f"--blimp {str(folder)!r} holds no .jsonl file of minimal pairs")
    out = {}
    for file in files:
        pairs = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
        texts = [p[k] for p in pairs for k in ("sentence_good", "sentence_bad")]
        ids = [np.array(tokenizer.encode(t), np.int32) for t in texts]
        plan = np.array([(i, 1, i, 0, len(x) + 1, 0) for i, x in enumerate(ids)])  # a row each
        seq = 1 << max(map(len, ids)).bit_length()
        total = []
        for start in range(0, len(ids), 64):
            arrays = data.fill(plan, np.arange(start, start + 64), seq, ids.__getitem__, tokenizer)
            del arrays["document"]
            total.append((np.asarray(losses(params, 0, arrays)) * arrays["weights"]).sum(1))
        nats = np.concatenate(total)[:len(ids)].reshape(-1, 2)
        right = float(np.mean(nats[:, 0] < nats[:, 1]))
        error = math.sqrt(right * (1 - right) / len(nats))
        out |= {f"blimp/{file.stem}": right, f"blimp/{file.stem}_se": error}
    scores = [v for k, v in out.items() if not k.endswith("_se")]
    return out | {"blimp": sum(scores) / len(scores)}


def main(arguments: list[str]) -> dict:
    """Command line; gives what eval.json holds."""
    parser = train.Arguments("eval", __doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--blimp", type=Path, help="directory of BLiMP paradigms, a .jsonl file each")
    parser.add_argument("--step", type=int, help="checkpoint; the newest by default")
    a = parser.parse_args(arguments)
    params, config, tokenizer, _ = train.load(a.run, a.step)
    phase, mesh = config.phases[-1], params["embed"].sharding.mesh
    losses, _ = model.evaluators(config, config.model, mesh)
    result = {}
    if config.data.test:
        caches = train.open_caches(config, tokenizer)
        found, held = measure(partial(losses, params, 0), caches, "test", config, phase, tokenizer)
        result = {f"eval/{name}.test/{k}": v for name, own in found.items() for k, v in own.items()}
        texts = [t for h in held.values() for t in h.texts()]
        result |= compressed(texts) | {"held_out_paths": [p for h in held.values() for p in h.paths]}
        for name, h in held.items():
            bpb, error = (result[f"eval/{name}.test/{k}"] for k in ("bpb", "bpb_se"))
            print(f"held-out {name}: {bpb:.3f} +- {error:.3f} bits per byte "
                  f"({len(h.paths)} documents, {h.bytes.sum():,} bytes)")
        print("the same documents, each compressed alone: "
              f"gzip -9 {result['gzip_bpb']:.3f}, xz -9 {result['xz_bpb']:.3f}")
    if a.blimp:
        result |= minimal_pairs(a.blimp, losses, params, tokenizer)
        shown = {k: v for k, v in result.items() if k.startswith("blimp") and not k.endswith("_se")}
        print("".join(f"{k}: {v:.3f}\n" for k, v in shown.items()))
    if train.leads():
        data.write(Path(a.run) / "eval.json", json.dumps(result, indent=1))
    return result
