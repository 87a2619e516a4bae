"""Text to batches: sources, tokenizers, the token cache, packing, mixtures, order, and `batch(step)`.

    source -> documents -> (prepare, score) -> tokenizer -> shards on disk, each sealed once      build()
    shards -> plan: which document pieces make up which row -> permuted rows                      Rows
    rows of several sources, by the counts of a mixture -> objective -> batch(step)               Loader

A batch is a function of (config, seed, step): nothing here keeps a position, so nothing has to be saved.
"""
import functools
import inspect
import io
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lib.cache import Cache, Shard
from lib.disk import digest, write
from lib.errors import InputError
from lib.fields import Count, Positive, Rules, Share, join, strict
from lib.keys import function_key
from lib.packing import (
    DOCUMENT,
    LENGTH,
    PLAN,
    QUIET,
    ROW,
    START,
    concat_and_split,  # noqa: F401  (for config files)
    fill,
    permute,
)
from lib.sources import Document, Skipped, Source, stdlib, text  # noqa: F401  (for config files)
from lib.tokenizers import Tokenizer


@strict
@dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, splits and cache."""

    sources: dict[str, Source] = field(default_factory=lambda: {"stdlib": Source(stdlib)})  # by name
    tokenizer: str = "bpe"  # "bpe": trained to model.vocab pieces; "bytes"; a SentencePiece file; "hf:DIR"
    sample_mib: Positive = 8.0  # the tokenizer is trained on at most this much text
    dev: Share = 0.05  # share of documents for steering, tuning and selection
    test: Share = 0.05  # share of documents for what is reported
    shard_tokens: Count = 4_194_304  # a shard is sealed once it has at least this many
    window: Count = 8  # shards within which documents are permuted and packed
    stream: bool = False  # train while the rest is tokenized; held-out documents: those of the first window
    max_skipped: Share = 0.1  # building stops when more than this share of a source is damaged

    def rules(self, path: str) -> Rules:
        """What fields must be to one another."""
        at = functools.partial(join, path)
        yield (not self.sources,
               f"{at('sources')} is empty; allowed is one source and more")
        yield (self.dev + self.test >= 1,
               f"{at('dev')} and {at('test')} are {self.dev} and {self.test}; allowed are shares "
               "that leave something to train on")


class Documents(NamedTuple):
    """The training documents of a window of shards, in their permuted order: what a packing may ask about."""

    cache: Cache
    shard: np.ndarray  # [documents]
    number: np.ndarray  # [documents], within the shard

    def of(self, fact: Callable[[Shard], Any]) -> np.ndarray:
        """A fact of each document, such as `of(lambda shard: shard.score)`, or `of(Shard.documents)`."""
        shards = np.unique(self.shard)
        each = [np.asarray(fact(self.cache.shard(int(i)))) for i in shards]
        starts = np.cumsum([0] + [len(x) for x in each])[np.searchsorted(shards, self.shard)]
        return np.concatenate(each)[starts + self.number] if each else np.zeros(0, np.int64)

    def ids(self, document: int) -> np.ndarray:
        """Token ids of a document, prefix included."""
        shard, number = self.cache.shard(int(self.shard[document])), int(self.number[document])
        return shard.tokens[shard.offsets[number]:shard.offsets[number + 1]]


def shuffled(draw: int, rows: int, progress: float, key: tuple[int, ...]) -> int:
    """The plain order: a permutation of a window's rows, anew each epoch. An order gives the place in the
    plan of the `draw`-th row (from 0, over all epochs) of a window of `rows`; progress is 0 to 1."""
    return int(permute(draw % rows, rows, *key, 1 + draw // rows)[0])


class Rows:
    """The training rows of one source under one packing, length and order, drawn 0, 1, 2, ... for ever.

    Documents are permuted and packed in a window of shards, planned when it is reached: later shards may
    still be on their way. Plans are kept beside the shards.
    """

    def __init__(self, cache: Cache, seq: int, packing: Callable, order: Callable, window: int,
                 tokenizer: Tokenizer, key: tuple[int, ...]):
        self.cache, self.seq, self.packing, self.order = cache, seq, packing, order
        self.size, self.tokenizer, self.key, self.ends = window, tokenizer, key, [0]
        self.plans = cache.directory / "plans" / digest([function_key(packing), seq, window, key])
        self.window, self.lock = lru_cache(4)(self.plan), threading.RLock()
        while not self.ends[-1]:
            if not self.grow():
                raise InputError(f"source {cache.name!r} has no document in its train split that is packed")

    def plan(self, number: int) -> tuple[Documents, np.ndarray, np.ndarray]:
        """(documents, positions of each, plan) of a window; `window` remembers the last ones."""
        shards = range(number * self.size, min((number + 1) * self.size, self.cache.sealed))
        where = [(i, np.flatnonzero(self.cache.shard(i).split == 0)) for i in shards]
        shard = np.concatenate([np.full(len(which), i) for i, which in where])
        order = permute(np.arange(len(shard)), len(shard), *self.key, number)
        documents = Documents(self.cache, shard[order], np.concatenate([which for _, which in where])[order])
        lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
        file = self.plans / f"{number:06d}.npy"
        if not file.exists():
            takes = inspect.signature(self.packing).parameters
            more = {"documents": documents} if "documents" in takes else {}
            plan = self.packing(lengths, self.seq, **more) if len(lengths) else []
            plan = np.array(plan, np.int64).reshape(-1, len(PLAN))
            quiet = documents.of(lambda shard: shard.quiet)[plan[:, DOCUMENT]] - plan[:, START]
            plan[:, QUIET] = np.clip(quiet, plan[:, QUIET], plan[:, LENGTH])
            content = io.BytesIO()
            np.save(content, plan.astype(np.int32))
            write(file, content.getvalue())
        return documents, lengths, np.load(file).astype(np.int64)

    def grow(self) -> bool:
        """Plan the next window, once its shards are sealed; False where there is none."""
        with self.lock:  # batches are made by another thread than the one that counts epochs
            number = len(self.ends) - 1
            if self.cache.wait((number + 1) * self.size) <= number * self.size:
                return False
            plan = self.window(number)[2]
            self.ends.append(self.ends[-1] + (int(plan[-1, ROW]) + 1 if len(plan) else 0))
            return True

    @property
    def epoch(self) -> int:
        """Rows of one pass over the source; waits until all of it is there."""
        while self.grow():
            pass
        return self.ends[-1]

    def get(self, draws: np.ndarray, progress: float = 0.0) -> tuple[dict, int, int]:
        """(arrays [n, seq] of `fill`, pieces, how many of these end before their document) of draws [n]."""
        parts, pieces, cut = [], 0, 0
        for draw in draws.tolist():
            while draw >= self.ends[-1] and self.grow():
                pass
            epoch, within = divmod(draw, self.ends[-1])
            number = int(np.searchsorted(self.ends, within, side="right")) - 1
            documents, lengths, plan = self.window(number)
            rows = self.ends[number + 1] - self.ends[number]
            row = self.order(epoch * rows + within - self.ends[number], rows, progress, (*self.key, number))
            parts.append(fill(plan, np.array([row]), self.seq, documents.ids, self.tokenizer))
            here = plan[slice(*np.searchsorted(plan[:, ROW], (row, row + 1)))]
            pieces += len(here)
            cut += int(np.sum(here[:, START] + here[:, LENGTH] < lengths[here[:, DOCUMENT]]))
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if k != "document"}, pieces, cut


def causal(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """The plain objective: predict each next token. Takes and gives arrays [seq]; an objective may change any
    and add others. The second result is the mask specification, as keyword arguments of `model.Mask`.
    """
    return row, dict(kind="causal", window=0)


class Batch(NamedTuple):
    """One update's rows: arrays [batch, seq], the mask to attend them with, and figures about them."""

    arrays: dict[str, np.ndarray]
    mask: dict
    metrics: dict[str, float]
    rows: int  # of the whole batch, which may be more than are made here


def batch_lengths(phase) -> tuple[list[int], np.ndarray]:
    """(row lengths of a phase, index of each batch's [steps]): `seq`, or by the weights that `lengths` gives.

    A batch takes the length that is furthest behind its share.
    """
    if phase.lengths is None:
        return [phase.seq], np.zeros(phase.steps, np.int64)
    lengths, picks = list(phase.lengths(0.0)), np.zeros(phase.steps, np.int64)
    behind = np.zeros(len(lengths))
    for step in range(phase.steps):
        weights = phase.lengths(step / phase.steps)
        behind += np.array([weights[n] for n in lengths], float) / sum(weights.values())
        picks[step] = np.argmax(behind)
        behind[picks[step]] -= 1
    return lengths, picks


def apportion(owed: np.ndarray, rows: int, left: np.ndarray) -> np.ndarray:
    """Whole numbers near `owed` [n], none above `left`, that sum to `rows`: largest remainders go up."""
    whole = np.minimum(np.floor(np.maximum(owed, 0) + 1e-9), left).astype(np.int64)
    while short := rows - whole.sum():
        free = whole < left if short > 0 else whole > 0
        whole[np.argmax(np.where(free, (owed - whole) * np.sign(short), -np.inf))] += np.sign(short)
    return whole


class Loader:
    """`batch(step)` for all steps of a run, from its caches and phases (see `train.Phase`).

    mixture: {source: weight}, a function (progress within the phase, log) of these, or None for weights by
    rows. Whoever runs it fills in `log`, for each phase the dev losses {source: nats} at every `steer` of its
    steps so far, and `start`, the positions of each source that another run drew before.
    """

    def __init__(self, caches: dict[str, Cache], phases, config: DataConfig, tokenizer: Tokenizer, seed: int):
        self.names, self.phases, self.seed = list(caches), phases, seed
        self.sources = [config.sources[name] for name in caches]
        self.ends = np.cumsum([phase.steps for phase in phases])
        self.lock = threading.RLock()
        self.lengths, self.picks = zip(*map(batch_lengths, phases), strict=True)
        self.rows = [[[Rows(cache, seq, phase.packing, phase.order, config.window, tokenizer, (seed, i))
                       for i, cache in enumerate(caches.values())] for seq in lengths]
                     for phase, lengths in zip(phases, self.lengths, strict=True)]
        self.restore([0] * len(caches), [])

    def restore(self, start: list[int], log: list[list[dict[str, float]]]):
        """Go on from a checkpoint: `start`, the positions of each source that another run drew before, and
        the decisions `log` of each phase (a phase that it lacks has none yet). Forgets all that was drawn."""
        later = len(self.phases) - len(log)
        self.start = list(start)
        self.log = [list(decisions) for decisions in log] + [[] for _ in range(later)]
        shapes = [(len(lengths), len(self.names)) for lengths in self.lengths]
        self.counts = [np.zeros((p.steps + 1, *s), np.int64) for p, s in zip(self.phases, shapes, strict=True)]
        self.known, self.carry = [0] * len(self.phases), [np.zeros(s) for s in shapes]

    def decide(self, phase: int, losses: dict[str, float]):
        """Log one decision of a phase: the dev losses {source: nats} that its mixture is steered by."""
        self.log[phase].append(losses)

    def decided(self) -> int:
        """The last step whose batch the log so far determines: the last of all where nothing is steered."""
        for end, phase, log in zip(self.ends.tolist(), self.phases, self.log, strict=True):
            known = phase.steer * (len(log) + 1)
            if phase.steer and known < phase.steps:
                return end - phase.steps + known
        return int(self.ends[-1])

    def phase_of(self, step: int) -> int:
        """The phase that takes `step` (1 and up)."""
        return int(np.searchsorted(self.ends, step))

    def weights(self, phase: int, step: int) -> np.ndarray:
        """The mixture at a step of a phase (0 is its first), normalised [sources]."""
        p, names, mixture = self.phases[phase], self.names, self.phases[phase].mixture
        if mixture is None:
            rows = self.rows[phase][self.picks[phase][step]]
            mixture = {name: r.epoch if len(names) > 1 else 1 for name, r in zip(names, rows, strict=True)}
        elif callable(mixture):
            decided = step // p.steer if p.steer else 0
            if len(self.log[phase]) < decided:
                raise InputError(f"step {step} of phase {phase} is beyond the decisions taken so far")
            mixture = mixture(step / p.steps, self.log[phase][:decided])
        finite = all(0 <= w < math.inf for w in mixture.values())
        if mixture.keys() - names or not finite or not sum(mixture.values()):
            raise InputError(f"phases.{phase}.mixture gives {mixture}; allowed are weights of 0 and more, "
                             f"not all 0, for the sources {', '.join(names)}")
        weights = np.array([mixture.get(name, 0) for name in names], float)
        return weights / weights.sum()

    def drawn(self, phase: int, steps: int) -> np.ndarray:
        """Rows [lengths, sources] drawn in a phase's first `steps`: a recurrence, worked out once."""
        with self.lock:
            for step in range(self.known[phase], steps):
                self.draw(phase, step)
        return self.counts[phase][steps]

    def draw(self, phase: int, step: int):
        """Work out the rows of one more step of a phase."""
        p, at, weights = self.phases[phase], self.picks[phase][step], self.weights(phase, step)
        rows, left = p.batch * p.seq // self.lengths[phase][at], np.full(len(self.names), math.inf)
        if any(source.epochs for source in self.sources):
            limits = [source.epochs * r.epoch if source.epochs else math.inf
                      for source, r in zip(self.sources, self.rows[phase][at], strict=True)]
            left = np.floor(limits - self.begin(phase)[at] - self.counts[phase][step, at])
            left[weights == 0] = 0  # who has no share takes over nothing
        stops = np.array([source.after == "stop" for source in self.sources])
        due = self.carry[phase][at] + weights * rows
        ended = [n for n, out in zip(self.names, stops & (left < np.floor(due + 1e-9)), strict=True) if out]
        if ended or left.sum() < rows:
            raise InputError(f"source {', '.join(ended or self.names)}: no rows left at step {step} of phase "
                             f"{phase}; give fewer steps, more epochs, or after=\"renormalise\"")
        owed = self.carry[phase][at] + (share := weights * (stops | (left > 0))) / share.sum() * rows
        self.counts[phase][step + 1], self.known[phase] = self.counts[phase][step], step + 1
        self.counts[phase][step + 1, at] += (whole := apportion(owed, rows, left))
        self.carry[phase][at] = owed - whole  # carried, so that a rare source gets its share

    def positions(self, step: int) -> np.ndarray:
        """Positions of each source [sources] drawn by the first `step` steps, and before by another run."""
        out = np.array(self.start, np.int64)
        for p, (n, end) in enumerate(zip([p.steps for p in self.phases], self.ends.tolist(), strict=True)):
            out += np.array(self.lengths[p]) @ self.drawn(p, min(n, max(0, step - end + n)))
        return out

    def begin(self, phase: int) -> np.ndarray:
        """The first row [lengths, sources] in a phase: positions that were drawn before, over length."""
        before = self.positions(int(self.ends[phase]) - self.phases[phase].steps)
        return before // (len(self.lengths[phase]) * np.array(self.lengths[phase]))[:, None]

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source that the first `step` steps make."""
        p = self.phase_of(max(1, step))
        epoch = np.array(self.lengths[p]) @ np.array([[r.epoch for r in row] for row in self.rows[p]])
        return dict(zip(self.names, (self.positions(step) / epoch).tolist(), strict=True))

    def batch(self, step: int, own: Callable[[int], np.ndarray] = np.arange) -> Batch:
        """The batch of a step (1 and up): a function of (config, seed, step), and of the log where the
        mixture is steered. own: number of its rows -> those that are made here; metrics are of these."""
        p = self.phase_of(step)
        phase, within = self.phases[p], step - 1 - (int(self.ends[p]) - self.phases[p].steps)
        at = self.picks[p][within]
        before, after = (self.begin(p)[at] + self.drawn(p, within + i)[at] for i in (0, 1))
        bounds = np.cumsum([0, *(after - before)])  # rows come source by source
        wanted, made, pieces, cut = own(int(bounds[-1])), [], 0, 0
        for i, rows in enumerate(self.rows[p][at]):
            mine = wanted[(wanted >= bounds[i]) & (wanted < bounds[i + 1])]
            if not len(mine):
                continue
            arrays, n, m = rows.get(mine - bounds[i] + before[i], within / phase.steps)
            arrays["source"], pieces, cut = np.full_like(arrays["tokens"], i), pieces + n, cut + m
            made += [phase.objective({k: v[j] for k, v in arrays.items()},
                                     np.random.default_rng([self.seed, step, r])) for j, r in enumerate(mine)]
        figures = {"data/waste": 1 - float(np.mean([row["segments"] > 0 for row, _ in made])),
                   "data/truncated": cut / pieces, "data/segments": pieces / len(made)}
        drawn = {f"data/{name}/rows": int(n) for name, n in zip(self.names, after - before, strict=True)}
        return Batch({k: np.stack([row[k] for row, _ in made]) for k in made[0][0]}, made[0][1],
                     figures | (drawn if len(self.names) > 1 else {}), int(bounds[-1]))
