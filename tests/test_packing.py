"""lib/packing.py: which pieces of documents make up which row; rows without a mask; `corpus bench`."""
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
import train
from lib.objectives import one_segment
from lib.packing import DOCUMENT, LENGTH, QUIET, ROW, SEGMENT, START, best_fit, first_fit, one_per_row

PACKINGS = [best_fit, first_fit, one_per_row]


@st.composite
def documents(draw) -> tuple[np.ndarray, int]:
    """(lengths, seq), lengths about the multiples, halves and thirds of seq more often than elsewhere."""
    seq = draw(st.integers(1, 40))
    near = st.builds(lambda part, off: max(1, seq * part // 6 + off), st.integers(0, 15), st.integers(-1, 1))
    lengths = draw(st.lists(st.one_of(near, st.integers(1, 4 * seq)), max_size=60))
    return np.array(lengths, np.int64), seq


def rows_of(plan: np.ndarray) -> list[list[int]]:
    """The lengths of the pieces in each row, in falling order, rows in order."""
    return [sorted((int(p[LENGTH]) for p in group), reverse=True)
            for _, group in itertools.groupby(plan, lambda p: p[ROW])]


def slow_best_fit(lengths: list[int], seq: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every row; of rows with as much left, the last one to get a piece."""
    pieces = [min(seq, n - start) for n in lengths for start in range(0, n, seq)]
    rows, last = [], []
    for now, w in enumerate(sorted(pieces, reverse=True)):
        room = [(seq - sum(r), -last[i], i) for i, r in enumerate(rows) if sum(r) + w <= seq]
        if room:
            i = min(room)[2]
        else:
            i = len(rows)
            rows.append([])
            last.append(0)
        rows[i].append(w)
        last[i] = now
    return rows


@pytest.mark.parametrize("pack", PACKINGS)
@given(case=documents())
def test_a_packing_keeps_every_position_and_cuts_no_document_that_fits(pack, case):
    lengths, seq = case
    plan = pack(lengths, seq)
    assert plan.dtype == np.int64 and plan.shape[1] == 6 and np.all(np.diff(plan[:, ROW]) >= 0)
    assert np.array_equal(plan, pack(lengths, seq))
    assert np.all(plan[:, LENGTH] > 0) and not plan[:, QUIET].any()
    rows = int(plan[-1, ROW]) + 1 if len(plan) else 0
    filled = np.bincount(plan[:, ROW], plan[:, LENGTH], rows)
    assert np.all((filled > 0) & (filled <= seq))
    for row in range(rows):
        here = plan[plan[:, ROW] == row, SEGMENT]
        assert np.array_equal(here, 1 + np.arange(len(here)))
    for number, length in enumerate(lengths.tolist()):
        pieces = sorted((int(p[START]), int(p[LENGTH])) for p in plan[plan[:, DOCUMENT] == number])
        assert pieces == [(start, min(seq, length - start)) for start in range(0, length, seq)]


@given(case=documents())
def test_best_fit_makes_the_rows_that_a_search_through_all_rows_makes(case):
    lengths, seq = case
    assert rows_of(best_fit(lengths, seq)) == slow_best_fit(lengths.tolist(), seq)


@given(case=documents())
def test_first_fit_makes_the_rows_that_a_search_from_the_first_makes(case):
    lengths, seq = case
    rows = []
    for w in (min(seq, n - start) for n in lengths.tolist() for start in range(0, n, seq)):
        fits = next((r for r in rows if sum(r) + w <= seq), None)
        rows.append([w]) if fits is None else fits.append(w)
    assert rows_of(first_fit(lengths, seq)) == [sorted(r, reverse=True) for r in rows]


def test_best_fit_of_the_paper_s_documents():
    assert rows_of(best_fit(np.array([14, 7, 5, 2, 3]), 8)) == [[8], [7], [6, 2], [5, 3]]
    # rows that hold 8, 6, 6 and 4 of 8 after the longer documents: 3 goes where 4 are left
    assert rows_of(best_fit(np.array([8, 6, 6, 4, 3]), 8)) == [[8], [6], [6], [4, 3]]


@pytest.mark.parametrize("pack", PACKINGS)
def test_documents_longer_than_half_a_row_take_one_each(pack):
    lengths = np.random.default_rng(0).integers(33, 65, 500)
    assert sorted(pack(lengths, 64)[:, LENGTH]) == sorted(lengths) and pack(lengths, 64)[-1, ROW] == 499


@pytest.mark.parametrize("pack", PACKINGS)
def test_no_documents_give_an_empty_plan(pack):
    assert pack(np.array([], np.int64), 16).shape == (0, 6)


def test_best_fit_of_100_000_documents_wastes_next_to_nothing():
    lengths = np.random.default_rng(0).lognormal(6.2, 1.1, 100_000).astype(np.int64) + 1
    plan = best_fit(lengths, 2048)
    assert plan[:, LENGTH].sum() == lengths.sum()
    assert plan[-1, ROW] + 1 <= 1.0002 * math.ceil(lengths.sum() / 2048)
    assert np.all(np.bincount(plan[:, DOCUMENT])[lengths <= 2048] == 1)


def test_without_a_mask_a_row_is_one_segment_whose_positions_run_on():
    row = dict(tokens=np.arange(8), segments=np.array([1, 1, 1, 2, 2, 3, 0, 0], np.int32),
               positions=np.array([0, 1, 2, 0, 1, 0, 0, 0], np.int32))
    made, mask = one_segment(row, np.random.default_rng(0))
    assert made["segments"].tolist() == [1] * 6 + [0] * 2 and made["positions"].tolist() == [*range(6), 0, 0]
    assert made["tokens"] is row["tokens"] and mask == data.causal(row, None)[1]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


CORPUS = """from functools import partial

from data import DataConfig, Source, text
from model import ModelConfig
from train import Config, Phase

config = Config(model=ModelConfig(vocab=320), overlap=0, phases=(Phase(steps=9, batch=2, seq=64),),
                data=DataConfig(sources={"text": Source(partial(text, path="PLACE"))}, dev=0.1, test=0.1))
"""


def test_corpus_bench_compares_the_packings_and_times_batches_and_tokenizing(tmp_path, corpus, capsys):
    (tmp_path / "some.py").write_text(CORPUS.replace("PLACE", str(corpus)))
    train.verb("corpus", ["bench", str(tmp_path / "some.py"), "--seconds", "0.2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, best = (found["packings"][name] for name in ("concat_and_split", "best_fit"))
    assert plain["rows"] == plain["ideal"] == best["ideal"] <= best["rows"]
    assert plain["cut"] > best["cut"] and plain["cut_fitting"] > 0 == best["cut_fitting"]
    assert found["packings"]["first_fit"]["rows"] >= plain["rows"] and best["rows_s"] >= best["plan_s"] > 0
    assert found["batch"]["tokens_per_s"] > 0 and found["tokenizing"]["share"] > 0
