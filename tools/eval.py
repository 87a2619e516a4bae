"""Held-out bits per byte of a checkpoint, beside gzip and xz; minimal pairs, tasks; writes RUN/eval.json.

    python train.py eval RUN --blimp DIR --tasks quiz.jsonl more/

The evaluations during a run use `measure` from here as well, and a config can have its `evals` do the rest:
`evals=(partial(tasks, path="quiz.jsonl"), partial(blimp, path="blimp/"))`.

A task is a file of lines {"context": text, "choices": [texts], "answer": index or text} or {"context": text,
"completion": text}; "query" and "prompt" are other names of the context, "gold" of the answer. Metrics are
`task/<file>/<metric>`, each with its standard error `_se`:

    acc         the likeliest choice is the answer
    acc_norm    so too, of log-likelihoods divided by the choice's characters; acc_bytes: by its UTF-8 bytes
    exact       the completion is what one gets by taking the likeliest piece each time
    loglikelihood, perplexity, bpb    of the completion, in nats, exp of their mean's negative, bits per byte

All of that is as lm-evaluation-harness 0.4.13 has it, so that an exported model gets the same scores there: a
choice comes after its context and a `--delimiter` (a space there too), which is none of its characters; a
completion comes as it is; neither is followed by the document's end; bos comes first. The context and all of
it are encoded, without the context's last spaces, and of the latter the pieces beyond the number of the
former are the continuation. Contexts are cut on the left to what a row of the last phase holds. Minimal
pairs are sentences alone after bos (the harness puts its delimiter in front, a space that was not there).
"""
import gzip
import inspect
import json
import lzma
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
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


def measure(losses: Callable, caches: dict, split: str, config: train.Config, phase: train.Phase,
            tokenizer: data.Tokenizer, most: int | None = None) -> tuple[dict, dict[str, HeldOut]]:
    """({source: figures of `bits_per_byte`}, {source: documents}) on a split, by rows like a phase's.

    losses: arrays -> nats [b, t]. A streamed source is measured on the first window's documents.
    """
    shards = config.data.window if config.data.stream else None
    held = {name: held_out(cache, split, tokenizer, phase.seq, phase.batch, config.overlap, most, shards)
            for name, cache in caches.items()}
    return {name: bits_per_byte(losses, h) for name, h in held.items() if h.paths}, held


def spread(scores: Callable, step: int, mesh) -> Callable:
    """`apply` as an `evals` gets it: (params, ids [b t]) -> logits [b t v], rows spread over a mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def apply(params, ids):
        ids = np.asarray(ids, np.int32)
        rows = np.pad(ids, ((0, -len(ids) % parts), (0, 0)))
        return scores(params, step, model.put(dict(tokens=rows), mesh)["tokens"])[:len(ids)]

    return apply


def own(config: train.Config, tokenizer: data.Tokenizer, params, apply: Callable) -> dict[str, float]:
    """What a config's own `evals` measure; they get `tokenizer` and `config` too, where they take these."""
    row, given = {}, dict(tokenizer=tokenizer, config=config)
    for function in config.evals:
        takes = inspect.signature(function).parameters
        row |= function(params, apply, **{name: given[name] for name in given if name in takes})
    return row


def during(run: train.Run, step: int, losses: Callable, scores: Callable) -> dict[str, float]:
    """{metric: value} of a run as it stands, on the fixed subset of dev and by its config's own `evals`.

    losses, scores: of `model.evaluators`.
    """
    config, params, row = replace(run.config, model=run.shape), run.state.params, {}
    if config.data.dev:
        found, _ = measure(partial(losses, params, run.state.step), run.caches, "dev", config,
                           config.phases[run.loader.phase_of(step)], run.tokenizer, config.eval_tokens)
        row = {f"eval/{name}/{k}": v for name, of in found.items() for k, v in of.items()}
    return row | own(config, run.tokenizer, params, spread(scores, run.state.step, run.mesh))


def compressed(texts: list[bytes]) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 need for texts, each compressed alone."""
    def xz(text: bytes) -> bytes:
        """With no more of a window than there is text: the same bytes in a tenth of the time."""
        window = max(2**12, min(len(text), 2**26))
        return lzma.compress(text, filters=[dict(id=lzma.FILTER_LZMA2, preset=9, dict_size=window)])

    bits = {"gzip_bpb": lambda t: 8 * len(gzip.compress(t, 9)), "xz_bpb": lambda t: 8 * len(xz(t))}
    return {name: sum(map(size, texts)) / sum(map(len, texts)) for name, size in bits.items()}


# ------------------------------------------------------------------------------------ minimal pairs and tasks

def jsonl(path: str | Path) -> dict[str, list[tuple[str, dict]]]:
    """{file's stem: [(file and line, object)]} of a JSON Lines file, or of those in a directory."""
    path = Path(path).expanduser()
    files, out = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] * path.is_file(), {}
    if not files:
        raise data.InputError(f"{str(path)!r} is no file of JSON Lines, and no directory of .jsonl files")
    for file in files:
        rows = out[file.stem] = []
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            where = f"{file}, line {number}"
            try:
                rows += [(where, json.loads(line))] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise data.InputError(f"{where}: broken JSON ({error})") from None
            if rows and not isinstance(rows[-1][1], dict):
                raise data.InputError(f"{where}: {line[:40].decode('utf-8', 'replace')} is no JSON object")
        if not rows:
            raise data.InputError(f"{file} has no line with anything on it")
    return out


def written(where: str, record: dict, *keys: str, empty: bool = False) -> str:
    """The text that a record has under the first of `keys` that is there."""
    found = next((record[key] for key in keys if key in record), None)
    if not isinstance(found, str) or data.SURROGATE.search(found) or not (found or empty):
        raise data.InputError(f"{where}: {' or '.join(keys)} is {found!r}; allowed is a text" + (
            "" if empty else " that is not empty"))
    return found


@jax.jit
def judge(logits, targets):
    """Nats [b t] of targets under logits [b t v], and where they are the likeliest piece."""
    return model.nll(logits, targets), jnp.argmax(logits, -1) == targets


def judged(params, apply: Callable, tokenizer: data.Tokenizer, pairs: list[tuple[list[int], list[int]]],
           seq: int) -> tuple[np.ndarray, np.ndarray]:
    """(nats [n], is each of its pieces the likeliest [n]) of continuations after contexts, both ids.

    A row each, padded to a power of two; contexts are cut on the left to `seq` inputs. Logits of a batch
    take 256 MiB at most, or are of one row.
    """
    ids = [np.array([*before, *rest], np.int32)[-max(seq, len(rest)) - 1:] for before, rest in pairs]
    size = np.array([max(16, 1 << (len(x) - 2).bit_length()) for x in ids])
    nats, greedy = np.zeros(len(ids)), np.zeros(len(ids), bool)
    for t in np.unique(size).tolist():
        which = np.flatnonzero(size == t)
        rows = max(1, min(64, 1 << (len(which) - 1).bit_length(), 2**26 // (t * tokenizer.vocab)))
        for start in range(0, len(which), rows):
            here = which[start:start + rows]
            tokens, counted = np.full((rows, t + 1), tokenizer.eos, np.int32), np.zeros((rows, t), bool)
            for row, i in enumerate(here):
                tokens[row, :len(ids[i])] = ids[i]
                counted[row, len(ids[i]) - 1 - len(pairs[i][1]):len(ids[i]) - 1] = True
            each, likeliest = map(np.asarray, judge(apply(params, tokens[:, :-1]), tokens[:, 1:]))
            nats[here] = np.where(counted, each, 0).sum(1, dtype=np.float64)[:len(here)]
            greedy[here] = (likeliest | ~counted).all(1)[:len(here)]
    return nats, greedy


def mean(name: str, values) -> dict[str, float]:
    """`name`: the mean of values [n], and its standard error."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_se": float(error)}


def share(name: str, right: np.ndarray) -> dict[str, float]:
    """`name`: how many of right [n] are true, its standard error, and `_low` and `_high` of Wilson's (1927)
    95 % interval, which stays within 0 and 1 and is not empty at these.
    """
    found, n, z = mean(name, right), len(right), 1.96
    middle = found[name] + z * z / (2 * n)
    half = z * math.sqrt(found[name] * (1 - found[name]) / n + (z / (2 * n)) ** 2)
    return found | {f"{name}_low": (middle - half) / (1 + z * z / n),
                    f"{name}_high": (middle + half) / (1 + z * z / n)}


def minimal_pairs(params, apply: Callable, tokenizer: data.Tokenizer, path: str) -> dict[str, float]:
    """How often the good sentence of BLiMP's pairs is the likelier: `blimp/<paradigm>` for each file, their
    mean `blimp`, and `blimp_pairs` of all pairs alike. Each is a `share`, but that the interval of the mean
    is made of those of the paradigms (Zou & Donner 2008).
    """
    files, out = jsonl(path), {}
    texts = [written(where, record, key) for rows in files.values() for where, record in rows
             for key in ("sentence_good", "sentence_bad")]
    pairs = [([tokenizer.bos], tokenizer.encode(text)) for text in texts]
    nats, _ = judged(params, apply, tokenizer, pairs, 0)
    right, ends = nats[::2] < nats[1::2], np.cumsum([len(rows) for rows in files.values()])
    for name, part in zip(files, np.split(right, ends[:-1]), strict=True):
        out |= share(f"blimp/{name}", part)
    each, se, low, high = (np.array([out[f"blimp/{name}{end}"] for name in files])
                           for end in ("", "_se", "_low", "_high"))
    error, below, above = (float(np.linalg.norm(x)) / len(files) for x in (se, each - low, high - each))
    middle = float(each.mean())
    return out | dict(blimp=middle, blimp_se=error, blimp_low=middle - below, blimp_high=middle + above) | \
        share("blimp_pairs", right)


def blimp(params, apply: Callable, tokenizer: data.Tokenizer, path: str) -> dict[str, float]:
    """An `evals`: the mean of `minimal_pairs` over paradigms, and its standard error."""
    found = minimal_pairs(params, apply, tokenizer, path)
    return {name: found[name] for name in ("blimp", "blimp_se")}


class Item(NamedTuple):
    """A line of a task."""

    texts: list[str]  # choices, or the one completion
    answer: int | None  # which choice is right; None: a completion
    pairs: list[tuple[list[int], list[int]]]  # ids of the context and of each text


def encode(tokenizer: data.Tokenizer, context: str, rest: str) -> tuple[list[int], list[int]]:
    """Ids of a context, bos included, and of what comes after it; see above for where one ends."""
    whole, context = context + rest, context.rstrip()
    before = tokenizer.encode(context)
    return [tokenizer.bos, *before], tokenizer.encode(whole)[len(before):]


def item(where: str, record: dict, tokenizer: data.Tokenizer, delimiter: str) -> Item:
    """A task's line, read and encoded."""
    context, answer = written(where, record, "context", "query", "prompt", empty=True), None
    if "completion" in record:
        texts, delimiter = [written(where, record, "completion")], ""
    else:
        texts = record.get("choices")
        if not isinstance(texts, list) or len(texts) < 2:
            raise data.InputError(f"{where}: choices is {texts!r}; allowed is a list of two texts and more, "
                                  "or a completion in their place")
        texts = [written(f"{where}, choice {i}", dict(text=text), "text") for i, text in enumerate(texts)]
        answer = record.get("answer", record.get("gold"))
        answer = texts.index(answer) if answer in texts else answer
        if type(answer) is not int or not 0 <= answer < len(texts):
            raise data.InputError(f"{where}: answer (or gold) is {answer!r}; allowed is one of the choices, "
                                  f"or its index, 0 to {len(texts) - 1}")
    pairs = [encode(tokenizer, context, delimiter + text) for text in texts]
    if not all(rest for _, rest in pairs):
        raise data.InputError(f"{where}: what comes after the context adds no piece to it")
    return Item(texts, answer, pairs)


def figures(items: list[Item], nats: np.ndarray, greedy: np.ndarray) -> dict[str, float]:
    """{metric: value} of a task, see above; nats, greedy: of all its texts in turn."""
    if items[0].answer is None:
        found = mean("exact", greedy) | mean("loglikelihood", -nats)
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(nats.mean()))
        return found | dict(perplexity=perplexity, perplexity_se=perplexity * found["loglikelihood_se"]) | \
            per_byte(nats, np.array([len(i.texts[0].encode()) for i in items]))
    each = np.split(-nats, np.cumsum([len(i.texts) for i in items])[:-1])
    by = dict(acc=lambda text: 1, acc_norm=len, acc_bytes=lambda text: len(text.encode()))
    return {k: v for name, length in by.items() for k, v in mean(name, [
        np.argmax(scores / [length(text) for text in i.texts]) == i.answer
        for i, scores in zip(items, each, strict=True)]).items()}


def tasks(params, apply: Callable, tokenizer: data.Tokenizer, config: train.Config, path: str,
          delimiter: str = " ") -> dict[str, float]:
    """An `evals`: {task/<file>/<metric>: value} of a file of tasks, or of a directory of them."""
    out = {}
    for name, rows in jsonl(path).items():
        items = [item(where, record, tokenizer, delimiter) for where, record in rows]
        for (where, _), one in zip(rows, items, strict=True):
            if (one.answer is None) != (items[0].answer is None):
                raise data.InputError(f"{where}: choices and completions are in one file; give each its own")
        pairs = [pair for one in items for pair in one.pairs]
        found = figures(items, *judged(params, apply, tokenizer, pairs, config.phases[-1].seq))
        out |= {f"task/{name}/{metric}": value for metric, value in found.items()}
    return out


# ------------------------------------------------------------------------------------------- the command line

def mesh_here(config: train.Config):
    """The run's mesh where that fits the devices here, else all of them for rows."""
    try:
        mesh = model.make_mesh(config.mesh)
        model.shardings(config.model, mesh)
    except ValueError:
        return model.make_mesh(model.MeshConfig())
    return mesh


def test_split(config: train.Config, tokenizer: data.Tokenizer, losses: Callable, mesh) -> dict:
    """What is known of the test split, printed too; losses: arrays -> [b t]."""
    parts, phase = mesh.shape["data"] * mesh.shape["fsdp"], config.phases[-1]
    phase = replace(phase, batch=-(-phase.batch // parts) * parts)
    caches = train.load_file(train.ROOT / "tools/corpus.py").open_caches(config, tokenizer)
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


def show(found: dict[str, float]):
    """Print figures, a line each, with their intervals or standard errors."""
    for name, value in found.items():
        if f"{name}_low" in found:
            print(f"{name}: {value:.3f} [{found[f'{name}_low']:.3f}, {found[f'{name}_high']:.3f}]")
        elif not name.endswith(("_se", "_low", "_high")):
            error = f" +- {found[f'{name}_se']:.2g}" if f"{name}_se" in found else ""
            print(f"{name}: {value:.4g}{error}")


def main(arguments: list[str]) -> dict:
    """Command line; gives what eval.json holds."""
    parser = train.Arguments("eval", __doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--blimp", help="directory of BLiMP paradigms, a .jsonl file each")
    parser.add_argument("--tasks", nargs="+", action="extend", default=[], help=".jsonl files, directories")
    parser.add_argument("--delimiter", default=" ", help="between a context and a choice; a space by default")
    parser.add_argument("--step", type=int, help="checkpoint; the newest by default")
    a = parser.parse_args(arguments)
    found = [jsonl(path) for path in [*a.tasks, a.blimp] if path]  # what is wrong there is said at once
    names = [name for files in found[:len(a.tasks)] for name in files]
    if len(set(names)) < len(names):
        parser.error(f"--tasks has files {', '.join(names)}; allowed are names that differ")
    step = train.find(a.run, a.step)[1]
    params, config, tokenizer, _ = train.load(a.run, step)
    mesh = params["embed"].sharding.mesh if jax.process_count() > 1 else mesh_here(config)
    params = jax.device_put(params, model.shardings(config.model, mesh))
    losses, scores = model.evaluators(config, config.model, mesh)
    result = test_split(config, tokenizer, partial(losses, params, step), mesh) if config.data.test else {}
    apply = spread(scores, step, mesh)
    found = own(config, tokenizer, params, apply)
    found |= minimal_pairs(params, apply, tokenizer, a.blimp) if a.blimp else {}
    for path in a.tasks:
        found |= tasks(params, apply, tokenizer, config, path, a.delimiter)
    show(found)
    result |= found
    if train.leads():
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        data.write(Path(a.run) / "eval.json", json.dumps(finite, indent=1))
    return result
