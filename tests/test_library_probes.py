"""configs/understanding/probes.py and word_classes.py, lib/probe.py: trees, distances, classes, maps."""
import ast
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong
from scipy.stats import spearmanr

import model
from lib import probe
from lib.config import ROOT, load_file
from lib.kernels import Mask
from lib.sources import split_in

pytestmark = pytest.mark.library
probes = load_file(ROOT / "configs/understanding/probes.py")
classes = load_file(ROOT / "configs/understanding/word_classes.py")
PROGRAM = "def f(a, b='é'):\n    return a[0] + f'{b}!'  # é\n"


def test_states_are_those_of_the_forward_pass(tiny):
    batch = {key: jnp.asarray(value) for key, value in rows().items()}
    params = strong(tiny)
    found = probe.states(params, batch, tiny)
    assert found.shape == (1 + tiny.layers, 2, 24, tiny.embed)
    np.testing.assert_array_equal(found[0], model.embedded(params, batch, tiny))
    last = model.rms_norm(found[-1], params["norm"], tiny.norm_eps)
    np.testing.assert_allclose(last, model.forward(params, batch, Mask("causal", 0), tiny)[0], atol=1e-5)
    one = replace(tiny, layers=1)
    first = {n: x[:1] if model.table(tiny)[n].layered else x for n, x in params.items()}
    np.testing.assert_allclose(probe.states(first, batch, one)[1], found[1], atol=1e-5)


def test_ridge_finds_a_planted_map():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(400, 6)) * [1, 10, 0.1, 1, 1, 1] + 3, rng.normal(size=(6, 2))
    weights, bias = probe.ridge(x, x @ w + [5, -5], alpha=1e-12)
    np.testing.assert_allclose(weights, w, atol=1e-6)
    np.testing.assert_allclose(bias, [5, -5], atol=1e-5)


def test_leaves_are_the_nodes_that_hold_no_other():
    text = PROGRAM.encode()
    found = [text[begin:end].decode() for begin, end, _ in probes.leaves(text)]
    assert found == ["a", "b", "'é'", "a", "0", "f'{b}!'"]
    paths = [path for _, _, path in probes.leaves(text)]
    assert probes.distance(paths[3], paths[4]) == 2  # Name, Subscript, Constant
    assert probes.distance(paths[4], paths[5]) == 3  # Constant, Subscript, BinOp, JoinedStr
    assert probes.distance(paths[0], paths[0]) == 0


def test_distances_are_those_of_the_shortest_path():
    """On a function of this file, by breadth-first search over the tree."""
    text = (ROOT / "tests/test_library_probes.py").read_bytes()
    tree, edges = ast.parse(text), {}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr_context | ast.operator):
                continue  # one node of the whole tree
            edges.setdefault(node, []).append(child)
            edges.setdefault(child, []).append(node)

    def at(path):
        node = tree
        for i in path:
            node = list(ast.iter_child_nodes(node))[i]
        return node

    own = probes.leaves(text)[40:60]
    for (_, _, one), (_, _, two) in zip(own, own[1:], strict=False):
        level, steps, seen = {at(one)}, 0, set()
        while at(two) not in level:
            seen |= level
            level = {other for node in level for other in edges[node]} - seen
            steps += 1
        assert probes.distance(one, two) == steps


def test_a_planted_tree_metric_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 12)).astype(np.float32)
    y = np.sum((x @ rng.normal(size=(12, 3)))**2, 1).astype(np.float32) / 4 + 2
    seen = np.arange(600) < 300
    said = np.asarray(probes.projected(x, y, seen, steps=2_000, decay=0.0))
    assert np.mean(np.abs(said - y)[~seen]) < 0.1 * y.std()
    noise = rng.permutation(y)
    assert abs(spearmanr(noise[~seen], np.asarray(probes.projected(x, noise, seen))[~seen])[0]) < 0.2


def test_neighbours_have_their_rows_spans_and_hashes_of_texts():
    texts = [b"a = b\n", b"x = a + b * 1\n", b"a = b"]
    ids, pairs = probes.neighbours(texts, 3, 12)
    assert ids.shape == (3, 12) and bytes(ids[1, 1:].astype(np.uint8)) == texts[1][:11]
    assert pairs[:, :5].tolist() == [[0, 0, 1, 4, 5], [1, 0, 1, 4, 5], [1, 4, 5, 8, 9], [2, 0, 1, 4, 5]]
    assert pairs[0, 6] == pairs[2, 6] == pairs[3, 6] != pairs[1, 6]


def test_tokens_have_the_places_and_classes_of_python():
    text = PROGRAM.encode()
    found = [(text[begin:begin + 3].decode("utf-8", "ignore"), classes.CLASSES[kind])
             for begin, kind in classes.tokens(text)]
    assert found[:4] == [("def", "keyword"), ("f(a", "name"), ("(a,", "operator"), ("a, ", "name")]
    assert ("0] ", "number") in found and found[-1][1] == "newline"
    assert ("'é", "string") in found


def test_the_discrimination_value_of_points_that_are_their_classes_is_minus_one():
    x = np.array([[1.0, 2, 5], [1, 2, 5], [3, 0, 1], [3, 0, 1]])
    kinds = np.array([0, 0, 1, 1])
    assert classes.discrimination(x, kinds) == pytest.approx(-1)
    assert classes.discrimination(7 * x - 3, kinds) == pytest.approx(-1)


def test_the_discrimination_value_is_the_closed_formula():
    rng = np.random.default_rng(0)
    x, kinds = rng.normal(size=(60, 5)) + 3, np.arange(60) % 3
    x[kinds == 1] += 2
    s = 0.5 * (x - x.mean(0)) / x.std(0)
    inner, outer = [], []
    for a in range(3):
        own = s[kinds == a]
        inner.append(np.mean([np.linalg.norm(p - q) for i, p in enumerate(own) for q in own[:i]]))
        outer += [np.mean([np.linalg.norm(p - q) for p in own for q in s[kinds == b]]) for b in range(a)]
    expected = (np.mean(inner) - np.mean(outer)) / 5**0.5
    assert classes.discrimination(x, kinds) == pytest.approx(expected, rel=1e-9)
    assert abs(classes.discrimination(rng.normal(size=(600, 5)), np.arange(600) % 3)) < 0.01


def test_six_classes_of_a_point_each_have_about_minus_four_fifths():
    """Squared distances of two points are D / 2 on average, those between classes 6 / 5 of that."""
    x = np.eye(6)[np.arange(600) % 6]
    assert classes.discrimination(x, np.arange(600) % 6) == pytest.approx(-0.6**0.5)


def test_a_token_has_the_state_that_is_read_before_it(monkeypatch):
    """States say which byte stands where; that of bos, which all rows have, is left out."""
    text, kept = b"if a:\n    return 12\n", []
    monkeypatch.setattr(classes, "states", lambda params, ids, config: np.eye(257)[[ids, ids]])
    monkeypatch.setattr(classes, "discrimination", lambda x, kinds: 0.0)
    monkeypatch.setattr(classes, "accuracy", lambda *given: kept.append(given) or 0.0)
    held_out = SimpleNamespace(texts=lambda: iter([text, text]))
    config = classes.study.arms["trained"]
    found = classes.by_block(None, None, config, lambda source, split: held_out)
    assert found["gdv/deeper"] == 0 and {"gdv/1", "probe/last", "gdv/shuffled"} < set(found)
    (x, kinds, seen), _ = kept
    names = [classes.CLASSES[kind] for kind in kinds]
    half = [(" ", "name"), ("a", "operator"), (":", "newline"), (" ", "keyword"), (" ", "number"),
            ("2", "newline")]
    said = [chr(i) for i in x.argmax(1)]
    assert list(zip(said, names, strict=True)) == half * 2
    assert seen.tolist() == [True] * 6 + [False] * 6


def test_accuracy_of_separable_classes_is_one():
    rng, kinds = np.random.default_rng(0), np.arange(300) % 6
    x = np.eye(6)[kinds] + 0.05 * rng.normal(size=(300, 6))
    assert classes.accuracy(x, kinds, np.arange(300) < 150) == 1.0


def test_the_middle_is_ahead_by_the_best_of_its_blocks_less_the_best_of_both_ends(monkeypatch):
    """States after the second of three blocks are planted distances, those of the others noise."""
    rng = np.random.default_rng(0)
    texts = [b"a = [%s]\n" % b", ".join(b"b" * (1 + i % 2) for i in range(n)) for n in rng.integers(3, 9, 60)]
    _, pairs = probes.neighbours(texts, 60, 64)
    planted = rng.normal(size=(4, 60, 64, 6)).astype(np.float32)
    planted[2] = 0
    for row, begin, end, second, last, apart, _ in pairs:
        planted[2, row, second + 1:last + 1, 0] = planted[2, row, begin + 1:end + 1, 0].mean() + apart**0.5
    monkeypatch.setattr(probes, "states", lambda *_: planted)
    config = replace(probes.trained, phases=(replace(probes.phase, seq=64),))
    held = type("Held", (), {"texts": lambda self: iter(texts)})()
    found = probes.syntax(None, None, config, lambda *_: held, n=60)
    tree = [found[f"tree/{block}"] for block in range(4)]
    assert found["tree/best"] == tree[2] == max(tree) > 0.8
    assert found["tree/middle"] == pytest.approx(max(tree[1:3]) - max(tree[0], tree[3]))
    assert found["tree/middle"] > 0.5


def test_as_many_functions_are_held_out_as_are_probed():
    data = probes.trained.data
    (source,) = data.sources.values()
    held = [d for d in source.documents() if split_in(d, source, data.dev, data.test) == 2]
    assert len(held) >= 400
