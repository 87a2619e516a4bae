"""From documents to batches: `batch(step)` is a function of (config, seed, step).

    documents -> shards of tokens on disk               lib/sources.py, lib/cache.py
    shards -> rows: permuted, packed, cut to length     Rows, with lib/packing.py
    how many rows of which source a step takes          Draws
    rows -> batches, by an objective                    Loader, with lib/objectives.py

Nothing here keeps a position, so nothing has to be saved.
"""
import functools
import io
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Annotated, NamedTuple

import numpy as np

from lib.bind import bind, parameters
from lib.cache import Cache
from lib.disk import digest, read_checked, write_checked
from lib.errors import InputError
from lib.fields import Count, Positive, Rules, Share, join, strict
from lib.keys import function_key
from lib.objectives import (
    asks,
    declared,
    declared_masks,
    generator_for,
    in_vocabulary,
    is_made,
    objective_of,
    stack,
)
from lib.objectives import causal as causal  # for config files
from lib.packing import (
    DOCUMENT,
    LENGTH,
    PLAN,
    QUIET,
    ROW,
    START,
    bound_on_segments,
    checked_plan,
    concat_and_split,  # noqa: F401  (for config files)
    fill_marks,
    fill_row,
    permute,
    permute_one,
    segments_of,
)
from lib.seams import LENGTHS, MIXTURE, OBJECTIVE, ORDER, TOKENIZER, is_number, require_gave
from lib.sources import (  # noqa: F401
    READ_AS,
    SPLITS,
    Document,
    Skipped,
    Source,
    nothing,
    stdlib,
    text,
)
from lib.tokenizers import Tokenizer

# What is known at a step of a phase with `steer`, of one evaluation before: its whole row, as
# "eval/SOURCE/bpb" or what the config's own evals give, and {source: dev loss in nats a token}.
Evaluation = dict[str, float]
HELD_OUT = SPLITS[1:]  # what `Source.split` is of a source that no step draws


@strict
@dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, splits and cache."""

    sources: dict[str, Source] = field(default_factory=lambda: {"stdlib": Source(stdlib)})
    # Documents that are measured and no step draws. A source that has some here by its own name is
    # trained on as a whole. With `split` "dev" or "test" they are that alone, otherwise both.
    held_out: dict[str, Source] = field(default_factory=dict)
    # "bpe" is trained to model.vocab pieces. A function is [texts, vocab] -> tokenizer.
    # Others are "bytes", "numbers:N", "hf:DIR", and a file.
    tokenizer: str | Annotated[Callable, TOKENIZER] = "bpe"
    sample_mib: Positive = 8.0  # the tokenizer is trained on at most this much text
    dev: Share = 0.05  # share of documents for steering, tuning and selection
    test: Share = 0.05  # share of documents for what is reported
    shard_tokens: Count = 4_194_304  # a shard is sealed once it has at least this many
    window: Count = 8  # shards within which documents are permuted and packed
    stream: bool = False  # train while the rest is tokenized; the first window gives held-out ones
    max_skipped: Share = 0.1  # building stops when more than this share of a source is damaged

    def rules(self, path: str) -> Rules:
        """What fields must be to one another."""
        at = functools.partial(join, path)
        yield (not self.sources,
               f"{at('sources')} is empty; allowed is one source and more")
        yield (self.dev + self.test >= 1,
               f"{at('dev')} and {at('test')} are {self.dev} and {self.test}; allowed are shares "
               "that leave something to train on")
        for name, source in self.held_out.items():
            of = at(f"held_out.{name}")
            yield (source.split == "train",
                   f'{of}.split is "train"; allowed is "", "dev", "test" or "held_out"')
            yield (source.prepare or source.epochs,
                   f"{of} has prepare or epochs, which are of documents that are trained on; "
                   "allowed is it without them")

    def shares(self, name: str) -> tuple[float, float]:
        """Shares of a source's documents that their hash holds out: (dev, test)."""
        if name in self.held_out:
            return 0.0, 0.0
        return self.dev, self.test

    def alone(self, name: str, source: Source) -> "DataConfig":
        """This config with one source, whose documents are held out, for its token cache."""
        source = replace(source, split=source.split or "held_out")
        return replace(self, sources={name: source}, held_out={}, dev=0.0, test=0.0)


class Documents(NamedTuple):
    """The documents of a window of shards, permuted: what a packing may ask about."""

    cache: Cache
    shard: np.ndarray  # [documents]
    number: np.ndarray  # [documents], within the shard

    def of(self, fact: Callable) -> np.ndarray:
        """A fact of each document [documents ...], where `fact` gives those of a whole shard.

        Examples: `of(Shard.documents)`, `of(lambda shard: shard.score)`.
        """
        shards, which = np.unique(self.shard, return_inverse=True)
        if not len(shards):
            return np.zeros(0, np.int64)
        facts = []
        for shard in shards.tolist():
            facts.append(np.asarray(fact(self.cache.shard(shard))))
        sizes = [len(each) for each in facts]
        starts = np.cumsum(sizes) - sizes
        index = starts[which] + self.number
        return np.concatenate(facts)[index]

    def ids(self, document: int) -> np.ndarray:
        """Token ids of a document, prefix included."""
        shard = self.cache.shard(int(self.shard[document]))
        number = self.number[document]
        start, end = shard.offsets[number:number + 2]
        return shard.tokens[start:end]

    def marks(self, document: int) -> np.ndarray:
        """1 for each marked token of a document, otherwise 0; uint8 [tokens], prefix included."""
        shard = self.cache.shard(int(self.shard[document]))
        number = int(self.number[document])
        marked = np.zeros(shard.offsets[number + 1] - shard.offsets[number], np.uint8)
        if shard.marks is None:
            return marked
        first, last = np.searchsorted(shard.marks[:, 0], (number, number + 1))
        for _, start, end in shard.marks[first:last].tolist():
            marked[start:end] = 1
        return marked

    def document(self, document: int, tokenizer: Tokenizer) -> Document:
        """A document with its path, meta, and what its tokens say as its prefix and its text."""
        shard = int(self.shard[document])
        number = int(self.number[document])
        facts = self.cache.described(shard)[number]
        ids = self.ids(document)
        quiet = int(self.cache.shard(shard).quiet[number])
        prefix = tokenizer.decode(ids[:quiet])
        return Document(facts["path"], tokenizer.decode(ids[quiet:]), facts["meta"], prefix=prefix)


class Window(NamedTuple):
    """Some shards of a source, whose documents are permuted and packed together."""

    documents: Documents
    lengths: np.ndarray  # positions of each document [documents]
    plan: np.ndarray  # [pieces, 6], see lib/packing.py
    begins: np.ndarray  # of each row's pieces in the plan, and its end [rows + 1]

    def pieces(self, row: int) -> np.ndarray:
        """The pieces of a row, as the plan has them."""
        return self.plan[self.begins[row]:self.begins[row + 1]]


class Row(NamedTuple):
    """One training sequence."""

    arrays: dict[str, np.ndarray]  # [seq] each, see `lib.packing.fill`
    pieces: int  # of documents
    cut: int  # pieces that end before their document does
    document: Callable[..., Document]  # of a piece, by its number; 0, the first, without one


def shuffled(draw: int, rows: int, progress: float, key: tuple[int, ...]) -> int:
    """The plain order: a permutation of a window's rows, another one in each epoch.

    An order gives the place in the window's plan of the row that is drawn after `draw` others.
    rows: of the window. progress: of the phase, 0 to 1. key: of the window, for random numbers. An
    order may also ask for `log`, see `Evaluation`.
    """
    epoch, place = divmod(draw, rows)
    return permute_one(place, rows, *key, 1 + epoch)


class Rows:
    """The rows of one source's split under one packing, length and order: 0, 1, 2, ... for ever.

    A window of shards is planned when its first row is asked for, since later shards may still be
    on their way. Plans are kept on disk, beside the shards. marks: whether rows have `marks`, see
    `lib.packing.fill_marks`. empty: it is held out as a whole and has no rows.
    """

    def __init__(
        self,
        cache: Cache,
        seq: int,
        packing: Callable,
        order: Callable,
        window: int,
        tokenizer: Tokenizer,
        key: tuple[int, ...],
        split: str = "train",
        marks: bool = False,
        empty: bool = False,
    ):
        self.cache = cache
        self.seq = seq
        self.packing = packing
        self.order = order
        self.shards = window  # in a window
        self.tokenizer = tokenizer
        self.key = key  # of all permutations
        self.split = split
        self.marks = marks
        self.empty = empty
        parts = [function_key(packing), seq, window, key]
        if split != "train":
            parts.append(split)
        plans = digest(parts)
        self.plans = cache.directory / "plans" / plans
        self.window = lru_cache(4)(self.open_window)
        self.lock = threading.RLock()
        self.ends = [0]  # window i has the rows ends[i] to ends[i + 1] of an epoch
        while not self.ends[-1] and self.grow():
            pass
        if not self.ends[-1] and not empty and split == "train":
            raise InputError(
                f"source {cache.name!r} has no document in its train split that is packed"
            )

    def open_window(self, number: int) -> Window:
        """A window with its plan. `window` does the same and remembers the last ones."""
        documents = self.permuted_documents(number)
        lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
        file = self.plans / f"{number:06d}.plan"
        written = read_checked(file)
        if written is None:
            if file.exists():
                print(f"the plan {file} is damaged; it is made again", flush=True)
            content = io.BytesIO()
            np.save(content, self.pack(documents, lengths).astype(np.int32))
            written = content.getvalue()
            write_checked(file, written)
        plan = np.load(io.BytesIO(written)).astype(np.int64)
        rows = int(plan[-1, ROW]) + 1 if len(plan) else 0
        begins = np.searchsorted(plan[:, ROW], np.arange(rows + 1))
        return Window(documents, lengths, plan, begins)

    def permuted_documents(self, number: int) -> Documents:
        """The documents of a window, in the order in which they are packed."""
        first = number * self.shards
        end = min(first + self.shards, self.cache.sealed)
        found = []
        for shard in range(first, end):
            split = self.cache.shard(shard).split
            found.append(np.flatnonzero(np.isin(split, READ_AS[self.split])))
        sizes = [len(numbers) for numbers in found]
        shard = np.repeat(np.arange(first, end), sizes)
        total = len(shard)
        order = permute(np.arange(total), total, *self.key, number)
        numbers = np.concatenate(found)
        return Documents(self.cache, shard[order], numbers[order])

    def pack(self, documents: Documents, lengths: np.ndarray) -> np.ndarray:
        """The plan of a window. The prefix of a document carries no loss."""
        if not len(lengths):
            return np.zeros((0, len(PLAN)), np.int64)
        packing = bind(self.packing, documents=documents, tokenizer=self.tokenizer)
        given = packing(lengths, self.seq)
        plan = checked_plan(given, lengths, self.seq, self.packing)
        prefix = documents.of(lambda shard: shard.quiet)
        quiet = prefix[plan[:, DOCUMENT]] - plan[:, START]
        plan[:, QUIET] = np.clip(quiet, plan[:, QUIET], plan[:, LENGTH])
        return plan

    def grow(self) -> bool:
        """Plan the next window once its shards are sealed; False where there is none."""
        if self.empty:
            return False
        with self.lock:  # one thread makes batches while another counts epochs
            number = len(self.ends) - 1
            first = number * self.shards
            if self.cache.wait(first + self.shards) <= first:
                return False
            rows = len(self.window(number).begins) - 1
            self.ends.append(self.ends[-1] + rows)
            return True

    @property
    def epoch(self) -> int:
        """Rows of one pass over the source; waits until all of it is there."""
        while self.grow():
            pass
        return self.ends[-1]

    def place(self, draw: int, progress: float, log: Sequence[Evaluation]) -> tuple[int, int]:
        """(window, row of its plan) of the row that is drawn after `draw` others.

        `progress` and `log` are for the order.
        """
        while draw >= self.ends[-1] and self.grow():
            pass
        epoch, place = divmod(draw, self.ends[-1])
        number = bisect_right(self.ends, place) - 1
        first, end = self.ends[number:number + 2]
        rows = end - first
        earlier = epoch * rows + place - first  # rows drawn from this window before
        order = bind(self.order, log=list(log))
        row = order(earlier, rows, progress, (*self.key, number))
        fine = isinstance(row, int | np.integer) and 0 <= row < rows
        more = f", here {rows - 1}, of {self.cache.name!r}"
        require_gave(fine, ORDER, self.order, row, more)
        return number, row

    def segments(self, draw: int, progress: float, log: Sequence[Evaluation]) -> np.ndarray:
        """The segments [seq] of the row that is drawn after `draw` others; no token is read."""
        number, row = self.place(draw, progress, log)
        return segments_of(self.window(number).pieces(row), self.seq)

    def get(self, draw: int, progress: float = 0.0, log: Sequence[Evaluation] = ()) -> Row:
        """The row that is drawn after `draw` others; `progress` and `log` are for the order."""
        number, row = self.place(draw, progress, log)
        window = self.window(number)
        documents, pieces = window.documents, window.pieces(row)
        arrays = fill_row(pieces, self.seq, documents.ids, self.tokenizer)
        ends = pieces[:, START] + pieces[:, LENGTH]
        cut = np.sum(ends < window.lengths[pieces[:, DOCUMENT]])
        if self.marks:
            arrays["marks"] = fill_marks(pieces, self.seq, documents.marks)

        def document(piece: int = 0) -> Document:
            return documents.document(pieces[piece, DOCUMENT], self.tokenizer)

        return Row(arrays, len(pieces), int(cut), document)


def reads_log(phase) -> bool:
    """Whether the mixture of a phase, its order or an objective may read the log of evaluations."""
    ordered = "log" in parameters(phase.order)
    return callable(phase.mixture) or ordered or asks(phase.objective, "log")


def row_lengths(phase) -> list[int]:
    """The lengths that the rows of a phase may have."""
    if phase.lengths is None:
        return [phase.seq]
    return list(phase.lengths(0.0))


def batch_lengths(phase) -> tuple[list[int], np.ndarray]:
    """(row lengths of a phase, index of each batch's length [steps]).

    `phase.lengths` gives each length a share of the batches. A batch takes the length that is
    furthest behind its share.
    """
    lengths = row_lengths(phase)
    picks = np.zeros(phase.steps, np.int64)
    if phase.lengths is None:
        return lengths, picks
    behind = np.zeros(len(lengths))
    for step in range(phase.steps):
        shares = phase.lengths(step / phase.steps)
        same = are_shares(shares) and list(shares) == lengths
        require_gave(same, LENGTHS, phase.lengths, shares)
        each = np.array([shares[length] for length in lengths], float)
        behind += each / sum(shares.values())
        pick = np.argmax(behind)
        behind[pick] -= 1
        picks[step] = pick
    return lengths, picks


def are_shares(shares) -> bool:
    """Whether a value is a dictionary of weights of 0 and more, not all of them 0."""
    if not isinstance(shares, dict):
        return False
    values = shares.values()
    if not all(map(is_number, values)):
        return False
    fine = all(0 <= share < math.inf for share in values)
    return fine and sum(values) > 0


def apportion(owed: np.ndarray, rows: int, left: np.ndarray) -> np.ndarray:
    """Whole numbers near `owed` [n] that sum to `rows`, none above `left` [n].

    The largest remainders go up. A sum of `left` below `rows` is not allowed.
    """
    whole = np.floor(np.maximum(owed, 0) + 1e-9)
    whole = np.minimum(whole, left).astype(np.int64)
    missing = rows - whole.sum()
    sign = np.sign(missing)
    for _ in range(abs(missing)):
        free = whole < left if sign > 0 else whole > 0
        remainders = (owed - whole) * sign
        most = np.argmax(np.where(free, remainders, -np.inf))
        whole[most] += sign
    return whole


class Draws:
    """How many rows of each source a phase draws: a table by step, worked out in order and once.

    A source's share of a batch is seldom a whole number of rows. What it is owed beyond them is
    carried to the next batch of the same length, so that a rare source comes as often as it should.
    """

    def __init__(self, number: int, phase, sources: dict[str, Source],
                 rows: list[list[Rows]], before: Callable):
        self.number = number  # of the phase
        self.phase = phase
        self.sources = sources
        self.rows = rows  # [lengths][sources]
        self.before = before  # () -> positions [sources] drawn before this phase
        self.lengths, self.picks = batch_lengths(phase)
        self.trained = [name for name in sources if sources[name].split not in HELD_OUT]
        stops = [source.after == "stop" for source in sources.values()]
        self.stops = np.array(stops)
        self.lock = threading.Lock()
        self.restart([])

    def restart(self, log: list[Evaluation]):
        """Forget what was drawn, and go on from these decisions."""
        shape = len(self.lengths), len(self.sources)
        self.log = list(log)
        self.known = 0  # steps worked out
        self.table = np.zeros((self.phase.steps + 1, *shape), np.int64)  # see `after`
        self.carried = np.zeros(shape)

    def after(self, steps: int) -> np.ndarray:
        """Rows [lengths, sources] that the first `steps` steps draw."""
        if self.known < steps:  # what is known needs no lock, whose holder may wait for a stream
            with self.lock:  # one thread makes batches while another counts epochs
                while self.known < steps:
                    self.extend()
        return self.table[steps]

    def extend(self):
        """Work out one more step."""
        step = self.known
        length = self.picks[step]
        total = self.phase.batch * self.phase.seq // self.lengths[length]  # rows
        shares = self.shares(step)
        left = self.left(step, shares)
        due = self.carried[length] + shares * total
        self.check_left(step, due, total, left)

        shares = shares * (self.stops | (left > 0))  # others take over from a source that ended
        owed = self.carried[length] + shares / shares.sum() * total
        drawn = apportion(owed, total, left)
        self.carried[length] = owed - drawn
        self.table[step + 1] = self.table[step]
        self.table[step + 1, length] += drawn
        self.known = step + 1

    def shares(self, step: int) -> np.ndarray:
        """The share [sources] of each source at a step of the phase (0 is its first). Sums to 1."""
        mixture = self.mixture(step)
        fine = are_shares(mixture) and mixture.keys() <= self.sources.keys()
        field = f"phases.{self.number}.mixture"
        more = f"; the sources are {', '.join(self.sources)}"
        if callable(self.phase.mixture):
            seam = MIXTURE._replace(field=field)
            require_gave(fine, seam, self.phase.mixture, mixture, more)
        if not fine:
            raise InputError(f"{field} is {mixture}; allowed is {MIXTURE.gives}{more}")
        shares = [mixture.get(name, 0) for name in self.sources]
        for name in self.sources:
            if mixture.get(name) and name not in self.trained:
                raise InputError(
                    f"phases.{self.number}.mixture gives the source {name} a share, but its split "
                    f'is "{self.sources[name].split}"; allowed is 0'
                )
        shares = np.array(shares, float)
        return shares / shares.sum()

    def mixture(self, step: int) -> dict[str, float]:
        """{source: share} as the phase says it, or {source: size} where it says nothing."""
        mixture = self.phase.mixture
        if callable(mixture):
            return mixture(step / self.phase.steps, self.decisions(step))
        if mixture is not None:
            return mixture
        if len(self.trained) == 1:  # whose size need not be known
            return dict.fromkeys(self.trained, 1.0)
        rows = self.rows[self.picks[step]]
        sizes = [each.epoch for each in rows]
        return dict(zip(self.sources, sizes, strict=True))

    def decisions(self, step: int) -> list[Evaluation]:
        """The log that mixture, order and objective of a step may know."""
        if not self.phase.steer:
            return []
        number = step // self.phase.steer
        if len(self.log) < number:
            raise InputError(
                f"step {step} of phase {self.number} is beyond the decisions taken so far"
            )
        return self.log[:number]

    def decided(self) -> int:
        """The number of steps that the decisions so far determine."""
        if not self.phase.steer:
            return self.phase.steps
        evaluations = len(self.log) + 1  # the next one included
        return min(self.phase.steps, self.phase.steer * evaluations)

    def left(self, step: int, shares: np.ndarray) -> np.ndarray:
        """Rows [sources] that the sources' epochs still allow; infinity where none has a limit."""
        length = self.picks[step]
        limits = np.full(len(self.sources), math.inf)
        for i, source in enumerate(self.sources.values()):
            if source.epochs:
                limits[i] = source.epochs * self.rows[length][i].epoch
        if np.isinf(limits).all():
            return limits
        drawn = self.first()[length] + self.table[step, length]
        left = np.floor(limits - drawn)
        left = np.maximum(left, 0)  # rows of another phase may have gone beyond the limit
        left[shares == 0] = 0  # a source without a share does not stand in for others
        return left

    def check_left(self, step: int, due: np.ndarray, total: int, left: np.ndarray):
        """Raise InputError if a source has ended that may not, or all of them have too few rows."""
        ended = self.stops & (left < np.floor(due + 1e-9))
        if not ended.any() and left.sum() >= total:
            return
        names = list(self.sources)
        if ended.any():
            names = [names[i] for i in np.flatnonzero(ended)]
        raise InputError(
            f"source {', '.join(names)}: no rows left at step {step} of phase {self.number}; "
            'give fewer steps, more epochs, or after="renormalise"'
        )

    def positions(self, steps: int) -> np.ndarray:
        """Positions [sources] drawn before the phase, and by its first `steps` steps."""
        return self.before() + np.array(self.lengths) @ self.after(steps)

    def first(self) -> np.ndarray:
        """The phase's first row [lengths, sources]: each source goes on where it was in its text.

        Positions drawn before belong to all lengths alike.
        """
        positions = np.array(self.lengths) * len(self.lengths)
        return self.before() // positions[:, None]

    def batch(self, step: int) -> tuple[int, list[int], list[int]]:
        """(index of the length, source of each row, number of each row within its source).

        Rows come source by source.
        """
        length = self.picks[step]
        before = self.after(step)[length]
        counts = self.after(step + 1)[length] - before
        starts = self.first()[length] + before
        sources, draws = [], []
        for source, count in enumerate(counts):
            sources += [source] * count
            draws += range(starts[source], starts[source] + count)
        return length, sources, draws


class Batch(NamedTuple):
    """The rows of one update."""

    arrays: dict[str, np.ndarray]  # [batch, seq] each
    mask: dict  # the arguments of `lib.kernels.Mask`
    metrics: dict[str, float]  # of the rows that are made here
    rows: int  # of the whole batch, which may be more than are made here
    segments: int = 0  # in a row at most, see `bound_on_segments`; 0: not known


class Drawn(NamedTuple):
    """What a step's batch is drawn from, before its objective."""

    phase: int
    rows: list[Rows]  # of each source, of the batch's row length
    sources: list[int]  # of each row of the batch
    draws: list[int]  # which draw of its source each row is
    progress: float  # share of the phase that is over
    log: list[Evaluation]  # that was taken before the step

    def row(self, number: int) -> Row:
        """A row of the batch."""
        rows = self.rows[self.sources[number]]
        return rows.get(self.draws[number], self.progress, self.log)

    def segments(self, number: int) -> np.ndarray:
        """The segments [seq] of a row of the batch, as its plan has them."""
        rows = self.rows[self.sources[number]]
        return rows.segments(self.draws[number], self.progress, self.log)


class Loader:
    """`batch(step)` for all steps of a run, from its caches and phases (see `train.Phase`)."""

    def __init__(self, caches: dict[str, Cache], phases: Sequence, config: DataConfig,
                 tokenizer: Tokenizer, seed: int):
        self.names = list(caches)
        self.phases = phases
        self.seed = seed
        self.ends = np.cumsum([phase.steps for phase in phases])  # last step of each phase
        self.start = [0] * len(caches)  # positions of each source that another run drew before
        self.rows = []  # of each phase: Rows [lengths][sources]
        self.draws = []  # of each phase
        self.tokenizer = tokenizer
        self.seen = set()  # objectives whose values were looked at
        sources = {name: config.sources[name] for name in caches}
        marks = any(source.marks for source in sources.values())
        before = self.started
        for number, phase in enumerate(phases):
            rows = [[] for _ in row_lengths(phase)]
            for each, seq in zip(rows, row_lengths(phase), strict=True):
                shared = seq, phase.packing, phase.order, config.window, tokenizer
                for i, (name, cache) in enumerate(caches.items()):
                    empty = sources[name].split in HELD_OUT
                    each.append(Rows(cache, *shared, (seed, i), marks=marks, empty=empty))
            draws = Draws(number, phase, sources, rows, before)
            self.rows.append(rows)
            self.draws.append(draws)
            before = partial(draws.positions, phase.steps)

    def started(self) -> np.ndarray:
        """Positions [sources] drawn before the first phase."""
        return np.array(self.start, np.int64)

    def restore(self, start: list[int], log: list[list[Evaluation]]):
        """Go on from a checkpoint, whose loader had this `start` and `log`.

        Phases that have no log there have decided nothing yet.
        """
        self.start = list(start)
        for number, draws in enumerate(self.draws):
            draws.restart(log[number] if number < len(log) else [])

    @property
    def log(self) -> list[list[Evaluation]]:
        """The log of each phase: an evaluation at every `steer` of its steps so far."""
        return [draws.log for draws in self.draws]

    def decide(self, phase: int, row: dict[str, float]):
        """Add an evaluation to the log of a phase; row: its figures, as metrics.jsonl has them."""
        figures = {name: float(value) for name, value in row.items()}
        for name in self.names:
            if f"eval/{name}/loss" in row:
                figures[name] = figures[f"eval/{name}/loss"]
        self.draws[phase].log.append(figures)

    def decided(self) -> int:
        """The last step whose batch the log determines; the last of all where none is steered."""
        total = 0
        for draws in self.draws:
            total += draws.decided()
            if draws.decided() < draws.phase.steps:
                break
        return total

    def phase_of(self, step: int) -> int:
        """The phase that takes `step` (1 and up)."""
        return int(np.searchsorted(self.ends, step))

    def within(self, step: int) -> tuple[int, int]:
        """(the phase that takes `step`, its number there, from 1); step 0 is 0 of the first."""
        number = self.phase_of(max(1, step))
        begin = int(self.ends[number]) - self.phases[number].steps
        return number, step - begin

    def positions(self, step: int) -> np.ndarray:
        """Positions [sources] drawn by the first `step` steps, and before by another run."""
        number, steps = self.within(step)
        return self.draws[number].positions(steps)

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source that the first `step` steps make."""
        number, _ = self.within(step)
        lengths = np.array(self.draws[number].lengths)
        rows = [[each.epoch for each in sources] for sources in self.rows[number]]
        size = np.maximum(1, lengths @ np.array(rows))  # a source may be held out as a whole
        epochs = self.positions(step) / size
        return dict(zip(self.names, epochs.tolist(), strict=True))

    def batch(self, step: int, own: Callable = np.arange, counted: bool = True) -> Batch:
        """The batch of a step (1 and up): a function of config, seed, step and, where steered, log.

        own: takes the number of its rows and gives those that are made here, in ascending order.
        counted: whether segments are counted; `Batch.segments` is 0 where they are not.
        """
        drawn = self.drawn(step)
        objectives = self.phases[drawn.phase].objective
        mine = own(len(drawn.sources))
        trained = self.draws[drawn.phase].trained
        masks = declared_masks(objective_of(objectives, name) for name in trained)
        needed = mine
        if not masks:  # undeclared masks show in all rows alone
            needed = range(len(drawn.sources))
        rows, made = {}, {}
        for r in needed:
            source = drawn.sources[r]
            row = drawn.row(r)
            row.arrays["source"] = np.full_like(row.arrays["tokens"], source)
            objective = objective_of(objectives, self.names[source])
            rng = generator_for(objective, self.seed, step, r)
            made[r] = self.made(objective, row, rng, drawn.progress, drawn.log)
            rows[r] = row
        arrays, mask = stack(made, mine, masks, f"phases.{drawn.phase}.objective")
        metrics = packing_metrics([rows[r] for r in mine], arrays)
        if len(self.names) > 1:
            for source, name in enumerate(self.names):
                metrics[f"data/{name}/rows"] = drawn.sources.count(source)
        number = len(drawn.sources)
        bound = self.bound(drawn, made) if counted else 0
        return Batch(arrays, mask, metrics, number, bound)

    def bound(self, drawn: Drawn, made: dict[int, tuple[dict, dict]]) -> int:
        """`Batch.segments`, the same in all processes, each of which made other rows or all.

        made: {row: (arrays, mask)}. Of other rows the plan says the segments, and its
        `segments` what an objective makes of them; 0 where one does not say that.
        """
        if len(made) == len(drawn.sources):
            rows = [arrays["segments"] for arrays, _ in made.values()]
            return bound_on_segments(np.stack(rows))
        objectives = self.phases[drawn.phase].objective
        of_sources = [objective_of(objectives, name) for name in self.names]
        changes = [declared(objective, "segments") for objective in of_sources]
        rows = []
        for r, source in enumerate(drawn.sources):
            if changes[source] is None:
                return 0
            rows.append(changes[source](drawn.segments(r)))
        return bound_on_segments(np.stack(rows))

    def drawn(self, step: int) -> Drawn:
        """The rows of a step's batch, before its objective."""
        number, steps = self.within(step)
        length, sources, draws = self.draws[number].batch(steps - 1)
        progress = (steps - 1) / self.phases[number].steps
        log = self.draws[number].decisions(steps - 1)
        return Drawn(number, self.rows[number][length], sources, draws, progress, log)

    def made(self, objective: Callable, row: Row, rng: np.random.Generator | None, progress: float,
             log: list[Evaluation]) -> tuple[dict, dict]:
        """(arrays, mask) that an objective makes of a row. Raises InputError for anything else."""
        planned = np.array(row.arrays["segments"])  # it may change them where they are
        found = self.told(objective, row, progress, log)(row.arrays, rng)
        fine = is_made(found, row.arrays)
        require_gave(fine, OBJECTIVE, objective, found)
        if objective in self.seen:
            return found
        self.seen.add(objective)
        last = self.tokenizer.vocab - 1
        fine = in_vocabulary(found[0], last)
        more = f", ids from 0 to {last} in tokens, finite weights"
        require_gave(fine, OBJECTIVE, objective, found, more)
        change = declared(objective, "segments")
        if change:
            fine = np.array_equal(change(planned), found[0]["segments"])
            more = ", and in segments what its own `segments` makes of them"
            require_gave(fine, OBJECTIVE, objective, found, more)
        return found

    def told(self, objective: Callable, row: Row, progress: float,
             log: list[Evaluation]) -> Callable:
        """An objective with what it asks for."""
        given = {"tokenizer": self.tokenizer, "progress": progress, "log": log}
        if "document" in parameters(objective):  # which is read and decoded only then
            given["document"] = row.document()
        return bind(objective, **given)


def packing_metrics(rows: list[Row], arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of padding, the share of pieces that are cut, and pieces a row, of some rows."""
    pieces = sum(row.pieces for row in rows)
    cut = sum(row.cut for row in rows)
    return {
        "data/waste": 1 - float(np.mean(arrays["segments"] > 0)),
        "data/truncated": cut / pieces,
        "data/segments": pieces / len(rows),
    }
