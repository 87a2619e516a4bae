"""How well a model predicts held-out text: bits per byte, beside what gzip and xz need."""
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import model
from lib.cache import Cache
from lib.continuations import predicts_text
from lib.disk import digest, finite, write
from lib.packing import DOCUMENT, LENGTH, QUIET, ROW, START, fill
from lib.processes import is_main_process
from lib.sharding import put
from lib.sources import SPLITS
from lib.tokenizers import Tokenizer
from model import CAUSAL, ModelConfig, reparametrised, whole

HALF_95 = 1.96  # standard errors that make half of a 95 % interval


def evaluators(
    reparam: Callable | None, config: ModelConfig, mesh: Mesh
) -> tuple[Callable, Callable]:
    """Two compiled functions of a model, `losses` and `scores`.

    losses(params, step, arrays) returns the nats [b t] of a batch's targets under a causal mask,
    float32 or wider. Its rows are spread over the mesh. scores(params, step, ids or batch [, mask])
    returns logits [b t v], see `model.apply`. Each process gets all of both results. reparam: a
    config's own, or None.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=everywhere)
    def jitted_losses(params, step, arrays):
        used = reparametrised(reparam, params, step, arrays, config)
        return model.losses(used, arrays, CAUSAL, config)

    @partial(jax.jit, out_shardings=everywhere, static_argnames="mask")
    def jitted_scores(params, step, batch, mask):
        batch = whole(batch)
        used = reparametrised(reparam, params, step, batch, config)
        return model.apply(used, batch, config, mask)

    def losses(params, step, arrays):
        with jax.set_mesh(mesh):
            return jitted_losses(params, step, put(arrays, mesh))

    def scores(params, step, batch, mask=CAUSAL):
        with jax.set_mesh(mesh):
            return jitted_scores(params, step, batch, mask=mask)

    return losses, scores


def windows(lengths: np.ndarray, seq: int, overlap: int) -> np.ndarray:
    """The plan by which held-out documents of `lengths` [n] positions are read, in rows of `seq`.

    Each position is predicted once. A document that is too long for a row is read in several
    windows; each but the first repeats the last `overlap` positions of the one before, without
    loss, as context. Windows fill the rows in order, and each is a segment of its own.
    """
    plan = []
    row = used = segment = 0
    stride = seq - overlap
    for document, length in enumerate(lengths):
        later = range(stride, length - overlap, stride)
        for start in [0, *later]:
            size = min(seq, length - start)
            if used + size > seq:
                row += 1
                used = segment = 0
            segment += 1
            used += size
            quiet = overlap if start else 0
            plan.append((row, segment, document, start, size, quiet))
    return np.array(plan, np.int64).reshape(-1, 6)


class Place(NamedTuple):
    """Where a held-out document lies in a cache."""

    order: str  # hash of its path: documents are taken in this order
    path: str
    shard: int
    number: int  # within the shard
    positions: int  # its tokens, and its end
    bytes: int  # of its text in UTF-8


@dataclass(frozen=True)
class HeldOut:
    """Documents of one split of a source, read in batches of `batch` rows of `seq` positions."""

    cache: Cache
    places: list[Place]
    tokenizer: Tokenizer
    seq: int
    batch: int
    overlap: int  # see `windows`

    @property
    def paths(self) -> list[str]:
        """The path of each document."""
        return [place.path for place in self.places]

    @property
    def bytes(self) -> np.ndarray:
        """The size of each document's text in bytes, int64 [documents]."""
        return np.array([place.bytes for place in self.places], np.int64)

    def ids(self, document: int) -> np.ndarray:
        """The token ids of a document."""
        place = self.places[document]
        shard = self.cache.shard(place.shard)
        begin, end = shard.offsets[place.number:place.number + 2]
        return shard.tokens[begin:end]

    def texts(self) -> Iterator[bytes]:
        """The text of each document, in UTF-8."""
        for document in range(len(self.places)):
            yield self.tokenizer.decode(self.ids(document)).encode("utf-8")

    def plan(self) -> np.ndarray:
        """The plan of `windows` for these documents, with no loss on the tokens of a prefix."""
        lengths = np.array([place.positions for place in self.places], np.int64)
        prefixes = [self.cache.shard(p.shard).quiet[p.number] for p in self.places]
        plan = windows(lengths, self.seq, self.overlap)
        prefix = np.array(prefixes, np.int64)[plan[:, DOCUMENT]] - plan[:, START]
        plan[:, QUIET] = np.clip(prefix, plan[:, QUIET], plan[:, LENGTH])
        return plan

    def batches(self) -> Iterator[tuple[dict, np.ndarray]]:
        """Pairs of a batch's arrays and the document of each position [b t].

        The document is -1 where a position is not counted.
        """
        plan = self.plan()
        if not len(plan):
            return
        source = np.zeros((self.batch, self.seq), np.int32)
        for start in range(0, int(plan[-1, ROW]) + 1, self.batch):
            rows = np.arange(start, start + self.batch)
            arrays = fill(plan, rows, self.seq, self.ids, self.tokenizer)
            document = arrays.pop("document")
            counted = arrays["weights"] > 0
            yield arrays | {"source": source}, np.where(counted, document, -1)


def places_in(cache: Cache, number: int, split: str) -> list[Place]:
    """The documents of a split in one shard."""
    shard = cache.shard(number)
    which = np.flatnonzero(shard.split == SPLITS.index(split)).tolist()
    if not which:
        return []
    documents = shard.documents()
    positions = np.diff(shard.offsets) + 1
    found = []
    for i in which:
        path = documents[i]["path"]
        found.append(Place(digest(path), path, number, i, positions[i], shard.bytes[i]))
    return found


def held_out(
    cache: Cache,
    split: str,
    tokenizer: Tokenizer,
    seq: int,
    batch: int,
    overlap: int,
    most: int | None = None,
    shards: int | None = None,
) -> HeldOut:
    """The documents of a split of a source.

    most: only the first documents, by the hash of their path, that have at most so many tokens
    together; at least one. shards: only those of the first so many shards, for a cache that may
    still grow.
    """
    if shards is None:
        shards = cache.wait()
    else:
        shards = min(shards, cache.wait(shards))
    places = []
    for number in range(shards):
        places += places_in(cache, number, split)
    places.sort()
    if most is not None:
        total = np.cumsum([place.positions for place in places])
        fit = int(np.searchsorted(total, most, side="right"))
        places = places[:max(1, fit)]
    return HeldOut(cache, places, tokenizer, seq, batch, overlap)


def per_byte(nats: np.ndarray, size: np.ndarray) -> dict[str, float]:
    """`bpb` and `bpb_se`: bits per byte of texts, and its standard error, that of a ratio of sums.

    nats: what each text needs [n]. size: its bytes [n]. The error of one text is NaN.
    """
    n = len(nats)
    bits = nats / math.log(2)
    total = float(size.sum())
    bpb = float(bits.sum()) / total
    squares = float(np.sum((bits - bpb * size) ** 2))
    error = math.sqrt(squares * n / (n - 1)) / total if n > 1 else math.nan
    return {"bpb": bpb, "bpb_se": error}


def bits_per_byte(losses: Callable, held: HeldOut) -> dict[str, float]:
    """`loss` in nats per token of held-out documents, and the figures of `per_byte`.

    losses: a batch's arrays -> nats [b t].
    """
    nats = np.zeros(len(held.places))
    tokens = 0
    for arrays, document in held.batches():
        counted = document >= 0
        each = np.asarray(losses(arrays), np.float64)
        np.add.at(nats, document[counted], each[counted])
        tokens += int(counted.sum())
    return {"loss": float(nats.sum()) / tokens} | per_byte(nats, held.bytes)


class Setting(NamedTuple):
    """What an evaluation reads, beside the state that it is of."""

    config: Any  # the `train.Config`, with the present shape as its `model`
    phase: Any  # the `train.Phase` in whose rows and batches held-out text is read
    caches: dict[str, Cache]  # by source
    tokenizer: Tokenizer
    mesh: Mesh


def open_source(setting: Setting, source: str, split: str, most: int | None = None) -> HeldOut:
    """The documents of a split of a source, in rows and batches like those of the phase.

    Of a streamed source the documents of the first window alone.
    """
    data, phase = setting.config.data, setting.phase
    shards = data.window if data.stream else None
    rows = setting.tokenizer, phase.seq, phase.batch, setting.config.overlap
    return held_out(setting.caches[source], split, *rows, most, shards)


def open_split(setting: Setting, split: str, most: int | None = None) -> dict[str, HeldOut]:
    """The documents of a split by source; see `open_source`."""
    return {name: open_source(setting, name, split, most) for name in setting.caches}


def measure(losses: Callable, held: dict[str, HeldOut], name: str) -> dict[str, float]:
    """`eval/SOURCE/FIGURE` for each source with documents, by a `name` such as "eval/{}.test"."""
    found = {}
    for source, documents in held.items():
        if not documents.places:
            continue
        for figure, value in bits_per_byte(losses, documents).items():
            found[f"{name.format(source)}/{figure}"] = value
    return found


def dev_figures(losses: Callable, params, step: int, setting: Setting) -> dict[str, float]:
    """The figures of a part of dev, `eval/SOURCE/FIGURE`; none of a model that predicts no pieces.

    losses: of `evaluators`.
    """
    config = setting.config
    if not predicts_text(config):
        return {}
    held = open_split(setting, "dev", config.eval_tokens)
    return measure(partial(losses, params, step), held, "eval/{}")


def xz_size(text: bytes) -> int:
    """The bytes that `xz -9` makes of a text.

    The window is no longer than the text, which gives the same bytes in a tenth of the time.
    """
    window = max(2**12, min(len(text), 2**26))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
    return len(lzma.compress(text, filters=filters))


def gzip_size(text: bytes) -> int:
    """The bytes that `gzip -9` makes of a text."""
    return len(gzip.compress(text, 9))


def compressed(texts: list[bytes]) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 need for texts.

    `gzip_bpb` and `xz_bpb`: each text is compressed alone, so that a compressor starts empty on
    each. `gzip_together_bpb` and `xz_together_bpb`: all of them as one, end to end.
    """
    total = sum(map(len, texts))
    together = b"".join(texts)
    return {
        "gzip_bpb": 8 * sum(map(gzip_size, texts)) / total,
        "xz_bpb": 8 * sum(map(xz_size, texts)) / total,
        "gzip_together_bpb": 8 * gzip_size(together) / total,
        "xz_together_bpb": 8 * xz_size(together) / total,
    }


def has_test(config) -> bool:
    """Whether a `train.Config` holds documents out for the test split."""
    sources = config.data.sources.values()
    return config.data.test > 0 or any(source.split == "test" for source in sources)


def test_figures(
    losses: Callable, caches: dict[str, Cache], config, tokenizer: Tokenizer, mesh: Mesh
) -> dict:
    """What a run is reported by: figures of the whole test split, printed too; empty without one.

    `eval/SOURCE.test/FIGURE`, the figures of `compressed`, and `held_out_paths`, the documents. The
    config's own `evals` are not run. losses: a batch's arrays -> nats [b t]; it is not asked where
    the model predicts no pieces.
    """
    if not has_test(config):
        return {}
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    phase = config.phases[-1]
    batches = math.ceil(phase.batch / parts)
    phase = replace(phase, batch=batches * parts)
    held = open_split(Setting(config, phase, caches, tokenizer, mesh), "test")
    found = {}
    if predicts_text(config):
        found = measure(losses, held, "eval/{}.test")
    texts = []
    paths = []
    for documents in held.values():
        texts += documents.texts()
        paths += documents.paths
    if not texts:  # all sources are for training alone
        return {}
    found |= compressed(texts)
    show_test(found, held)
    return found | {"held_out_paths": paths}


def show_test(found: dict[str, float], held: dict[str, HeldOut]):
    """Print the figures of the test split, a line for each source and two for the compressors."""
    for source, documents in held.items():
        if f"eval/{source}.test/bpb" not in found:
            continue
        bpb = found[f"eval/{source}.test/bpb"]
        half = HALF_95 * found[f"eval/{source}.test/bpb_se"]
        count, size = len(documents.places), documents.bytes.sum()
        print(
            f"held-out {source}: {bpb:.3f} ± {half:.3f} bits per byte "
            f"({count} documents, {size:,} bytes; ± is half a 95 % interval)"
        )
    for how, key in (("each compressed alone", "bpb"), ("compressed together", "together_bpb")):
        gzip_bpb, xz_bpb = found[f"gzip_{key}"], found[f"xz_{key}"]
        print(f"the same documents, {how}: gzip -9 {gzip_bpb:.3f}, xz -9 {xz_bpb:.3f}")


def write_figures(directory: Path, figures: dict):
    """Write a run's eval.json; what is not finite becomes null. Only the main process writes."""
    if is_main_process():
        write(directory / "eval.json", json.dumps(finite(figures), indent=1))
