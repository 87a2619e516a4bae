"""Minimal pairs and tasks, scored as lm-evaluation-harness scores them."""
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib.errors import InputError
from lib.evaluate import per_byte
from lib.kernels import nll
from lib.sources import SURROGATE
from lib.tokenizers import Tokenizer


def json_lines(path: str | Path) -> dict[str, list[tuple[str, dict]]]:
    """{file's stem: [(file and line, object)]} of a JSON Lines file, or of those in a directory."""
    path = Path(path).expanduser()
    files, out = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] * path.is_file(), {}
    if not files:
        raise InputError(f"{str(path)!r} is no file of JSON Lines, and no directory of .jsonl files")
    for file in files:
        rows = out[file.stem] = []
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            where = f"{file}, line {number}"
            try:
                rows += [(where, json.loads(line))] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: broken JSON ({error})") from None
            if rows and not isinstance(rows[-1][1], dict):
                raise InputError(f"{where}: {line[:40].decode('utf-8', 'replace')} is no JSON object")
        if not rows:
            raise InputError(f"{file} has no line with anything on it")
    return out


def written(where: str, record: dict, *keys: str, empty: bool = False) -> str:
    """The text that a record has under the first of `keys` that is there."""
    found = next((record[key] for key in keys if key in record), None)
    if not isinstance(found, str) or SURROGATE.search(found) or not (found or empty):
        raise InputError(f"{where}: {' or '.join(keys)} is {found!r}; allowed is a text" + (
            "" if empty else " that is not empty"))
    return found


@jax.jit
def judge(logits, targets):
    """Nats [b t] of targets under logits [b t v], and where they are the likeliest piece."""
    return nll(logits, targets), jnp.argmax(logits, -1) == targets


def judged(params, apply: Callable, tokenizer: Tokenizer, pairs: list[tuple[list[int], list[int]]],
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


def proportion(name: str, right: np.ndarray) -> dict[str, float]:
    """`name`: how many of right [n] are true, its standard error, and `_low` and `_high` of Wilson's (1927)
    95 % interval, which stays within 0 and 1 and is not empty at these.
    """
    found, n, z = mean(name, right), len(right), 1.96
    middle = found[name] + z * z / (2 * n)
    half = z * math.sqrt(found[name] * (1 - found[name]) / n + (z / (2 * n)) ** 2)
    return found | {f"{name}_low": (middle - half) / (1 + z * z / n),
                    f"{name}_high": (middle + half) / (1 + z * z / n)}


def minimal_pairs(params, apply: Callable, tokenizer: Tokenizer, path: str) -> dict[str, float]:
    """How often the good sentence of BLiMP's pairs is the likelier: `blimp/<paradigm>` for each file, their
    mean `blimp`, and `blimp_pairs` of all pairs alike. Each is a `share`, but that the interval of the mean
    is made of those of the paradigms (Zou & Donner 2008).
    """
    files, out = json_lines(path), {}
    texts = [written(where, record, key) for rows in files.values() for where, record in rows
             for key in ("sentence_good", "sentence_bad")]
    pairs = [([tokenizer.bos], tokenizer.encode(text)) for text in texts]
    nats, _ = judged(params, apply, tokenizer, pairs, 0)
    right, ends = nats[::2] < nats[1::2], np.cumsum([len(rows) for rows in files.values()])
    for name, part in zip(files, np.split(right, ends[:-1]), strict=True):
        out |= proportion(f"blimp/{name}", part)
    each, se, low, high = (np.array([out[f"blimp/{name}{end}"] for name in files])
                           for end in ("", "_se", "_low", "_high"))
    error, below, above = (float(np.linalg.norm(x)) / len(files) for x in (se, each - low, high - each))
    middle = float(each.mean())
    return out | dict(blimp=middle, blimp_se=error, blimp_low=middle - below, blimp_high=middle + above) | \
        proportion("blimp_pairs", right)


def blimp(params, apply: Callable, tokenizer: Tokenizer, path: str) -> dict[str, float]:
    """An `evals`: the mean of `minimal_pairs` over paradigms, and its standard error."""
    found = minimal_pairs(params, apply, tokenizer, path)
    return {name: found[name] for name in ("blimp", "blimp_se")}


class Item(NamedTuple):
    """A line of a task."""

    texts: list[str]  # choices, or the one completion
    answer: int | None  # which choice is right; None: a completion
    pairs: list[tuple[list[int], list[int]]]  # ids of the context and of each text


def encode_pair(tokenizer: Tokenizer, context: str, rest: str) -> tuple[list[int], list[int]]:
    """Ids of a context, bos included, and of what comes after it; see above for where one ends."""
    whole, context = context + rest, context.rstrip()
    before = tokenizer.encode(context)
    return [tokenizer.bos, *before], tokenizer.encode(whole)[len(before):]


def read_item(where: str, record: dict, tokenizer: Tokenizer, delimiter: str) -> Item:
    """A task's line, read and encoded."""
    context, answer = written(where, record, "context", "query", "prompt", empty=True), None
    if "completion" in record:
        texts, delimiter = [written(where, record, "completion")], ""
    else:
        texts = record.get("choices")
        if not isinstance(texts, list) or len(texts) < 2:
            raise InputError(f"{where}: choices is {texts!r}; allowed is a list of two texts and more, "
                                  "or a completion in their place")
        texts = [written(f"{where}, choice {i}", dict(text=text), "text") for i, text in enumerate(texts)]
        answer = record.get("answer", record.get("gold"))
        answer = texts.index(answer) if answer in texts else answer
        if type(answer) is not int or not 0 <= answer < len(texts):
            raise InputError(f"{where}: answer (or gold) is {answer!r}; allowed is one of the choices, "
                                  f"or its index, 0 to {len(texts) - 1}")
    pairs = [encode_pair(tokenizer, context, delimiter + text) for text in texts]
    if not all(rest for _, rest in pairs):
        raise InputError(f"{where}: what comes after the context adds no piece to it")
    return Item(texts, answer, pairs)


def task_metrics(items: list[Item], nats: np.ndarray, greedy: np.ndarray) -> dict[str, float]:
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


def tasks(params, apply: Callable, tokenizer: Tokenizer, config, path: str,
          delimiter: str = " ") -> dict[str, float]:
    """An `evals`: {task/<file>/<metric>: value} of a file of tasks, or of a directory of them."""
    out = {}
    for name, rows in json_lines(path).items():
        items = [read_item(where, record, tokenizer, delimiter) for where, record in rows]
        for (where, _), one in zip(rows, items, strict=True):
            if (one.answer is None) != (items[0].answer is None):
                raise InputError(f"{where}: choices and completions are in one file; give each its own")
        pairs = [pair for one in items for pair in one.pairs]
        found = task_metrics(items, *judged(params, apply, tokenizer, pairs, config.phases[-1].seq))
        out |= {f"task/{name}/{metric}": value for metric, value in found.items()}
    return out
