"""configs/selection/diversify.py: vectors, clusters as sources, weights times scores."""
import json

import numpy as np
import pytest

from lib.config import ROOT, load_file
from lib.sources import Document

pytestmark = pytest.mark.library
diversify = load_file(ROOT / "configs/selection/diversify.py")


def test_vectors_are_tf_idf_of_words():
    texts = ["apple apple pear", "Apple, plum", "plum plum plum plum"]
    got = diversify.tf_idf(texts, size=4096)
    word = {w: diversify.zlib.crc32(w.encode()) % 4096 for w in ("apple", "pear", "plum")}
    assert len({*word.values()}) == 3
    apple, pear, plum = np.log(3 / 2), np.log(3), np.log(3 / 2)
    wanted = np.zeros((3, 4096))
    wanted[0, word["apple"]], wanted[0, word["pear"]] = (1 + np.log(2)) * apple, pear
    wanted[1, word["apple"]], wanted[1, word["plum"]] = apple, plum
    wanted[2, word["plum"]] = (1 + np.log(4)) * plum
    np.testing.assert_allclose(got, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-12)


def test_clusters_are_a_partition_of_the_pool_and_hold_what_is_alike(tmp_path, monkeypatch):
    kinds = "red green blue".split(), "one two three".split()
    texts = [" ".join(np.random.default_rng(i).permutation(kinds[i % 2])[:2]) for i in range(40)]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts[::2]))
    code = [Document(f"c{i}", text) for i, text in enumerate(texts[1::2])]
    monkeypatch.setattr(diversify, "stdlib", lambda unit: code)
    parts = [[d.text for d in diversify.cluster(i, str(file), clusters=2, seed=1)] for i in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(texts)
    assert {frozenset(part) for part in parts} == {frozenset(texts[::2]), frozenset(texts[1::2])}


def test_weights_are_multiplied_by_scores_and_normalised_each_iteration():
    names = ["a", "b"]
    assert diversify.reweighted(0.0, [], names) == {"a": 0.5, "b": 0.5}
    log = [dict(a=1.0, b=3.0), dict(a=2.0, b=2.0), dict(a=2.0, b=1.0)]
    got = diversify.reweighted(0.9, log, names)
    assert sum(got.values()) == pytest.approx(1)
    assert got["b"] / got["a"] == pytest.approx(3 / 1 * 2 / 2 * 1 / 2)
