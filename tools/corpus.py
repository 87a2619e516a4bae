"""The token cache and the tokenizer of a config, without training; its rows as text; what packing costs.

build: tokenizer and token cache. tokenizer: it alone, trained here if need be. inspect: rows of a batch as
text, a colour for each segment, faint where there is no loss. bench: packings of the training documents, the
speed of batch(step) from the finished cache, and that of tokenizing beside raw SentencePiece; with --lengths
lognormal, packings of 100,000 drawn lengths (mean about 900, rows of 2,048). Where the library `grain` can be
imported, its packings on the same lengths too. The last line of bench is one JSON object.
"""
import importlib.util
import itertools
import json
import os
import tempfile
import threading
import time
from collections import deque
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
from rich.console import Console
from rich.text import Text

from data import Loader
from lib import cache
from lib.arguments import Arguments
from lib.cache import build
from lib.errors import InputError
from lib.packing import DOCUMENT, ROW, best_fit, concat_and_split, fill, first_fit
from lib.sources import SURROGATE, Document
from lib.tokenizers import Bytes, SentencePiece, make_tokenizer
from train import Config, assemble, check, parse, prepare


def timed(work) -> tuple[float, object]:
    """(seconds, result) of a function."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def figures(lengths: np.ndarray, seq: int, rows: int, pieces: np.ndarray, plan_s, rows_s) -> dict:
    """What a packing did. cut: share of documents in several pieces; cut_fitting: of those that fit a row;
    plan_s: seconds to plan; rows_s: seconds to plan and to make all rows.
    """
    total, fitting = int(lengths.sum()), lengths <= seq
    share = float(np.mean(pieces[fitting] > 1)) if fitting.any() else 0.0
    return dict(rows=rows, ideal=-(-total // seq), waste=1 - total / (rows * seq),
                cut=float(np.mean(pieces > 1)), cut_fitting=share, plan_s=plan_s, rows_s=rows_s)


def ours(lengths: np.ndarray, seq: int, pack) -> dict:
    """A packing of ours: plan, then every row of it as `data.fill` makes it for `batch(step)`."""
    plan_s, plan = timed(lambda: pack(lengths, seq))
    rows, ids = int(plan[-1, ROW]) + 1, np.zeros(int(lengths.max()), np.uint16)
    some = (np.arange(i, min(i + 256, rows)) for i in range(0, rows, 256))
    made = (fill(plan, which, seq, lambda d: ids[:lengths[d] - 1], Bytes()) for which in some)
    fill_s, _ = timed(lambda: deque(made, maxlen=0))
    pieces = np.bincount(plan[:, DOCUMENT], minlength=len(lengths))
    return figures(lengths, seq, rows, pieces, plan_s, plan_s + fill_s)


def theirs(lengths: np.ndarray, seq: int, bins: int) -> dict:
    """grain's BestFitPackIterDataset with so many open bins, or ConcatThenSplitIterDataset with 0.

    The former refuses what is longer than a row, so it gets documents cut as ours are. A document's tokens
    are its number: so the rows say which documents were cut. Timed in a pass that keeps nothing.
    """
    import grain
    from grain import experimental

    tokens, ends = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), np.cumsum(lengths)
    pieces = [{"tokens": tokens[i:min(i + (seq if bins else n), end)]}
              for n, end in zip(lengths, ends, strict=True) for i in range(end - n, end, seq if bins else n)]
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    source = grain.MapDataset.source(pieces).to_iter_dataset(options)
    pack = partial(experimental.BestFitPackIterDataset, num_packing_bins=bins) if bins \
        else experimental.ConcatThenSplitIterDataset
    packed = pack(source, length_struct={"tokens": seq})
    rows_s, _ = timed(lambda: deque(packed, maxlen=0))
    found = [r["tokens"][np.flatnonzero(np.diff(r["tokens_segment_ids"], prepend=0) > 0)] for r in packed]
    pieces = np.bincount(np.concatenate(found), minlength=len(lengths))
    return figures(lengths, seq, len(found), pieces, None, rows_s)


def packings(lengths: np.ndarray, seq: int) -> dict:
    """Figures of each packing, printed as a table."""
    work = {p.__name__: partial(ours, pack=p) for p in (concat_and_split, first_fit, best_fit)}
    if importlib.util.find_spec("grain"):  # not a requirement
        work |= {"grain concat": partial(theirs, bins=0), "grain best-fit, 64 bins": partial(theirs, bins=64),
                 "grain best-fit, 1024 bins": partial(theirs, bins=1024)}
    print(f"{len(lengths):,} documents of {lengths.mean():,.0f} positions, rows of {seq:,}\n{'':>25}"
          f"{'rows':>9}{'waste':>10}{'cut':>8}{'of fitting':>12}{'plan s':>8}{'with rows s':>13}")
    out = {}
    for name, measure in work.items():
        out[name] = f = measure(lengths, seq)
        plan_s = "" if f["plan_s"] is None else f"{f['plan_s']:.2f}"
        print(f"{name:>25}{f['rows']:>9,}{f['waste']:>10.4%}{f['cut']:>8.1%}{f['cut_fitting']:>12.1%}"
              f"{plan_s:>8}{f['rows_s']:>13.2f}", flush=True)
    return out


def batches(config: Config, tokenizer, caches: dict, seconds: float) -> dict:
    """Tokens/s of batch(step) in the first phase, plans made, in this one thread."""
    phase = config.phases[0]
    loader = Loader(caches, config.phases, config.data, tokenizer, config.seed)
    steps = itertools.islice(itertools.cycle(range(1, phase.steps + 1)), 1, None)
    loader.batch(1)
    count, begun, cpu = 0, time.perf_counter(), time.process_time()
    while (took := time.perf_counter() - begun) < seconds:
        count += loader.batch(next(steps)).arrays["tokens"].size
    out = dict(tokens_per_s=count / took, tokens_per_cpu_s=count / (time.process_time() - cpu))
    print(f"batch(step), {phase.batch} x {phase.seq}: {out['tokens_per_s']:,.0f} tokens/s, "
          f"{out['tokens_per_cpu_s']:,.0f} a core")
    return out


def tokenizing(config: Config, tokenizer) -> dict:
    """MB/s, best of three in turn: the cache built anew, and raw SentencePiece in one thread and in all.

    share: of raw_core times the cores; share_of_raw: of all threads, where others use the cores too.
    """
    texts = [d.text for s in config.data.sources.values() for d in s.documents()
             if isinstance(d, Document) and not SURROGATE.search(d.text)]
    size, cores = sum(len(t.encode("utf-8")) for t in texts) / 1e6, os.cpu_count()

    def build():
        with tempfile.TemporaryDirectory() as place, mock.patch.dict(os.environ, XDG_CACHE_HOME=place):
            return [cache.build(name, config.data, tokenizer, config.seed) for name in config.data.sources]

    work = dict(build=build)
    if isinstance(tokenizer, SentencePiece):
        encode = tokenizer.processor.encode
        work |= dict(raw_core=lambda: encode(texts, num_threads=1),
                     raw=lambda: encode(texts, num_threads=cores))
    taken = [{name: timed(w)[0] for name, w in work.items()} for _ in range(3)]
    out = dict(megabytes=size, cores=cores) | {name: size / min(t[name] for t in taken) for name in work}
    if "raw" in work:
        out |= dict(share=out["build"] / out["raw_core"] / cores, share_of_raw=out["build"] / out["raw"])
    print("tokenizing: " + ", ".join(f"{k} {v:,.2f}" for k, v in out.items()))
    return out


def bench(config: Config, seconds: float) -> dict:
    """All that `bench` measures of a config."""
    config, tokenizer, caches = assemble(config)
    shards = [c.shard(i) for c in caches.values() for i in range(c.total["shards"])]
    lengths = np.concatenate([np.diff(s.offsets)[s.split == 0] + 1 for s in shards])
    return dict(packings=packings(lengths, config.phases[0].seq),
                batch=batches(config, tokenizer, caches, seconds), tokenizing=tokenizing(config, tokenizer))


def inspect(config: Config, step: int, rows: int):
    """Print rows of batch(step): its segments in turn in different colours, `|` between them."""
    run = prepare(config)
    tokenizer, caches, loader = run.tokenizer, run.caches, run.loader
    if not 1 <= step <= loader.ends[-1]:
        raise InputError(f"--step is {step}; allowed are 1 to {loader.ends[-1]}")
    batch, console = loader.batch(step), Console(soft_wrap=True, highlight=False)
    for r in range(min(rows, len(batch.arrays["tokens"]))):
        row = {k: v[r] for k, v in batch.arrays.items()}
        line = Text()
        for segment in range(1, row["segments"].max() + 1):
            where = np.flatnonzero(row["segments"] == segment)
            colour = ("cyan", "yellow", "green", "magenta")[segment % 4]
            for loud in np.split(where, np.flatnonzero(np.diff(row["weights"][where])) + 1):
                faint = "" if row["weights"][loud[0]] else "dim "
                line.append(tokenizer.decode(row["targets"][loud]), faint + colour)
            line.append("|", "bold red")
        used, name = int((row["segments"] > 0).sum()), list(caches)[row["source"][0]]
        console.print(f"row {r} of step {step}, source {name}: {row['segments'].max()} segments, "
                      f"{used} of {len(row['tokens'])} positions, {int(row['weights'].sum())} with loss",
                      style="bold")
        console.print(line)
    console.print(", ".join(f"{k} {v:.4g}" for k, v in batch.metrics.items()), style="bold")


def end_with(parent: int):
    """End this process within a second of its parent, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(arguments: list[str]):
    """Command line."""
    parser = Arguments("corpus", __doc__)
    parser.add_argument("what", choices=["build", "tokenizer", "inspect", "bench"])
    parser.add_argument("rest", nargs="*", metavar="CONFIG",
                        help="a config file and --path.to.field VALUE overrides")
    parser.add_argument("--only", metavar="SOURCE", help="build this source's cache alone")
    parser.add_argument("--parent", type=int, metavar="PID", help="with --only: end when this process ends")
    parser.add_argument("--lengths", choices=["lognormal"], help="bench: these in place of a config's")
    parser.add_argument("--step", type=int, default=1, help="inspect: the batch of this step")
    parser.add_argument("--rows", type=int, default=4, help="inspect: so many of its rows")
    parser.add_argument("--seconds", type=float, default=5.0, help="bench: how long to ask for batches")
    known, overrides = parser.parse_known_args(arguments)
    config, _ = parse([*known.rest, *overrides])
    check(config)
    if known.what == "inspect":
        return inspect(config, known.step, known.rows)
    if known.what == "bench":
        drawn = np.random.default_rng(0).lognormal(6.2, 1.1, 100_000).astype(np.int64) + 1
        result = dict(packings=packings(drawn, 2048)) if known.lengths else bench(config, known.seconds)
        print(json.dumps(result))
        return result
    if known.what == "tokenizer":
        tokenizer = make_tokenizer(config.data, config.model.vocab)
        print(f"tokenizer: {tokenizer.vocab} pieces")
        return
    config = replace(config, data=replace(config.data, stream=False))
    if known.only and known.only not in config.data.sources:
        raise InputError(f"--only is {known.only!r}; allowed are {', '.join(config.data.sources)}")
    if known.only:
        if known.parent:
            threading.Thread(target=end_with, args=[known.parent], daemon=True).start()
        tokenizer = make_tokenizer(config.data, config.model.vocab)
        build(known.only, config.data, tokenizer, config.seed)
        return
    config, tokenizer, caches = assemble(config)
    print(f"tokenizer: {tokenizer.vocab} pieces")
    for name, one in caches.items():
        counts = ", ".join(f"{v:,} {k}" for k, v in one.total["counts"].items())
        print(f"{name}: {one.total['shards']} shards, {counts}; fingerprint {one.total['fingerprint']}")
        print(f"  {one.directory}")
