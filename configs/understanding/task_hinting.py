"""Task hinting: does a model that also learns a simpler task sort longer lists than it has seen?

Paper: Improving Length-Generalization in Transformers via Task Hinting, Awasthi & Gupta 2023
    (001:162)
Method: train on a task and, in part of the rows, on a simpler one that a solution could use. For
    sorting the hint is the successor: given a list and one of its numbers, the next larger one.
    The paper trains on lists of up to 20 numbers and goes, at 100, from less than 1 % to 92 %.
Here: lists of 2 to 10 different numbers below 64, asked at 10, 15 and 20; the list carries no loss
    (`Document.prefix`), and none is cut at the end of a row. none: sorting alone, the control.
    hint: half of the rows are successors. other: half are the largest number of the list, a task
    that is less of a hint. Figures are the shares of lists whose whole answer is the likeliest at
    each number, its end included.
Cost: three arms, nine runs of a minute, five minutes on two CPU cores.
Run:
    python train.py study configs/understanding/task_hinting.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from configs import base as shared
from data import DataConfig, Document, Source
from lib.packing import best_fit
from lib.study import Claim, Paper, Study
from lib.tasks import judged

NUMBERS = 64
SORT, SUCCESSOR, LARGEST, END = range(NUMBERS, NUMBERS + 4)  # marks, as further numbers
Task = Literal["sort", "successor", "largest"]


def item(rng: np.random.Generator, task: Task, length: int) -> tuple[list[int], list[int]]:
    """(what is asked, the answer) of a list of `length` different numbers."""
    numbers = rng.choice(NUMBERS, length, replace=False).tolist()
    rising = sorted(numbers)
    if task == "sort":
        return [SORT, *numbers, END], rising
    if task == "largest":
        return [LARGEST, *numbers, END], rising[-1:]
    place = int(rng.integers(length - 1))
    return [SUCCESSOR, *numbers, rising[place], END], [rising[place + 1]]


def spelt(ids: list[int]) -> str:
    """Numbers as the tokenizer reads them."""
    return " ".join(map(str, ids))


def lists(task: Task, count: int = 20_000, longest: int = 10) -> Iterator[Document]:
    """Lists of 2 to `longest` numbers, a document each."""
    rng = np.random.default_rng(0)
    for number in range(count):
        ask, answer = item(rng, task, int(rng.integers(2, longest + 1)))
        yield Document(f"{task}/{number}", spelt(answer), prefix=spelt(ask))


def sorts(params, apply, tokenizer, config, lengths: tuple = (10, 15, 20), count: int = 128):
    """An `evals`: the share of new lists of each length that come out sorted."""
    found = {}
    for length in lengths:
        rng = np.random.default_rng([1, length])
        asked = [item(rng, "sort", length) for _ in range(count)]
        pairs = [([tokenizer.bos, *ask], [*answer, tokenizer.eos]) for ask, answer in asked]
        _, right = judged(params, apply, tokenizer, pairs, config.phases[-1].seq)
        found[f"own/sorted_{length}"] = float(right.mean())
    return found


(phase,) = shared.small.phases
tasks = {task: Source(partial(lists, task=task), split="train")
         for task in ("sort", "successor", "largest")}


def arm(**mixture: float):
    """A run on a mixture of tasks."""
    return replace(
        shared.small, model=shared.shape(3, 64, vocab=0), evals=(sorts,), eval_every=500,
        data=DataConfig(sources=tasks, tokenizer=f"numbers:{END + 1}", dev=0.0, test=0.0),
        phases=(replace(phase, steps=1_500, batch=32, seq=64, mixture=mixture,
                        packing=best_fit),),
        prompts=(spelt([SORT, 5, 3, 9, END]),), sample_tokens=8)


claim = partial(Claim, arm="hint", above=0.0)
study = Study(
    question="Does a model that also learns a simpler task sort longer lists than it has seen?",
    paper=Paper(title="Improving Length-Generalization in Transformers via Task Hinting",
                authors="Awasthi & Gupta", year=2023, seeds=("001:162",)),
    arms={"none": arm(sort=1.0), "hint": arm(sort=0.5, successor=0.5),
          "other": arm(sort=0.5, largest=0.5)},
    measures={f"sorted_{length}": f"own/sorted_{length}" for length in (10, 15, 20)}, seeds=3,
    quick=shared.quick({"model.vocab": 0}, keep=("data.tokenizer", "data.dev", "data.test")),
    claims=(
        claim(says="lists of the longest length seen are sorted", control=None,
              measure="sorted_10", above=0.9),
        claim(says="with the hint, longer ones more often", measure="sorted_15"),
        claim(says="and those of twice the length", measure="sorted_20"),
        claim(says="it is the hint, not another task", control="other", measure="sorted_15"),
    ),
)
