"""The token cache and the tokenizer of a config, without training; its rows as text; what packing costs.

build: tokenizer and token cache. tokenizer: it alone, trained here if need be. inspect: rows of a batch as
text, a colour for each segment, faint where there is no loss. bench: packings of the training documents, the
speed of batch(step) from the finished cache, and that of tokenizing beside raw SentencePiece; with --lengths
lognormal, packings of 100,000 drawn lengths (mean about 900, rows of 2,048). Where the library `grain` can be
imported, its packings on the same lengths too. The last line of bench is one JSON object.
"""
import heapq
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import sentencepiece
from rich.console import Console
from rich.text import Text

import data
import train


def train_bpe(texts: Iterable[str], vocab: int) -> bytes:
    """Train a BPE model with byte fallback and no normalisation; the same bytes for the same texts. Pieces
    may hold spaces: 4096 give 3.7 bytes a token on the standard library, 3.3 where they stop at spaces."""
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(data.escape(t) for t in texts), model_writer=out, model_type="bpe", unk_id=0,
            bos_id=1, eos_id=2, pad_id=-1, vocab_size=max(vocab, 260), byte_fallback=True,
            add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_by_whitespace=False, allow_whitespace_only_pieces=True, split_by_unicode_script=False,
            character_coverage=0.9995, max_sentence_length=2**30, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        most, least = (re.search(r, str(error)) for r in (r"<= (\d+)", r"required_chars\. \d+ vs (\d+)"))
        problem = "the tokenizer has no text to learn from: the training split is empty"
        if most or least:
            limit = f"can give at most {most[1]}" if most else f"needs at least {least[1]}"
            problem = f"model.vocab is {vocab}, but this corpus {limit} pieces"
        raise data.InputError(problem) from None
    if vocab < 260:
        raise data.InputError(f"model.vocab is {vocab}, but 256 bytes and their like need at least 260 "
                              "pieces")
    return out.getvalue()


def sample(config: data.DataConfig) -> list[str]:
    """Texts for the tokenizer: of each source, those of lowest path hash within its share of `sample_mib`."""
    share, texts = int(config.sample_mib * 2**20 / len(config.sources)), []
    for source in config.sources.values():
        heap, held, seen = [], 0, 0  # by falling hash: the largest hash leaves first
        for number, document in enumerate(source.documents()):
            if isinstance(document, data.Skipped) or data.SURROGATE.search(document.text) \
                    or data.split_of(document.group or document.path, config.dev, config.test):
                continue
            heapq.heappush(heap, (-data.path_hash(document.path), number, document.text))
            held, seen = held + len(document.text), seen + len(document.text)
            while held > share and len(heap) > 1:
                held -= len(heapq.heappop(heap)[2])
            if seen > 64 * share:  # so that a corpus without end has a tokenizer too
                break
        texts += [t[:share] for _, _, t in sorted(heap, reverse=True)]
    return texts


def make_tokenizer(config: data.DataConfig, vocab: int) -> data.Tokenizer:
    """The tokenizer that the config names; a "bpe" one of `vocab` pieces is trained once and cached."""
    if config.tokenizer == "bytes":
        return data.Bytes()
    if config.tokenizer.startswith("hf:"):
        return train.load_file(train.ROOT / "tools/export.py").read_tokenizer(config.tokenizer)
    if config.tokenizer != "bpe":
        return data.load_tokenizer(Path(config.tokenizer).expanduser())
    if vocab <= 0:
        raise data.InputError("model.vocab is 0, but a tokenizer that is to be trained needs a number of "
                              'pieces; set model.vocab, or data.tokenizer to "bytes" or a SentencePiece file')
    key = data.digest([data.FORMAT, "bpe", vocab, config.sample_mib, config.dev, config.test,
                       [[name, data.identity(s.documents)] for name, s in config.sources.items()]])
    path = data.cache_home() / "tokenizers" / f"{key}.model"
    with data.locked(path.with_suffix(".lock")):
        if not path.exists():
            data.write(path, train_bpe(sample(config), vocab))
    return data.load_tokenizer(path)


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
    rows, ids = int(plan[-1, data.ROW]) + 1, np.zeros(int(lengths.max()), np.uint16)
    some = (np.arange(i, min(i + 256, rows)) for i in range(0, rows, 256))
    made = (data.fill(plan, which, seq, lambda d: ids[:lengths[d] - 1], data.Bytes()) for which in some)
    fill_s, _ = timed(lambda: deque(made, maxlen=0))
    pieces = np.bincount(plan[:, data.DOCUMENT], minlength=len(lengths))
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
    mine = train.load_file(train.ROOT / "configs/packing.py")
    work = {p.__name__: partial(ours, pack=p) for p in (data.concat_and_split, mine.first_fit, mine.best_fit)}
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


def batches(config: train.Config, tokenizer, caches: dict, seconds: float) -> dict:
    """Tokens/s of batch(step) in the first phase, plans made, in this one thread."""
    phase = config.phases[0]
    loader = data.Loader(caches, config.phases, config.data, tokenizer, config.seed)
    steps = itertools.islice(itertools.cycle(range(1, phase.steps + 1)), 1, None)
    loader.batch(1)
    count, begun, cpu = 0, time.perf_counter(), time.process_time()
    while (took := time.perf_counter() - begun) < seconds:
        count += loader.batch(next(steps)).arrays["tokens"].size
    out = dict(tokens_per_s=count / took, tokens_per_cpu_s=count / (time.process_time() - cpu))
    print(f"batch(step), {phase.batch} x {phase.seq}: {out['tokens_per_s']:,.0f} tokens/s, "
          f"{out['tokens_per_cpu_s']:,.0f} a core")
    return out


def tokenizing(config: train.Config, tokenizer) -> dict:
    """MB/s, best of three in turn: the cache built anew, and raw SentencePiece in one thread and in all.

    share: of raw_core times the cores; share_of_raw: of all threads, where others use the cores too.
    """
    texts = [d.text for s in config.data.sources.values() for d in s.documents()
             if isinstance(d, data.Document) and not data.SURROGATE.search(d.text)]
    size, cores = sum(len(t.encode("utf-8")) for t in texts) / 1e6, os.cpu_count()

    def build():
        with tempfile.TemporaryDirectory() as place, mock.patch.dict(os.environ, XDG_CACHE_HOME=place):
            return [data.build(name, config.data, tokenizer, config.seed) for name in config.data.sources]

    work = dict(build=build)
    if isinstance(tokenizer, data.SentencePiece):
        encode = tokenizer.processor.encode
        work |= dict(raw_core=lambda: encode(texts, num_threads=1),
                     raw=lambda: encode(texts, num_threads=cores))
    taken = [{name: timed(w)[0] for name, w in work.items()} for _ in range(3)]
    out = dict(megabytes=size, cores=cores) | {name: size / min(t[name] for t in taken) for name in work}
    if "raw" in work:
        out |= dict(share=out["build"] / out["raw_core"] / cores, share_of_raw=out["build"] / out["raw"])
    print("tokenizing: " + ", ".join(f"{k} {v:,.2f}" for k, v in out.items()))
    return out


def bench(config: train.Config, seconds: float) -> dict:
    """All that `bench` measures of a config."""
    config, tokenizer, caches = train.assemble(config)
    shards = [c.shard(i) for c in caches.values() for i in range(c.total["shards"])]
    lengths = np.concatenate([np.diff(s.offsets)[s.split == 0] + 1 for s in shards])
    return dict(packings=packings(lengths, config.phases[0].seq),
                batch=batches(config, tokenizer, caches, seconds), tokenizing=tokenizing(config, tokenizer))


def inspect(config: train.Config, step: int, rows: int):
    """Print rows of batch(step): its segments in turn in different colours, `|` between them."""
    run = train.Run(config)
    tokenizer, caches, loader = run.tokenizer, run.caches, run.loader
    if not 1 <= step <= loader.ends[-1]:
        raise data.InputError(f"--step is {step}; allowed are 1 to {loader.ends[-1]}")
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


def open_caches(config: train.Config, tokenizer: data.Tokenizer) -> dict[str, data.Cache]:
    """The token cache of each source: built, or if `data.stream` left to a process of its own."""
    d, caches = config.data, {}
    if not d.stream:
        return {name: data.build(name, d, tokenizer, config.seed) for name in d.sources}
    for name in d.sources:
        place = data.place(name, d, tokenizer, config.seed)
        caches[name] = data.Cache(place, name, None if (place / "complete").exists() else
                                  spawn(config, name, place))
    return caches


def spawn(config: train.Config, name: str, place: Path) -> tuple[subprocess.Popen, Path]:
    """(process, log): a source's token cache being built at `place`, for as long as this process lives."""
    file, log = place.with_suffix(".json"), place.with_suffix(".log")
    data.write(file, json.dumps(train.to_json(config)))
    command = [sys.executable, train.ROOT / "train.py", "corpus", "build", file, "--only", name,
               "--parent", str(os.getpid())]
    with open(log, "w") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
    return process, log


def end_with(parent: int):
    """End this process within a second of its parent, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(arguments: list[str]):
    """Command line."""
    parser = train.Arguments("corpus", __doc__)
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
    config, _ = train.parse([*known.rest, *overrides])
    train.check(config)
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
        raise data.InputError(f"--only is {known.only!r}; allowed are {', '.join(config.data.sources)}")
    if known.only:
        if known.parent:
            threading.Thread(target=end_with, args=[known.parent], daemon=True).start()
        tokenizer = make_tokenizer(config.data, config.model.vocab)
        data.build(known.only, config.data, tokenizer, config.seed)
        return
    config, tokenizer, caches = train.assemble(config)
    print(f"tokenizer: {tokenizer.vocab} pieces")
    for name, cache in caches.items():
        counts = ", ".join(f"{v:,} {k}" for k, v in cache.total["counts"].items())
        print(f"{name}: {cache.total['shards']} shards, {counts}; fingerprint {cache.total['fingerprint']}")
        print(f"  {cache.directory}")
