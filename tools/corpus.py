"""The token cache and the tokenizer of a config, without training.

build: tokenizer and token cache. tokenizer: it alone, trained here if need be.

inspect: rows of a batch as text, a colour for each segment, faint where there is no loss; below
each row the paths of the documents that its pieces are of.

bench: packings of the training documents, the speed of batch(step) from the finished cache, and
that of tokenizing beside raw SentencePiece. With --lengths lognormal: packings of 100,000 drawn
lengths (mean about 900, rows of 2,048). Where the library `grain` can be imported, its packings on
the same lengths too. The last line is one JSON object.
"""
import importlib.util
import itertools
import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.text import Text

from data import Batch, Loader
from lib.arguments import Arguments
from lib.cache import build
from lib.corpus import assemble, open_held_out
from lib.errors import InputError
from lib.packing import DOCUMENT, ROW, best_fit, concat_and_split, fill, first_fit
from lib.sources import SURROGATE, Document, documents_of
from lib.tables import printable
from lib.tokenizers import Bytes, SentencePiece, make_tokenizer
from train import Config, check, parse, prepare

COLOURS = ("cyan", "yellow", "green", "magenta")  # of a row's segments, in turn


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of a function."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


# ---------------------------------------------------------------------------------------- packings


def packing_figures(lengths: np.ndarray, seq: int, rows: int, pieces: np.ndarray,
                    plan_s: float | None, rows_s: float) -> dict:
    """What a packing did with documents of `lengths` positions, each cut into `pieces` pieces.

    ideal: the fewest rows possible; cut: share of documents in several pieces; cut_fitting: of
    those that fit a row; plan_s: seconds to plan; rows_s: seconds to plan and to make all rows.
    """
    total = int(lengths.sum())
    fitting = lengths <= seq
    return dict(
        rows=rows,
        ideal=-(-total // seq),
        waste=1 - total / (rows * seq),
        cut=float(np.mean(pieces > 1)),
        cut_fitting=float(np.mean(pieces[fitting] > 1)) if fitting.any() else 0.0,
        plan_s=plan_s,
        rows_s=rows_s,
    )


def measure_packing(lengths: np.ndarray, seq: int, pack: Callable) -> dict:
    """A packing of ours: its plan, then every row of it as `fill` makes it for `batch(step)`."""
    plan_s, plan = timed(lambda: pack(lengths, seq))
    rows = int(plan[-1, ROW]) + 1
    ids = np.zeros(int(lengths.max()), np.uint16)

    def tokens(document: int) -> np.ndarray:
        return ids[:lengths[document] - 1]

    def make_rows():
        for first in range(0, rows, 256):
            fill(plan, np.arange(first, min(first + 256, rows)), seq, tokens, Bytes())

    fill_s, _ = timed(make_rows)
    pieces = np.bincount(plan[:, DOCUMENT], minlength=len(lengths))
    return packing_figures(lengths, seq, rows, pieces, plan_s, plan_s + fill_s)


def measure_grain(lengths: np.ndarray, seq: int, bins: int) -> dict:
    """grain's BestFitPackIterDataset with so many open bins, or ConcatThenSplitIterDataset with 0.

    The former refuses what is longer than a row, so it gets documents cut as ours are. A document's
    tokens are its number: so the rows say which documents were cut. Timed in a pass that keeps
    nothing.
    """
    import grain
    from grain import experimental

    pieces = []
    for document, length in enumerate(lengths):
        longest = seq if bins else length
        for start in range(0, length, longest):
            size = min(longest, length - start)
            pieces.append({"tokens": np.full(size, document, np.int32)})
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    source = grain.MapDataset.source(pieces).to_iter_dataset(options)
    pack = experimental.ConcatThenSplitIterDataset
    if bins:
        pack = partial(experimental.BestFitPackIterDataset, num_packing_bins=bins)
    packed = pack(source, length_struct={"tokens": seq})
    rows_s, _ = timed(lambda: deque(packed, maxlen=0))
    found = []  # of each row, the documents of its segments
    for row in packed:
        begins = np.diff(row["tokens_segment_ids"], prepend=0) > 0
        found.append(row["tokens"][np.flatnonzero(begins)])
    counts = np.bincount(np.concatenate(found), minlength=len(lengths))
    return packing_figures(lengths, seq, len(found), counts, None, rows_s)


def bench_packings(lengths: np.ndarray, seq: int) -> dict:
    """{packing: its figures}, printed as a table."""
    work = {pack.__name__: partial(measure_packing, pack=pack)
            for pack in (concat_and_split, first_fit, best_fit)}
    if importlib.util.find_spec("grain"):  # not a requirement
        work["grain concat"] = partial(measure_grain, bins=0)
        work["grain best-fit, 64 bins"] = partial(measure_grain, bins=64)
        work["grain best-fit, 1024 bins"] = partial(measure_grain, bins=1024)
    print(f"{len(lengths):,} documents of {lengths.mean():,.0f} positions, rows of {seq:,}")
    print(f"{'':>25}{'rows':>9}{'waste':>10}{'cut':>8}{'of fitting':>12}{'plan s':>8}"
          f"{'with rows s':>13}")
    figures = {}
    for name, measure in work.items():
        figures[name] = found = measure(lengths, seq)
        plan_s = "" if found["plan_s"] is None else f"{found['plan_s']:.2f}"
        print(f"{name:>25}{found['rows']:>9,}{found['waste']:>10.4%}{found['cut']:>8.1%}"
              f"{found['cut_fitting']:>12.1%}{plan_s:>8}{found['rows_s']:>13.2f}", flush=True)
    return figures


# ------------------------------------------------------------------------------ batches, tokenizing


def bench_batches(config: Config, tokenizer, caches: dict, seconds: float) -> dict:
    """Tokens/s of batch(step) in the first phase, plans made, in this one thread."""
    phase = config.phases[0]
    loader = Loader(caches, config.phases, config.data, tokenizer, config.seed)
    loader.batch(1)
    steps = itertools.islice(itertools.cycle(range(1, phase.steps + 1)), 1, None)
    tokens = 0
    begun = time.perf_counter()
    cpu = time.process_time()
    while time.perf_counter() - begun < seconds:
        tokens += loader.batch(next(steps)).arrays["tokens"].size
    figures = dict(
        tokens_per_s=tokens / (time.perf_counter() - begun),
        tokens_per_cpu_s=tokens / (time.process_time() - cpu),
    )
    print(f"batch(step), {phase.batch} x {phase.seq}: {figures['tokens_per_s']:,.0f} tokens/s, "
          f"{figures['tokens_per_cpu_s']:,.0f} a core")
    return figures


def build_anew(config: Config, tokenizer):
    """Build the token caches of a config in a place where there are none."""
    with tempfile.TemporaryDirectory() as place:
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=place):
            for name in config.data.sources:
                build(name, config.data, tokenizer, config.seed)


def bench_tokenizing(config: Config, tokenizer) -> dict:
    """MB/s, best of three in turn: building the cache, raw SentencePiece in one thread and in all.

    share: of raw_core times the cores; share_of_raw: of all threads, where others use cores too.
    """
    texts = []
    for source in config.data.sources.values():
        for document in documents_of(source):
            if isinstance(document, Document) and not SURROGATE.search(document.text):
                texts.append(document.text)
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    cores = os.cpu_count()
    work = {"build": partial(build_anew, config, tokenizer)}
    if isinstance(tokenizer, SentencePiece):
        encode = partial(tokenizer.processor.encode, texts)
        work["raw_core"] = partial(encode, num_threads=1)
        work["raw"] = partial(encode, num_threads=cores)
    taken = {name: [] for name in work}
    for _ in range(3):
        for name in work:
            taken[name].append(timed(work[name])[0])
    figures = dict(megabytes=megabytes, cores=cores)
    for name in work:
        figures[name] = megabytes / min(taken[name])
    if "raw" in work:
        figures["share"] = figures["build"] / figures["raw_core"] / cores
        figures["share_of_raw"] = figures["build"] / figures["raw"]
    print("tokenizing: " + ", ".join(f"{name} {value:,.2f}" for name, value in figures.items()))
    return figures


def training_lengths(caches: dict) -> np.ndarray:
    """Positions of each training document [documents]: its tokens and one more."""
    lengths = []
    for cache in caches.values():
        for number in range(cache.total["shards"]):
            shard = cache.shard(number)
            lengths.append(np.diff(shard.offsets)[shard.split == 0] + 1)
    return np.concatenate(lengths)


def bench(config: Config, seconds: float) -> dict:
    """All that `bench` measures of a config."""
    config, tokenizer, caches = assemble(config)
    return dict(
        packings=bench_packings(training_lengths(caches), config.phases[0].seq),
        batch=bench_batches(config, tokenizer, caches, seconds),
        tokenizing=bench_tokenizing(config, tokenizer),
    )


# ----------------------------------------------------------------------------------------- inspect


def inspect(config: Config, step: int, rows: int):
    """Print rows of batch(step): their documents, and segments in turn in colours, `|` between."""
    run = prepare(config)
    last = run.loader.ends[-1]
    if not 1 <= step <= last:
        raise InputError(f"--step is {step}; allowed are 1 to {last}")
    batch, drawn = run.loader.batch(step), run.loader.drawn(step)
    names = list(run.caches)
    console = Console(soft_wrap=True, highlight=False)
    for number in range(min(rows, len(batch.arrays["tokens"]))):
        row = {key: array[number] for key, array in batch.arrays.items()}
        source = names[row["source"][0]]
        used = int((row["segments"] > 0).sum())
        console.print(
            f"row {number} of step {step}, source {source}: {row['segments'].max()} segments, "
            f"{used} of {len(row['tokens'])} positions, {int(row['weights'].sum())} with loss",
            style="bold")
        made = drawn.row(number)
        paths = [made.document(piece).path for piece in range(made.pieces)]
        console.print(row_text(row, run.tokenizer))
        said = printable(f"pieces of: {', '.join(paths)}")
        console.print(said, style="dim", markup=False)
    console.print(counted(batch), style="bold")


def counted(batch: Batch) -> str:
    """What the metrics of a batch count, in words."""
    of = batch.metrics
    words = [
        f"all {batch.rows} rows of the step: {of['data/waste']:.1%} of the positions are padding",
        f"{of['data/segments']:.3g} pieces of documents a row",
        f"{of['data/truncated']:.1%} of the pieces end before their document does",
    ]
    for name, value in of.items():
        if name.endswith("/rows"):
            source = name.removeprefix("data/").removesuffix("/rows")
            words.append(f"{value:,} rows of {source}")
    return ", ".join(words)


def row_text(row: dict, tokenizer) -> Text:
    """A row's targets in colours, from its arrays [seq]."""
    line = Text()
    for segment in range(1, row["segments"].max() + 1):
        where = np.flatnonzero(row["segments"] == segment)
        changes = np.flatnonzero(np.diff(row["weights"][where])) + 1
        for part in np.split(where, changes):  # either all of it has loss, or none
            style = COLOURS[segment % len(COLOURS)]
            if not row["weights"][part[0]]:
                style = f"dim {style}"
            line.append(printable(tokenizer.decode(row["targets"][part])), style)
        line.append("|", "bold red")
    return line


# ------------------------------------------------------------------------------------------- build


def build_all(config: Config):
    """Build a config's tokenizer and token caches, and say what they hold."""
    config, tokenizer, caches = assemble(config)
    print(f"tokenizer: {tokenizer.vocab} pieces")
    held_out = open_held_out(config, tokenizer, caches)
    of_both = caches | {f"held-out {name}": cache for name, cache in held_out.items()}
    for name, cache in of_both.items():
        total = cache.total
        counts = ", ".join(f"{number:,} {kind}" for kind, number in total["counts"].items())
        print(f"{name}: {total['shards']} shards, {counts}; fingerprint {total['fingerprint']}")
        print(f"  {cache.directory}")


def build_one(config: Config, source: str, parent: int | None):
    """Build one source's token cache; `parent` is a process that this one must not outlive."""
    if source not in config.data.sources:
        raise InputError(f"--only is {source!r}; allowed are {', '.join(config.data.sources)}")
    if parent:
        threading.Thread(target=end_with, args=[parent], daemon=True).start()
    tokenizer = make_tokenizer(config.data, config.model.vocab)
    build(source, config.data, tokenizer, config.seed)


def end_with(parent: int):
    """End this process within a second of its parent, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def arguments_parser() -> Arguments:
    """What the command line takes."""
    parser = Arguments("corpus", __doc__)
    parser.add_argument("what", choices=["build", "tokenizer", "inspect", "bench"])
    parser.add_argument("rest", nargs="*", metavar="CONFIG",
                        help="a config file and --path.to.field VALUE overrides")
    parser.add_argument("--only", metavar="SOURCE", help="build this source's cache alone")
    parser.add_argument("--parent", type=int, metavar="PID",
                        help="with --only: end when this process ends")
    parser.add_argument("--lengths", choices=["lognormal"],
                        help="bench: these in place of a config's")
    parser.add_argument("--step", type=int, default=1, help="inspect: the batch of this step")
    parser.add_argument("--rows", type=int, default=4, help="inspect: so many of its rows")
    parser.add_argument("--seconds", type=float, default=5.0,
                        help="bench: how long to ask for batches")
    return parser


def main(arguments: list[str]):
    """Command line."""
    known, overrides = arguments_parser().parse_known_args(arguments)
    config, _ = parse([*known.rest, *overrides])
    check(config)
    if known.what == "inspect":
        inspect(config, known.step, known.rows)
    elif known.what == "tokenizer":
        tokenizer = make_tokenizer(config.data, config.model.vocab)
        print(f"tokenizer: {tokenizer.vocab} pieces")
    elif known.what == "bench":
        if known.lengths:
            drawn = np.random.default_rng(0).lognormal(6.2, 1.1, 100_000).astype(np.int64) + 1
            result = dict(packings=bench_packings(drawn, 2048))
        else:
            result = bench(config, known.seconds)
        print(json.dumps(result))
        return result
    else:
        config = replace(config, data=replace(config.data, stream=False))
        if known.only:
            build_one(config, known.only, known.parent)
        else:
            build_all(config)
