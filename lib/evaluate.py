"""How well a model predicts held-out text: bits per byte, beside what gzip and xz need."""
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
from lib.sources import READ_AS
from lib.tables import HALF_95, columns
from lib.tokenizers import Tokenizer
from model import CAUSAL, ModelConfig, reparametrised, whole


@lru_cache(maxsize=8)  # whoever loads a run again has nothing compiled anew
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

    @property
    def hashes(self) -> list[str]:
        """What each document's text is known by, wherever it came from."""
        found = []
        for place in self.places:
            known = self.cache.shard(place.shard).texts[place.number]
            found.append(f"{known:016x}")
        return found

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
    which = np.flatnonzero(np.isin(shard.split, READ_AS[split])).tolist()
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
    held_out: dict[str, Cache] = {}  # of `data.held_out`, in place of a source's own dev and test

    def cache(self, source: str, split: str) -> Cache:
        """The cache that holds a split of a source."""
        if split == "train" or source not in self.held_out:
            return self.caches[source]
        return self.held_out[source]


def open_source(setting: Setting, source: str, split: str, most: int | None = None) -> HeldOut:
    """The documents of a split of a source, in rows and batches like those of the phase.

    Of a streamed source the documents of the first window alone.
    """
    data, phase = setting.config.data, setting.phase
    cache = setting.cache(source, split)
    streamed = data.stream and cache is setting.caches.get(source)
    shards = data.window if streamed else None
    rows = setting.tokenizer, phase.seq, phase.batch, setting.config.overlap
    return held_out(cache, split, *rows, most, shards)


def open_split(setting: Setting, split: str, most: int | None = None) -> dict[str, HeldOut]:
    """The documents of dev or test by source; see `open_source`."""
    names = setting.caches | setting.held_out
    return {name: open_source(setting, name, split, most) for name in names}


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


def test_figures(
    losses: Callable,
    caches: dict[str, Cache],
    config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    held_out: dict[str, Cache] | None = None,
) -> dict:
    """What a run is reported by: figures of all test documents, printed too; empty without any.

    `eval/SOURCE.test/FIGURE`, the figures of `compressed`, `held_out_paths`, the documents, and
    `held_out_texts`, {source: what their texts are known by}. The config's own `evals` are not run.
    losses: a batch's arrays -> nats [b t]; it is not asked where the model predicts no pieces.
    held_out: caches of `data.held_out`.
    """
    setting = Setting(config, config.phases[-1], caches, tokenizer, mesh, held_out or {})
    held = open_split(whole_batches(setting), "test")
    held = {name: documents for name, documents in held.items() if documents.places}
    if not held:  # all documents are for training or dev
        return {}
    found = whole_figures(losses, held, config, "eval/{}.test")
    paths = []
    for documents in held.values():
        paths += documents.paths
    hashes = {name: documents.hashes for name, documents in held.items()}
    return found | {"held_out_paths": paths, "held_out_texts": hashes}


def whole_batches(setting: Setting) -> Setting:
    """The same with batches that the mesh divides."""
    parts = setting.mesh.shape["data"] * setting.mesh.shape["fsdp"]
    batches = math.ceil(setting.phase.batch / parts)
    return setting._replace(phase=replace(setting.phase, batch=batches * parts))


def whole_figures(losses: Callable, held: dict[str, HeldOut], config, name: str) -> dict:
    """The figures of `measure` and `compressed` of whole texts, printed too as a table."""
    found = {}
    if predicts_text(config):
        found = measure(losses, held, name)
    texts = []
    for documents in held.values():
        texts += documents.texts()
    found |= compressed(texts)
    print(figures_table(found, held, name))
    return found


def figures_table(found: dict[str, float], held: dict[str, HeldOut], name: str) -> str:
    """The figures of texts: a line for each source, and four for the compressors."""
    rows = [["", "documents", "bytes", "bits per byte", "nats per token"]]
    means = []
    for source, documents in held.items():
        at = name.format(source)
        if f"{at}/bpb" not in found:
            continue
        means.append(found[f"{at}/bpb"])
        bits = f"{means[-1]:.3f} ± {HALF_95 * found[f'{at}/bpb_se']:.3f}"
        size = [f"{len(documents.places):,}", f"{documents.bytes.sum():,}"]
        rows.append([f"held-out {source}", *size, bits, f"{found[f'{at}/loss']:.3f}"])
    if len(means) > 1:
        rows.append(["mean of these", "", "", f"{np.mean(means):.3f}", ""])
    for how, key in (("each document alone", "bpb"), ("all as one text", "together_bpb")):
        for program in ("gzip", "xz"):
            bits = f"{found[f'{program}_{key}']:.3f}"
            rows.append([f"{program} -9 of the same, {how}", "", "", bits, ""])
    return columns(rows) + "\n± is half a 95 % interval"


def write_figures(directory: Path, figures: dict):
    """Write a run's eval.json; what is not finite becomes null. Only the main process writes."""
    if is_main_process():
        write(directory / "eval.json", json.dumps(finite(figures), indent=1))
