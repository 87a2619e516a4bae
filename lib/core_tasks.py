"""The CORE tasks of DCLM (Li et al. 2024, arXiv:2406.11794), read from their published files.

A directory has core.yaml, which lists the tasks, eval_meta_data.csv with the accuracy of guessing
in percent, and eval_data/ with a file of JSON Lines for each task. All is drawn, rendered and
scored as nanochat's core_eval.py does it (Karpathy 2025). Where that ends or has no number:

- A choice that is the beginning of another keeps a piece of its own, and a schema the last piece.
- The pieces of a text without its continuation may not be the first of those with it. Then the
  context is what both have in common.
- A task of fewer lines than examples has fewer examples.
- What is judged is never cut, however short the rows are.

DCLM's own code, LLM Foundry, has one line break between examples where this has two, encodes
contexts and choices apart, draws the examples of all lines from one generator, and averages
jeopardy over its categories.
"""
import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from lib.disk import user_path
from lib.errors import InputError, user_errors
from lib.tasks import (
    fewest_nats,
    judged,
    mean_of_proportions,
    proportion,
    read_answer,
    read_choices,
    read_lines,
    text_of,
)
from lib.tokenizers import Tokenizer

SHUFFLE = 1337  # seed of the order of a file's lines
EXAMPLES = 1234  # seed of the examples before the first item; each further item has one more
FILES = "core.yaml, eval_meta_data.csv and eval_data/"


class Question(NamedTuple):
    """A line of a task."""

    options: list[str]  # the whole text with each choice; one where a text goes on
    gold: int  # which of them is right
    stem: str = ""  # what stands before a text that goes on


class Task(NamedTuple):
    """A task of core.yaml."""

    label: str
    kind: str  # one of KINDS
    shots: int  # examples with their answers before each question
    baseline: float  # the accuracy of guessing
    questions: list[Question]


def multiple_choice(where: str, record: dict, delimiter: str) -> Question:
    """A query that each of the choices follows."""
    before = text_of(where, record, "query", empty=True) + delimiter
    choices = read_choices(where, record, "choices", empty=True)
    options = [before + choice for choice in choices]
    return Question(options, read_gold(where, record, choices))


def schema(where: str, record: dict, delimiter: str) -> Question:
    """Contexts that the same text follows."""
    contexts = read_choices(where, record, "context_options", empty=True)
    rest = delimiter + text_of(where, record, "continuation")
    options = [context + rest for context in contexts]
    return Question(options, read_gold(where, record, contexts))


def language_modeling(where: str, record: dict, delimiter: str) -> Question:
    """A text that goes on."""
    context = text_of(where, record, "context", empty=True)
    stem = context.strip() + delimiter
    whole = stem + text_of(where, record, "continuation")
    return Question([whole], 0, stem)


KINDS = {kind.__name__: kind for kind in (multiple_choice, schema, language_modeling)}


def read_gold(where: str, record: dict, choices: list[str]) -> int:
    """Which choice is right."""
    return read_answer(where, {"gold": record.get("gold")}, choices)


def read_core(path: str | Path, most: int | None = None) -> list[Task]:
    """The tasks of a directory, with at most so many questions each.

    The lines of a file are shuffled, so the first are a sample. Raises InputError with the file
    and the task or line.
    """
    if most is not None and most < 1:
        raise InputError(f"most is {most}; allowed is 1 or more lines of each task of CORE")
    path = user_path(path)
    config = parsed(path / "core.yaml", yaml.safe_load)
    rows = parsed(path / "eval_meta_data.csv", lambda file: list(csv.DictReader(file)))
    baselines = {row.get("Eval Task"): row.get("Random baseline") for row in rows}
    entries = None
    if isinstance(config, dict):
        entries = config.get("icl_tasks")
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{path / 'core.yaml'}: icl_tasks is {entries!r}; allowed is a list of tasks"
        )
    tasks = {}
    for number, entry in enumerate(entries, 1):
        task = read_task(path, number, entry, baselines, most)
        if task.label in tasks:
            raise InputError(
                f"{path / 'core.yaml'} has two tasks {task.label}; allowed are labels that differ"
            )
        tasks[task.label] = task
    return list(tasks.values())


def parsed(file: Path, parse: Callable):
    """What `parse` makes of an open file."""
    errors = OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError
    said = f"{file} cannot be read ({{reason}}); allowed is a directory with {FILES}"
    if file.exists() and not file.is_file():  # one that another program feeds would wait for it
        raise InputError(f"{file} is no regular file; allowed is a directory with {FILES}")
    with user_errors(errors, sentence=said), file.open(encoding="utf-8", newline="") as text:
        return parse(text)


def read_task(path: Path, number: int, entry, baselines: dict, most: int | None) -> Task:
    """A task of core.yaml and its questions."""
    where = f"{path / 'core.yaml'}, task {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}; allowed is a task with its fields")
    label = text_of(where, entry, "label")
    where = f"{where} ({label})"
    kind = text_of(where, entry, "icl_task_type")
    if kind not in KINDS:
        raise InputError(f"{where}: icl_task_type is {kind!r}; allowed are {', '.join(KINDS)}")
    shots = entry.get("num_fewshot")
    if not isinstance(shots, list) or [type(n) for n in shots] != [int] or shots[0] < 0:
        raise InputError(f"{where}: num_fewshot is {shots!r}; allowed is a list of one number")
    entry = {"continuation_delimiter": " "} | entry
    delimiter = text_of(where, entry, "continuation_delimiter", empty=True)
    file = path / "eval_data" / text_of(where, entry, "dataset_uri")
    if not file.is_file():
        raise InputError(f"{where}: dataset_uri leads to {file}, which is no file")
    lines = read_lines(file)
    random.Random(SHUFFLE).shuffle(lines)
    questions = [read_question(kind, *line, delimiter) for line in lines[:most]]
    baseline = read_baseline(path / "eval_meta_data.csv", label, baselines)
    return Task(label, kind, shots[0], baseline, questions)


def read_question(kind: str, where: str, record: dict, delimiter: str) -> Question:
    """A line of a task, checked."""
    question = KINDS[kind](where, record, delimiter)
    if not all(question.options):
        raise InputError(f"{where}: a choice is empty, and so is what stands before it")
    return question


def read_baseline(file: Path, label: str, baselines: dict) -> float:
    """The accuracy of guessing, 0 to 1."""
    said = baselines.get(label)
    try:
        share = 0.01 * float(said)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share < 1:
        raise InputError(f"{file}: Random baseline of {label} is {said!r}; "
                         "allowed is a percentage below 100")
    return share


def examples(task: Task, number: int) -> str:
    """The text before a question: others with their answers, never the question itself."""
    others = len(task.questions) - 1
    shots = min(task.shots, others)
    rng = random.Random(EXAMPLES + number)
    drawn = rng.sample(range(others), shots)
    texts = []
    for other in drawn:
        if other >= number:
            other += 1
        question = task.questions[other]
        texts.append(question.options[question.gold] + "\n\n")
    return "".join(texts)


def alike(rows: list[np.ndarray]) -> int:
    """With how many ids all rows begin alike."""
    size = min(map(len, rows))
    same = np.all([row[:size] == rows[0][:size] for row in rows], axis=0)
    return int(np.logical_and.accumulate(same).sum())


def split(tokenizer: Tokenizer, kind: str, before: str, question: Question) -> list[tuple]:
    """Ids (context, continuation) of each option; each has at least one.

    Choices begin after the ids with which all options begin, and those of a schema are the ids with
    which all end. What a text goes on with begins where the text without it, stripped, ends.
    """
    texts = [before + option for option in question.options]
    if kind == "language_modeling":
        texts.append((before + question.stem).strip())
    rows = []
    for text in texts:
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        rows.append(np.array(ids, np.int32))
    options = rows[:len(question.options)]
    longest = min(map(len, options)) - 1
    if kind == "schema":
        backwards = [row[::-1] for row in rows]
        size = max(1, min(alike(backwards), longest))
        starts = [len(row) - size for row in options]
    else:
        starts = [min(alike(rows), longest)] * len(options)
    return [(row[:start], row[start:]) for row, start in zip(options, starts, strict=True)]


def rightly(params, apply: Callable, tokenizer: Tokenizer, task: Task, seq: int) -> np.ndarray:
    """Whether the model answers each question of a task rightly, bool [questions].

    It chooses the option with the fewest nats an id of its continuation. A text goes on rightly
    where each id is the likeliest. Prompts are cut on the left to `seq` ids.
    """
    pairs = []
    for number, question in enumerate(task.questions):
        pairs += split(tokenizer, task.kind, examples(task, number), question)
    nats, greedy = judged(params, apply, tokenizer, pairs, seq - 1)  # the last id is no input
    if task.kind == "language_modeling":
        return greedy
    sizes = [len(rest) for _, rest in pairs]
    counts = [len(question.options) for question in task.questions]
    golds = [question.gold for question in task.questions]
    return fewest_nats(nats / sizes, counts) == golds


def core_figures(
    params, apply: Callable, tokenizer: Tokenizer, tasks: list[Task], seq: int
) -> dict[str, float]:
    """`core/<task>`, `core/<task>/centred`, and `core`, the mean of the latter.

    The first and the last have the figures of `proportion`. Centred: (x - baseline) /
    (1 - baseline), so that guessing has 0.
    """
    found = {}
    for task in tasks:
        name = f"core/{task.label}"
        found |= proportion(name, rightly(params, apply, tokenizer, task, seq))
        found[f"{name}/centred"] = (found[name] - task.baseline) / (1 - task.baseline)
    names = [f"core/{task.label}" for task in tasks]
    baselines = [task.baseline for task in tasks]
    return found | mean_of_proportions("core", found, names, baselines)


def core(
    params, apply: Callable, tokenizer: Tokenizer, config, path: str, most: int | None = None
) -> dict[str, float]:
    """An `evals`: the figures of `core_figures` for a directory; see `read_core`."""
    tasks = read_core(path, most)
    return core_figures(params, apply, tokenizer, tasks, config.phases[-1].seq)
