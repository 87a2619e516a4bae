"""configs/context/: truncation, metadata, dataset decomposition, related documents."""
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import conftest
import numpy as np
import pytest
from data_cases import PLAIN, everything_of, load, load_all, some

import data
from lib.cache import Shard
from lib.config import ROOT, load_file
from lib.objectives import one_segment
from lib.packing import DOCUMENT, LENGTH, QUIET, ROW, SEGMENT, START, one_per_row

CHAPTER = ROOT / "configs/context"
dataset_decomposition, in_context, meco, truncation = (
    load_file(CHAPTER / f"{name}.py")
    for name in ("dataset_decomposition", "in_context_pretraining", "meco", "truncation"))

# --------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9])
def test_the_closed_form_of_truncation_is_what_enumeration_gives(p):
    for m in range(9):
        joint = np.zeros((2**m, 2))  # of the bits seen and the next one
        for first, *bits in itertools.product((0, 1), repeat=m + 2):
            chance = 0.5 * math.prod(p if bit == first else 1 - p for bit in bits)
            joint[int("0" + "".join(map(str, bits[:-1])), 2), bits[-1]] += chance
        nats = -np.sum(joint * np.log(joint / joint.sum(1, keepdims=True)))
        assert truncation.closed_form(m, p) == pytest.approx(nats, abs=1e-12)


def test_the_closed_form_of_truncation_is_the_paper_s():
    table = {0.6: [.6931, .6923, .6916, .6903, .6880, .6846, .6803, .6762],
             0.75: [.6931, .6616, .6417, .6148, .5871, .5686, .5628, .5623],
             0.9: [.6931, .4714, .4085, .3493, .3275, .3251, .3251, .3251]}
    for p, losses in table.items():
        found = [truncation.closed_form(m, p) for m in (0, 1, 2, 4, 8, 16, 32, 64)]
        assert found == pytest.approx(losses, abs=6e-5)
    assert truncation.entropy(0.75) == pytest.approx(0.5623, abs=5e-5)


def test_the_process_keeps_its_first_bit_with_probability_p():
    for truncated, agree in ((False, 0.8), (True, 0.8**2 + 0.2**2)):
        documents = list(truncation.process(20_000, 0.8, truncated))
        bits = np.array([[int(c) for c in d.text] for d in documents])
        assert bits.shape == (20_000, 15) and len({d.path for d in documents}) == 20_000
        assert bits[:, 0].mean() == pytest.approx(0.5, abs=0.015)
        assert np.mean(bits[:, 1:] == bits[:, :1], 0) == pytest.approx(np.full(14, agree), abs=0.015)
        assert np.mean(bits[:, 3] == bits[:, 9]) == pytest.approx(0.8**2 + 0.2**2, abs=0.015)


@pytest.mark.parametrize("truncated", [False, True])
def test_the_evaluation_gives_a_model_that_knows_the_process_what_is_expected(truncated):
    def apply(params, ids, p=0.75):
        """Logits of what is best: X0 counts for certain where it is there, all bits seen alike elsewhere."""
        ones = np.cumsum(ids[:, 1:] == ord("1"), 1)
        seen = np.arange(1, ids.shape[1])
        if truncated:
            lead = (2 * ones - seen) * np.log(p / (1 - p))
            one = p / (1 + np.exp(-lead)) + (1 - p) / (1 + np.exp(lead))
        else:
            one = np.where(ids[:, 1:2] == ord("1"), p, 1 - p) * np.ones_like(seen)
        one = np.concatenate([np.full((len(ids), 1), 0.5), one], 1)
        logits = np.full((*ids.shape, 258), -100.0)
        logits[..., ord("0")], logits[..., ord("1")] = np.log(1 - one), np.log(one)
        return logits

    found = truncation.by_position(None, apply, 0.75, truncated)
    assert found["truncation/largest_error"] < 1e-9 and found["truncation/m0"] == pytest.approx(np.log(2))
    assert found["truncation/m2"] == pytest.approx(0.6417 if truncated else 0.5623, abs=5e-5)


@pytest.mark.study
@pytest.mark.parametrize("arm", ["full", "truncated"])
def test_truncation_trained_is_within_a_hundredth_of_the_closed_form(arm, tmp_path, request):
    file = str(ROOT / "configs/context/truncation.py")
    line = [sys.executable, str(ROOT / "train.py"), f"{file}:{arm}", "--runs", str(tmp_path)]
    env = os.environ | conftest.USERS  # one device, as anyone would run it
    subprocess.run(line, env=env, check=True, stdout=subprocess.DEVNULL)
    rows = (tmp_path / f"truncation-{arm}/metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, rows) if "truncation/m2" in row][-1]
    for m in (2, 8):
        expected = truncation.closed_form(m, 0.75) if arm == "truncated" else truncation.entropy(0.75)
        assert last[f"truncation/m{m}"] == pytest.approx(expected, abs=0.01)
    assert last["step"] == 1_500 and last["truncation/largest_error"] < 0.01


# --------------------------------------------------------------------------------------------- meco

FRONT = partial(meco.in_front, template="URL: {domain}\n\n")


def test_a_prefix_is_read_but_not_predicted_and_the_text_s_first_token_is_the_first_predicted():
    phase = replace(PLAIN, steps=12, batch=1, seq=256, packing=one_per_row)
    loader = load(partial(some, number=12), phase, prepare=FRONT)
    prefixes, seen = {d.text: f"URL: {d.meta['domain']}\n\n" for d in some(12)}, set()
    for step in range(1, 13):
        row = {k: v[0] for k, v in loader.batch(step).arrays.items()}
        real = row["segments"] > 0
        tokens, targets, weights = (row[k][real].tolist() for k in ("tokens", "targets", "weights"))
        text = bytes(t for t, w in zip(targets, weights, strict=True) if w and t < 256)
        prefix = prefixes[text.decode()].encode()
        n = len(prefix)
        assert weights == [0] * n + [1] * (len(text) + 1) and not row["weights"][~real].any()
        assert tokens == [256, *prefix, *text] and targets == [*prefix, *text, 257] and targets[n] == text[0]
        seen.add(text.decode())
    assert seen == set(prefixes)


@pytest.mark.parametrize("seq", [3, 7, 32])
def test_where_a_prefix_is_cut_all_of_it_still_weighs_nothing(seq):
    loader = load(partial(some, number=12), replace(PLAIN, steps=1, batch=1, seq=seq), prepare=FRONT)
    rows = loader.rows[0][0][0].epoch
    loader = load(partial(some, number=12), replace(PLAIN, steps=rows, batch=1, seq=seq), prepare=FRONT)
    batches = [loader.batch(step).arrays for step in range(1, rows + 1)]
    texts = sum(len(d.text.encode()) + 1 for d in some(12))
    assert sum(int(b["weights"].sum()) for b in batches) == texts
    assert sum(int((b["segments"] > 0).sum()) for b in batches) == texts + 12 * len("URL: site0\n\n")
    quiet = Counter(t for b in batches for t, w, s in zip(*(b[k][0].tolist() for k in (
        "targets", "weights", "segments")), strict=True) if s and not w)
    assert quiet == Counter("".join(f"URL: {d.meta['domain']}\n\n" for d in some(12)).encode())


def test_what_a_template_misses_is_empty():
    made = meco.in_front(data.Document("p", "text", {}), None, "URL: {domain}\n\n")
    assert (made.prefix, made.text) == ("URL: \n\n", "text")
    known = data.Document("p", "text", dict(domain="x"))
    made = meco.tagged(known, None, "<{domain} {path}>", "</{domain}>")
    assert (made.prefix, made.text) == ("", "<x p>text</x>")


@pytest.mark.parametrize("unit, text, units", [
    ("line", "one\ntwo\n\nthree", ["one\n", "two\n", "\n", "three"]),
    ("sentence", "One. Two? Three", ["One.", " Two?", " Three"])])
def test_shuffled_units_keep_every_character(unit, text, units):
    made = meco.shuffled_units(data.Document("p", text, dict(a=1)), np.random.default_rng(0), unit, 4)
    assert [d.path for d in made] == ["p", "p#1", "p#2", "p#3"] and made[0].text == text
    orders = {"".join(order) for order in itertools.permutations(units)}
    assert all(d.text in orders and d.meta == dict(a=1) for d in made) and len({d.text for d in made}) > 2


def test_told_documents_are_those_of_the_library_with_their_package_in_front():
    plain, told = (list(itertools.islice(f, 20)) for f in (data.stdlib(), meco.told("URL: {domain}\n\n")))
    assert [replace(d, prefix="") for d in told] == plain
    assert [d.prefix for d in told] == [f"URL: {d.meta['domain']}\n\n" for d in plain]


def test_metadata_then_plain_changes_sources_after_nine_tenths():
    config = meco.study.arms["metadata_then_plain"]
    steps = [p.steps for p in config.phases]
    assert steps == [180, 20] and [p.mixture for p in config.phases] == [{"told": 1.0}, {"plain": 1.0}]
    assert {sum(p.steps for p in arm.phases) for arm in meco.study.arms.values()} == {200}
    sources = dict(plain=data.Source(partial(some, number=12)),
                   told=data.Source(partial(some, number=12), prepare=FRONT))
    loader = load_all(sources, *(replace(p, steps=n, batch=2, seq=64)
                                 for p, n in zip(config.phases, (9, 1), strict=True)))
    drawn = [loader.batch(step) for step in range(1, 11)]
    assert [set(b.arrays["source"].ravel()) for b in drawn] == [{1}] * 9 + [{0}]
    assert drawn[0].metrics["data/told/rows"] == 2 and drawn[9].metrics["data/plain/rows"] == 2


def test_a_unit_that_is_not_known_is_refused_by_a_sentence():
    with pytest.raises(data.InputError, match="'word'; allowed are line, sentence"):
        meco.shuffled_units(data.Document("p", "text"), None, "word")


# ---------------------------------------------------------------------------- dataset_decomposition


def pieces_of(length: int, least: int, longest: int) -> list[int]:
    """The pieces of one document, in the order of their starts, checked to follow each other."""
    seqs = [2**k for k in range(least.bit_length() - 1, longest.bit_length())]
    plans = [dataset_decomposition.power_of_two(np.array([3, length]), seq, longest) for seq in seqs]
    found = sorted((int(p[START]), int(p[LENGTH])) for plan in plans for p in plan)
    assert [start for start, _ in found] == np.cumsum([0] + [n for _, n in found])[:-1].tolist()
    return [n for _, n in found]


@pytest.mark.parametrize("tokens, pieces, left", [
    (256, [], 256), (257, [256], 0), (258, [256], 1), (1_000, [512, 256], 230),
    (5_000, [4096, 512, 256], 133), (20_000, [8192, 8192, 2048, 1024, 512], 27)])
def test_decomposition_of_the_paper_s_documents(tokens, pieces, left):
    """The paper counts tokens, ends included, and takes 2^k + 1 of them a piece; positions are one fewer."""
    positions = tokens - 1
    assert pieces_of(positions, 256, 8192) == pieces
    assert positions - sum(pieces) == left + len(pieces) - 1  # ours lose no token at a cut


def test_decomposition_takes_every_position_but_the_last_few_once():
    lengths = np.random.default_rng(0).lognormal(4, 1.5, 500).astype(np.int64) + 1
    taken = [np.zeros(n, int) for n in lengths]
    for seq in (4, 8, 16, 32):
        plan = dataset_decomposition.power_of_two(lengths, seq, 32)
        assert np.array_equal(plan[:, ROW], np.arange(len(plan))) and np.all(plan[:, LENGTH] == seq)
        assert np.all(plan[:, SEGMENT] == 1) and not plan[:, QUIET].any()
        for _, _, document, start, length, _ in plan:
            taken[document][start:start + length] += 1
    for n, t in zip(lengths, taken, strict=True):
        assert t.tolist() == [1] * (n // 4 * 4) + [0] * (n % 4)
    with pytest.raises(data.InputError, match="powers of two up to 32"):
        dataset_decomposition.power_of_two(lengths, 24, 32)


def test_a_phase_s_batches_hold_pieces_of_one_length_and_no_padding():
    shares = dict(lengths=[8, 16, 32], shares=[0.2, 0.3, 0.5])
    phase = replace(PLAIN, steps=40, packing=partial(dataset_decomposition.power_of_two, longest=32),
                    lengths=partial(dataset_decomposition.uniform, **shares))
    loader = load(partial(some, number=40), phase)
    shapes = []
    for step in range(1, 41):
        batch = loader.batch(step)
        shapes.append(batch.arrays["tokens"].shape)
        assert batch.metrics["data/waste"] == 0 and np.all(batch.arrays["segments"] == 1)
        assert np.array_equal(batch.arrays["positions"][0], np.arange(shapes[-1][1]))
    assert [shapes.count(s) for s in ((16, 8), (8, 16), (4, 32))] == [8, 12, 20]


def test_grow_p2_gives_each_length_its_share_a_cycle_short_ones_first():
    shares, odds = [0.1, 0.2, 0.3, 0.4], [8, 4, 2, 1]
    grow = partial(dataset_decomposition.grow_p2, lengths=[1, 2, 4, 8], shares=shares, odds=odds, cycles=8)
    assert grow(0.0) == grow(0.125) == {1: 8, 2: 4, 4: 2, 8: 1} and grow(0.1249) == {1: 0, 2: 0, 4: 0, 8: 1}
    # the first is used up at s = 0.1 / 8, when 15 s = 0.1875 of the cycle is drawn
    assert grow(0.187 / 8)[1] == 8 and grow(0.188 / 8)[1] == 0
    ts = (np.arange(80_000) + 0.5) / 80_000
    total = np.zeros(4)
    for t in ts[:10_000]:  # one cycle
        weights = np.array(list(grow(t).values()))
        total += weights / weights.sum()
    assert total / 10_000 == pytest.approx(shares, abs=1e-3)
    phase = replace(PLAIN, steps=800, lengths=grow)
    lengths, picks = data.batch_lengths(phase)
    assert np.bincount(picks) / 800 == pytest.approx(shares, abs=0.01) and lengths == [1, 2, 4, 8]
    assert np.mean(picks[:20]) < np.mean(picks[80:100])


# --------------------------------------------------------------------------- in_context_pretraining


def topics(number: int = 8, each: int = 30):
    """Documents of planted topics, each with letters of its own beside common ones."""
    rng = np.random.default_rng(0)
    for i in range(number * each):
        own = [chr(97 + 3 * (i % number) + j) for j in range(3)]
        yield data.Document(f"t{i}", "".join(rng.choice([*own, *"0123456789"], 80)), dict(topic=i % number))


def test_the_path_goes_through_every_document_once_from_like_to_like():
    documents = everything_of(topics)
    ids = [np.asarray(documents.ids(i), np.int64) for i in range(240)]
    vectors = in_context.tf_idf(ids)
    near = in_context.neighbours(vectors, 10)
    like = vectors @ vectors.T
    for i in range(240):
        assert i not in near[i]
        others = np.delete(like[i], i)
        assert like[i][near[i]] == pytest.approx(np.sort(others)[::-1][:10], abs=1e-6)
    path = in_context.path(near, 21)
    assert sorted(path) == list(range(240)) and path == in_context.path(near, 21)
    along = np.mean([like[a, b] for a, b in itertools.pairwise(path)])
    chance = np.mean([like[i, i + 1] for i in range(239)])
    assert along >= 3 * chance
    topic = [d["meta"]["topic"] for d in documents.of(Shard.documents)]
    assert np.mean([topic[a] == topic[b] for a, b in itertools.pairwise(path)]) > 0.85


def test_a_cluster_ends_at_its_size_or_where_no_neighbour_is_left():
    near = np.array([[1], [2], [3], [0], [3]])
    assert in_context.path(near, 21) == [0, 1, 2, 3, 4] and in_context.path(near, 2) == [0, 1, 2, 3, 4]
    near = np.array([[4], [0], [0], [1], [2]])
    assert in_context.path(near, 21) == [0, 4, 2, 1, 3] and in_context.path(near, 2) == [0, 4, 1, 2, 3]
    assert in_context.path(np.zeros((1, 0), int), 3) == [0]
    assert in_context.neighbours(np.ones((1, 2)), 10).shape == (1, 0)


def test_consecutive_near_copies_leave_the_path():
    ids = [np.arange(100), np.arange(100) + 1, np.arange(50), np.arange(100), np.zeros(0, int), np.array([7])]
    assert in_context.distinct([0, 1, 2, 3, 4, 5], ids, 0.85) == [0, 2, 3, 4, 5]  # 97 of 99 runs, 48 of 98
    assert in_context.distinct([0, 1, 3], ids, 0.99) == [0, 1, 3]


def test_related_rows_hold_every_document_whole_in_the_path_s_order():
    phase = replace(PLAIN, packing=in_context.related, objective=one_segment)
    loaders = [load(topics, phase) for _ in range(2)]
    documents, lengths, plan = loaders[0].rows[0][0][0].window(0)
    assert np.array_equal(np.bincount(plan[:, DOCUMENT], plan[:, LENGTH]), lengths)
    assert np.array_equal(plan, in_context.related(lengths, 32, documents))
    for step in (1, 5):
        batch, again = (loader.batch(step) for loader in loaders)
        assert all(np.array_equal(batch.arrays[k], again.arrays[k]) for k in batch.arrays)
        assert set(np.unique(batch.arrays["segments"])) <= {0, 1}
