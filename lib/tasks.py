"""Minimal pairs and tasks, scored as lm-evaluation-harness scores them; tools/eval.py says how."""
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib.disk import user_path
from lib.errors import InputError
from lib.evaluate import HALF_95, per_byte
from lib.kernels import nll
from lib.sources import SURROGATE
from lib.tokenizers import Tokenizer

LOGITS = 2**26  # at most so many logits at a time, 256 MiB in float32, or those of one row
ROWS = 64  # rows that are judged at a time at most
SHORTEST = 16  # positions of the shortest row


def json_lines(path: str | Path) -> dict[str, list[tuple[str, dict]]]:
    """The objects of a JSON Lines file, or of all such files in a directory.

    Returns {stem of the file: [(file and line, object)]}. Raises InputError with file and line.
    """
    path = user_path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not files:
        raise InputError(
            f"{str(path)!r} is not a file of JSON Lines, and not a directory with .jsonl files"
        )
    return {file.stem: read_lines(file) for file in files}


def read_lines(file: Path) -> list[tuple[str, dict]]:
    """The objects of one JSON Lines file, each with its file and line."""
    if not file.is_file():  # one that is fed by another program would wait for it
        raise InputError(f"{file} is no regular file; allowed are files of JSON Lines")
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: broken JSON ({error})") from None
        if not isinstance(record, dict):
            text = line[:40].decode("utf-8", "replace")
            raise InputError(f"{where}: {text} is not a JSON object")
        rows.append((where, record))
    if not rows:
        raise InputError(f"{file} has only empty lines; allowed are JSON objects, one a line")
    return rows


def text_of(where: str, record: dict, *names: str, empty: bool = False) -> str:
    """The text that a record holds under one of `names`, the first that it has."""
    found = next((record[name] for name in names if name in record), None)
    valid = isinstance(found, str) and not SURROGATE.search(found)
    if not valid or not (found or empty):
        allowed = "a text" if empty else "a text that is not empty"
        raise InputError(f"{where}: {' or '.join(names)} is {found!r}; allowed is {allowed}")
    return found


@jax.jit
def judge(logits, targets):
    """The nats of targets [b t] under logits [b t v], and whether each is the likeliest piece."""
    return nll(logits, targets), jnp.argmax(logits, -1) == targets


def judged(
    params,
    apply: Callable,
    tokenizer: Tokenizer,
    pairs: list[tuple[list[int], list[int]]],
    seq: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Continuations after contexts, both given as ids.

    Returns the nats of each continuation [n], and whether all its pieces are the likeliest [n].
    Contexts are cut on the left to `seq` inputs; continuations are never cut. Each pair is a row of
    its own, padded on the right to a power of two, so that few shapes are compiled.
    """
    ids = []
    for context, rest in pairs:
        longest = max(seq, len(rest)) + 1
        whole = np.concatenate([context, rest], dtype=np.int32, casting="unsafe")
        ids.append(whole[-longest:])
    rest_sizes = [len(rest) for _, rest in pairs]
    width = np.array([row_width(len(row) - 1) for row in ids])
    nats = np.zeros(len(ids))
    greedy = np.zeros(len(ids), bool)
    for t in np.unique(width).tolist():
        which = np.flatnonzero(width == t)
        rows = rows_at_once(len(which), t, tokenizer.vocab)
        for start in range(0, len(which), rows):
            here = which[start:start + rows]
            tokens, counted = judged_rows(ids, rest_sizes, here, (rows, t), tokenizer.eos)
            logits = apply(params, tokens[:, :-1])
            each, likeliest = judge(logits, tokens[:, 1:])
            sums = np.where(counted, np.asarray(each), 0).sum(1, dtype=np.float64)
            right = (np.asarray(likeliest) | ~counted).all(1)
            nats[here] = sums[:len(here)]
            greedy[here] = right[:len(here)]
    return nats, greedy


def row_width(inputs: int) -> int:
    """The power of two that holds so many inputs."""
    return max(SHORTEST, 1 << (inputs - 1).bit_length())


def rows_at_once(n: int, width: int, vocab: int) -> int:
    """How many of n rows of a width are judged at a time."""
    enough = 1 << (n - 1).bit_length()
    return max(1, min(ROWS, enough, LOGITS // (width * vocab)))


def judged_rows(
    ids: list[np.ndarray],
    rest_sizes: list[int],
    which: np.ndarray,
    shape: tuple[int, int],
    eos: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Some texts as rows of ids [rows, width + 1], and which targets [rows, width] are counted."""
    rows, width = shape
    tokens = np.full((rows, width + 1), eos, np.int32)
    counted = np.zeros((rows, width), bool)
    for row, i in enumerate(which):
        end = len(ids[i])
        tokens[row, :end] = ids[i]
        counted[row, end - 1 - rest_sizes[i]:end - 1] = True
    return tokens, counted


def mean(name: str, values) -> dict[str, float]:
    """`name` and `name_se`: the mean of values [n] and its standard error, NaN for one value."""
    values = np.asarray(values, np.float64)
    error = math.nan
    if len(values) > 1:
        error = values.std(ddof=1) / math.sqrt(len(values))
    return {name: float(values.mean()), f"{name}_se": float(error)}


def proportion(name: str, right: np.ndarray) -> dict[str, float]:
    """The figures of `mean` for truth values [n], and `_low` and `_high` of a 95 % interval.

    The interval is Wilson's (1927). It stays within 0 and 1, and is not empty at these.
    """
    found = mean(name, right)
    share = found[name]
    n = len(right)
    z = HALF_95
    middle = share + z * z / (2 * n)
    variance = share * (1 - share) / n
    half = z * math.sqrt(variance + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    found[f"{name}_low"] = (middle - half) / scale
    found[f"{name}_high"] = (middle + half) / scale
    return found


def minimal_pairs(
    params,
    apply: Callable,
    tokenizer: Tokenizer,
    path: str,
) -> dict[str, float]:
    """How often the good sentence of a minimal pair is the likelier; figures of `proportion`.

    `blimp/<paradigm>` for each file, `blimp_pairs` over all pairs, and `blimp`, the mean over
    paradigms. path: a directory of files as BLiMP has them, with "sentence_good" and
    "sentence_bad".
    """
    files = json_lines(path)
    pairs = []
    for where, record in itertools.chain(*files.values()):
        for name in ("sentence_good", "sentence_bad"):
            text = text_of(where, record, name)
            pairs.append(([tokenizer.bos], tokenizer.encode(text)))
    nats, _ = judged(params, apply, tokenizer, pairs, 0)
    right = nats[::2] < nats[1::2]
    out = {}
    begin = 0
    for name, rows in files.items():
        end = begin + len(rows)
        out |= proportion(f"blimp/{name}", right[begin:end])
        begin = end
    paradigms = [f"blimp/{name}" for name in files]
    return out | mean_of_proportions("blimp", out, paradigms) | proportion("blimp_pairs", right)


def mean_of_proportions(
    name: str,
    found: dict[str, float],
    names: list[str],
    baselines: list[float] | float = 0.0,
) -> dict[str, float]:
    """The figures of `proportion` for the mean of proportions; its interval is made of theirs.

    baselines: of each proportion, (x - baseline) / (1 - baseline) is taken. Interval: Zou & Donner
    2008.
    """
    ends = ("", "_se", "_low", "_high")
    each, error, low, high = (np.array([found[of + end] for of in names]) for end in ends)
    room = 1 - np.asarray(baselines)
    middle = float(np.mean((each - baselines) / room))
    errors, below, above = (x / room / len(names) for x in (error, each - low, high - each))
    return {
        name: middle,
        f"{name}_se": float(np.linalg.norm(errors)),
        f"{name}_low": middle - float(np.linalg.norm(below)),
        f"{name}_high": middle + float(np.linalg.norm(above)),
    }


def blimp(
    params,
    apply: Callable,
    tokenizer: Tokenizer,
    path: str,
) -> dict[str, float]:
    """An `evals`: the mean of `minimal_pairs` over paradigms, and its standard error."""
    found = minimal_pairs(params, apply, tokenizer, path)
    return {name: found[name] for name in ("blimp", "blimp_se")}


class Item(NamedTuple):
    """A line of a task."""

    texts: list[str]  # the choices, or the one completion
    answer: int | None  # which choice is right; None: a completion
    pairs: list[tuple[list[int], list[int]]]  # ids of the context and of each text


def encode_pair(tokenizer: Tokenizer, context: str, rest: str) -> tuple[list[int], list[int]]:
    """The ids of a context, bos included, and of what comes after it.

    The context is encoded without its last spaces; these belong to the rest. Of the ids of the
    whole text, the rest has those that are left when as many as the context's are taken away.
    """
    before = tokenizer.encode(context.rstrip())
    whole = tokenizer.encode(context + rest)
    return [tokenizer.bos, *before], whole[len(before):]


def read_item(where: str, record: dict, tokenizer: Tokenizer, delimiter: str) -> Item:
    """A line of a task, checked and encoded. Raises InputError with its file and line."""
    context = text_of(where, record, "context", "query", "prompt", empty=True)
    if "completion" in record:
        texts = [text_of(where, record, "completion")]
        answer = None
        delimiter = ""
    else:
        texts = read_choices(where, record, "choices")
        answer = read_answer(where, record, texts)
    pairs = [encode_pair(tokenizer, context, delimiter + text) for text in texts]
    if not all(rest for _, rest in pairs):
        raise InputError(f"{where}: what comes after the context adds no piece to it")
    return Item(texts, answer, pairs)


def read_items(
    rows: list[tuple[str, dict]],
    tokenizer: Tokenizer,
    delimiter: str,
) -> list[Item]:
    """The lines of one file of a task, all choices or all completions."""
    items = []
    for where, record in rows:
        item = read_item(where, record, tokenizer, delimiter)
        items.append(item)
        if (item.answer is None) != (items[0].answer is None):
            raise InputError(
                f"{where}: choices and completions are in one file; give each its own"
            )
    return items


def read_choices(where: str, record: dict, name: str, empty: bool = False) -> list[str]:
    """The choices that a record holds under a name."""
    choices = record.get(name)
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(
            f"{where}: {name} is {choices!r}; allowed is a list of two or more texts"
        )
    texts = []
    for i, choice in enumerate(choices):
        record = {"text": choice}
        texts.append(text_of(f"{where}, choice {i}", record, "text", empty=empty))
    return texts


def read_answer(where: str, record: dict, choices: list[str]) -> int:
    """Which choice is right: given as an index, or as the choice's text."""
    answer = record.get("answer", record.get("gold"))
    if answer in choices:
        return choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):  # True is not an index
        raise InputError(
            f"{where}: answer (or gold) is {answer!r}; allowed is one of the choices, "
            f"or its index, 0 to {len(choices) - 1}"
        )
    return answer


def completion_metrics(
    items: list[Item],
    nats: np.ndarray,
    greedy: np.ndarray,
) -> dict[str, float]:
    """The metrics of completions; nats, greedy: of each."""
    found = mean("exact", greedy) | mean("loglikelihood", -nats)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(nats.mean()))
    found["perplexity"] = perplexity
    found["perplexity_se"] = perplexity * found["loglikelihood_se"]  # to first order
    size = np.array([len(item.texts[0].encode()) for item in items])
    return found | per_byte(nats, size)


def fewest_nats(nats: np.ndarray, counts: list[int]) -> np.ndarray:
    """Which choice of each item has the fewest nats, int [items]; the first of equals.

    nats: of all choices of all items in turn. counts: how many choices each item has.
    """
    ends = np.cumsum(counts)
    return np.array([np.argmin(each) for each in np.split(nats, ends[:-1])])


def choice_metrics(items: list[Item], nats: np.ndarray) -> dict[str, float]:
    """The metrics of multiple choice; nats: of all choices of all items in turn."""
    lengths = {
        "acc": lambda text: 1,
        "acc_norm": len,
        "acc_bytes": lambda text: len(text.encode()),
    }
    answers = [item.answer for item in items]
    counts = [len(item.texts) for item in items]
    found = {}
    for name, length in lengths.items():
        sizes = [length(text) for item in items for text in item.texts]
        found |= mean(name, fewest_nats(nats / sizes, counts) == answers)
    return found


def tasks(
    params,
    apply: Callable,
    tokenizer: Tokenizer,
    config,
    path: str,
    delimiter: str = " ",
) -> dict[str, float]:
    """An `evals`: `task/<file>/<metric>` of a file of tasks, or of all in a directory.

    path, delimiter: see tools/eval.py, which says what a file holds, and what is measured.
    """
    out = {}
    seq = config.phases[-1].seq
    for name, rows in json_lines(path).items():
        items = read_items(rows, tokenizer, delimiter)
        pairs = []
        for item in items:
            pairs += item.pairs
        nats, greedy = judged(params, apply, tokenizer, pairs, seq)
        if items[0].answer is None:
            found = completion_metrics(items, nats, greedy)
        else:
            found = choice_metrics(items, nats)
        for metric, value in found.items():
            out[f"task/{name}/{metric}"] = value
    return out
