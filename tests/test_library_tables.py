"""configs/growth/tables.py: what a table says is what is asked, and what is hidden can be put back."""
import numpy as np
import pytest

from lib.config import ROOT, load_file

pytestmark = pytest.mark.library
tables = load_file(ROOT / "configs/growth/tables.py")
SOURCE, SEP = tables.SOURCE, tables.SEP
BLANK = dict(tokens=np.zeros(tables.SEQ, np.int32))


def made(objective, seed: int, **how) -> tuple[list[int], list[int], dict]:
    """(what is read, what is to be said behind its first id, the row) of a fresh row."""
    row, mask = objective(BLANK, np.random.default_rng(seed), **how)
    assert mask["kind"] == "prefix"
    given = row["tokens"][row["prefix"] > 0].tolist()
    said = row["targets"][row["weights"] > 0].tolist()
    assert row["tokens"][SOURCE] == tables.MARKS[0]
    return given, said, row


def text_of(seed: int) -> list[int]:
    """A fresh table and its sentences."""
    rng = np.random.default_rng(seed)
    return tables.written(*tables.table(rng), rng)


def lines_of(ids: list[int]) -> list[list[int]]:
    """The lines of a text."""
    lines = [[]]
    for i in ids:
        if i == SEP:
            lines.append([])
        else:
            lines[-1].append(i)
    return lines


def cells_of(ids: list[int]) -> set[tuple[int, int, int]]:
    """(row, column, value) of each cell of the table that a text begins with."""
    columns, *rows = lines_of(ids)[:1 + tables.ROWS]
    return {(row, column, value) for row, *values in rows
            for column, value in zip(columns, values, strict=True)}


@pytest.mark.parametrize("task", range(3))
def test_the_answer_is_the_one_cell_that_a_question_fits(task):
    for seed in range(20):
        given, (answer,), _ = made(tables.question, seed, tasks=(task,))
        *_, asked, one, other = given
        fits = [cell for cell in cells_of(given) if [*cell[:task], *cell[task + 1:]] == [one, other]]
        assert asked == tables.ASK + task
        assert [cell[task] for cell in fits] == [answer]


def test_each_sentence_is_about_a_cell_of_its_table_and_each_of_another():
    for seed in range(20):
        given, _, _ = made(tables.question, seed)
        sentences = {tuple(line) for line in lines_of(given)[1 + tables.ROWS:-1]}
        assert len(sentences) == tables.SAID
        assert sentences <= cells_of(given)


@pytest.mark.parametrize("shuffled", [False, True])
def test_what_was_hidden_stands_behind_its_mark(shuffled):
    """Put back, a text is a table and its sentences, or the same ids in another order."""
    for seed in range(20):
        given, said, row = made(tables.fill_in, seed, shuffled=shuffled)
        told = [tables.MARKS[0], *said]
        hidden = dict(zip(told[0:-1:2], told[1::2], strict=True))
        assert told[::2] == tables.MARKS[:tables.HIDDEN + 1]
        text = [hidden.get(i, i) for i in given]
        plain = text_of(seed)
        assert sorted(text) == sorted(plain)
        assert (text == plain) == (not shuffled)
        assert row["segments"].sum() == len(given) + len(said)


def test_a_text_with_its_question_and_what_is_said_have_room():
    assert len(text_of(0)) + 3 <= SOURCE
    assert SOURCE + 2 * tables.HIDDEN + 1 <= tables.SEQ + 1


def test_an_oracle_is_right_and_silence_is_not():
    def oracle(params, batch):
        return np.eye(tables.END)[np.where(batch["weights"] > 0, batch["targets"], 0)]

    def silent(params, batch):
        return np.zeros((*batch["tokens"].shape, tables.END))

    right = tables.right({}, oracle, n=8)
    assert right == {f"tables/{name}": 1.0 for name in (*tables.TASKS, "all")}
    assert tables.right({}, silent, n=8)["tables/all"] == 0.0
