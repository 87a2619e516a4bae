"""Tables: does filling in tables and what is said of them teach an encoder-decoder to answer?

Paper: Testing the Limits of Unified Sequence to Sequence LLM Pretraining on Diverse Table Data
    Tasks, Sarkar & Lausen 2023 (000:63, 001:188)
Method: a T5 goes on with its pre-training, span corruption, on tables together with the text that
    stands around them. Then one model is trained on many table tasks, each as text to text.
Here: made-up tables of three columns, four rows and a name for each, written row by row, and
    sentences `row column value` about four of the twelve cells. So part of what is hidden can be
    told from the rest. Spans are of one id. Three tasks ask for one of row, column and value by
    the other two. filled: 600 steps of span corruption, then 300 of questions. shuffled: the same
    with the ids of each text in any order, so that no cell has a row. scratch: the questions alone.
    labelled: questions all along. cells: as filled, with questions for values alone, as many. This
    is too short to learn to read a cell: at one seed no arm had over 0.13 of the answers right, a
    guess among the table's names 0.22. Left out: real tables and their long contexts, SQL, a model
    of text to begin with, sizes of 11 billion.
Cost: 15 runs of some 20 seconds, five minutes on two CPU cores.
Run:
    python train.py study configs/growth/tables.py --jobs 2
"""
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from configs.growth.t5 import MARKS, asked
from data import DataConfig, Source, nothing
from lib.seq2seq import paired
from lib.study import Claim, Paper, Study
from train import Config, Phase, Schedule

SEP, ASK = 9, 10  # ids: of the end of a line, of the first of three questions; MARKS are before
COLUMN, ROW, VALUE, END = 16, 24, 48, 88  # the first id of each kind of name, and behind the last
COLUMNS, ROWS, SAID, HIDDEN = 3, 4, 4, 6  # of a table; sentences about it; ids that are hidden
SOURCE, SEQ = 48, 64  # positions of what is read, and of all
TASKS = "row", "column", "value"


def table(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(names of columns, names of rows, values [rows, columns]) of a fresh table, all different."""
    columns = COLUMN + rng.choice(ROW - COLUMN, COLUMNS, replace=False)
    rows = ROW + rng.choice(VALUE - ROW, ROWS, replace=False)
    return columns, rows, VALUE + rng.choice(END - VALUE, (ROWS, COLUMNS), replace=False)


def written(columns, rows, values, rng) -> list[int]:
    """A table line by line, then a sentence, row, column and value, about some of its cells."""
    lines = [columns, *(np.append(row, cells) for row, cells in zip(rows, values, strict=True))]
    for cell in rng.choice(values.size, SAID, replace=False).tolist():
        r, c = divmod(cell, COLUMNS)
        lines.append(np.array([rows[r], columns[c], values[r, c]]))
    return [int(i) for line in lines for i in [*line, SEP]]


def fill_in(row: dict, rng, shuffled: bool = False):
    """An objective: a table and its sentences with ids behind marks, then what is behind each."""
    ids = written(*table(rng), rng)
    if shuffled:
        ids = rng.permutation(ids).tolist()
    given, told = [*ids], []
    for mark, place in zip(MARKS, np.sort(rng.choice(len(ids), HIDDEN, replace=False)).tolist(),
                           strict=False):
        given[place] = mark
        told += [mark, ids[place]]
    return asked(row, given, [*told, MARKS[HIDDEN]], SOURCE)


def question(row: dict, rng, tasks: tuple[int, ...] = (0, 1, 2)):
    """An objective: a table and its sentences, two of a cell's row, column and value, the third."""
    columns, rows, values = table(rng)
    r, c, task = rng.integers(ROWS), rng.integers(COLUMNS), int(rng.choice(tasks))
    names = [int(rows[r]), int(columns[c]), int(values[r, c])]
    answer = names.pop(task)
    given = [*written(columns, rows, values, rng), ASK + task, *names]
    return asked(row, given, [MARKS[0], answer], SOURCE)


def right(params, apply: Callable, n: int = 256) -> dict[str, float]:
    """{tables/TASK: the share of n questions whose answer is the likeliest id}, and their mean."""
    rng, found, blank = np.random.default_rng(3), {}, dict(tokens=np.zeros(SEQ, np.int32))
    for task, name in enumerate(TASKS):
        made = [question(blank, rng, (task,))[0] for _ in range(n)]
        batch = {key: np.stack([row[key] for row in made]) for key in made[0]}
        said = np.asarray(apply(params, batch))[:, SOURCE].argmax(-1)
        found[f"tables/{name}"] = float(np.mean(said == batch["targets"][:, SOURCE]))
    return found | {"tables/all": float(np.mean([*found.values()]))}


BEFORE, AFTER = 600, 300
pre = Phase(steps=BEFORE, batch=32, seq=SEQ, objective=partial(fill_in, shuffled=False))
fine = replace(pre, steps=AFTER, objective=question)
mixed = replace(pre, objective=partial(fill_in, shuffled=True))
filled = Config(
    model=replace(base.shape(2, 64, END + 2), **paired(SOURCE)), phases=(pre, fine), prompts=(),
    data=DataConfig({"rows": Source(nothing)}, tokenizer=f"numbers:{END}", dev=0.0, test=0.0),
    schedule=Schedule(shape="wsd", peak=4e-3, warmup=50, decay=0.2, final=0.05), overlap=0,
    evals=(partial(right, n=256),), eval_every=100, save_every=1_000, keep=1)
claim = partial(Claim, arm="filled", measure="all")
study = Study(
    question="Does filling in tables and what is said of them teach an encoder-decoder to answer?",
    paper=Paper(title="Testing the Limits of Unified Sequence to Sequence LLM Pretraining on "
                "Diverse Table Data Tasks", authors="Sarkar & Lausen", year=2023,
                seeds=("000:63", "001:188")),
    arms={"shuffled": replace(filled, phases=(mixed, fine)), "filled": filled,
          "scratch": replace(filled, phases=(fine,)),
          "labelled": replace(filled, phases=(replace(fine, steps=BEFORE + AFTER),)),
          "cells": replace(filled, phases=(pre, replace(fine, objective=partial(
              question, tasks=(2,)))))},
    measures={name: f"tables/{name}" for name in (*TASKS, "all")},
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "eval_every": 4},
    claims=(
        claim(says="tables teach more than their ids in any order, at equal FLOPs", above=0.0),
        claim(says="and more than questions alone", control="scratch", above=0.0),
        claim(says="as many more questions teach more still", control="labelled", below=0.0),
        claim(says="one model for three tasks is ahead of one for values alone, on values",
              control="cells", measure="value", above=0.0),
        claim(says="it reads: a guess among a table's names is right for 0.22", control=None,
              above=0.22),
    ), seeds=3)
