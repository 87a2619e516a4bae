"""configs/selection/skill_it.py: the skills, and the graph that short runs say."""
import json
import re
from itertools import islice

import numpy as np
import pytest

from lib.config import ROOT, load_file

pytestmark = pytest.mark.library
skill_it = load_file(ROOT / "configs/selection/skill_it.py")


@pytest.mark.parametrize("skill, different", [("last", 10), ("carry", 2), ("both", 19)])
def test_a_skill_asks_for_a_part_of_a_sum(skill, different):
    asked = set()
    for document in islice(skill_it.sums(skill_it.NAMES.index(skill)), 2_000):
        a, b, which = re.fullmatch(r"(\d)\+(\d) (\w+) ", document.prefix).groups()
        total = int(a) + int(b)
        want = {"last": str(total % 10), "carry": str(total // 10), "both": f"{total:02d}"}
        assert which == skill
        assert document.text == want[skill]
        asked.add(document.text)
    assert len(asked) == different


def test_the_graph_is_what_one_skill_does_for_another_relative_to_what_it_does_for_itself():
    falls = np.array([[2.0, 0.5, -0.3], [0.1, 1.0, 4.0], [3.0, 0.05, 2.0]])
    graph = skill_it.graph_of(falls)
    np.testing.assert_allclose(graph, [[1, 0.5, 0], [0, 1, 1], [1, 0, 1]])


def test_a_skill_that_no_run_learns_has_but_itself():
    falls = np.array([[1.0, 0.0], [0.0, -0.2]])
    np.testing.assert_array_equal(skill_it.graph_of(falls), np.eye(2))


def write(run, first: list[float], last: list[float]):
    """A run's metrics, of the skills a and b."""
    run.mkdir()
    rows = [dict(zip(("eval/a/loss", "eval/b/loss"), losses, strict=True)) for losses in (first, last)]
    rows.insert(1, {"step": 1, "train/loss": 1.0})
    rows.append({"eval/a.test/loss": 9.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_falls_are_read_from_runs_and_steer_the_shares(tmp_path):
    write(tmp_path / "on_a", [2.0, 2.0], [1.0, 1.5])  # a helps b by half of what b does
    write(tmp_path / "on_b", [2.0, 2.0], [2.0, 1.0])
    runs = [str(tmp_path / "on_a"), str(tmp_path / "on_b")]
    np.testing.assert_allclose(skill_it.falls_of(tuple(runs), ("a", "b")), [[1.0, 0.5], [0.0, 1.0]])
    shares = skill_it.estimated(0.5, [dict(a=1.0, b=2.0)], ["a", "b"], runs, eta=1.0)
    assert shares["a"] / shares["b"] == pytest.approx(np.exp(1.0 + 0.5 * 2.0 - 2.0))


def test_an_estimated_edge_of_one_counts_in_full(tmp_path):
    write(tmp_path / "on_a", [2.0, 2.0], [1.0, 1.0])  # a helps b by as much as b does
    write(tmp_path / "on_b", [2.0, 2.0], [2.0, 1.0])
    runs = [str(tmp_path / "on_a"), str(tmp_path / "on_b")]
    shares = skill_it.estimated(0.5, [dict(a=1.0, b=2.0)], ["a", "b"], runs, eta=1.0)
    assert shares["a"] / shares["b"] == pytest.approx(np.exp(1.0 + 2.0 - 2.0))


def test_the_figure_is_the_mean_of_the_skills_test_losses():
    rows = [{"step": 1}, {f"eval/{name}.test/loss": i for i, name in enumerate(skill_it.NAMES)}]
    assert skill_it.mean_loss(rows) == 1.0
