"""configs/ about data: curricula, selection, metadata, decomposition, related documents, mixtures."""
import itertools
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import prose

import data
import train
from lib.cache import Shard, build
from lib.config import ROOT, from_json, load_file, to_json
from lib.packing import DOCUMENT, LENGTH, QUIET, ROW, SEGMENT, START, one_per_row
from lib.tokenizers import Bytes

MODULES = [load_file(ROOT / f"configs/{name}.py") for name in (
    "curriculum", "selection", "metadata", "decomposition", "related", "mixtures")]
curriculum, selection, metadata, decomposition, related, mixtures = MODULES
one_per_row = one_per_row
PLAIN = train.Phase(steps=8, batch=4, seq=32)


def load(documents, *phases, **fields) -> data.Loader:
    """A loader of one source in bytes, all of it for training; `fields` are those of the source."""
    return load_all({"one": data.Source(documents, **fields)}, *phases)


def load_all(sources: dict, *phases, seed: int = 0, log=None) -> data.Loader:
    """A loader of several sources in bytes, all for training."""
    config = data.DataConfig(sources=sources, tokenizer="bytes", dev=0.0, test=0.0, window=1_000_000,
                             max_skipped=1.0)  # duplicates count as damage
    caches = {name: build(name, config, Bytes(), 0) for name in sources}
    made = data.Loader(caches, phases, config, Bytes(), seed)
    made.restore(made.start, log or [])
    return made


def some(number: int = 40):
    """Documents whose text says how long it is, with metadata."""
    for i in range(number):
        text = prose(i, 10 + 7 * i)
        yield data.Document(f"d{i}", text, dict(level=i % 5, domain=f"site{i % 3}"))


def everything_of(documents) -> data.Documents:
    """What a packing is told of the documents of a one-window source."""
    loader = load(documents, PLAIN)
    return loader.rows[0][0][0].window(0)[0]


# ------------------------------------------------------------------------------------------------- curriculum


@pytest.mark.parametrize("pacing, middle", [("linear", 0.5), ("root", math.sqrt(0.5)),
                                            ("exponential", 1 / (math.exp(5) + 1)), ("step", 0.0)])
def test_pacing_begins_with_the_first_share_and_ends_with_all(pacing, middle):
    share = partial(curriculum.share, pacing=pacing)
    assert share(0.0) == share(1 / 16) == 0.1 and share(7 / 8) == share(1.0) == 1
    assert share((1 / 16 + 7 / 8) / 2) == pytest.approx(0.1 + 0.9 * middle, abs=1e-12)
    along = [share(t) for t in np.linspace(0, 1, 101)]
    assert all(a <= b for a, b in itertools.pairwise(along))


@pytest.mark.parametrize("hard", [False, True])
def test_rows_are_drawn_from_a_pool_of_the_paced_size_and_all_at_the_end(hard):
    def drawn(t):
        found = {curriculum.paced(i, 50, t, (1, 0), "linear", 0.1, hard) for i in range(1_500)}
        return sorted(49 - place for place in found) if hard else sorted(found)

    middle = (1 / 16 + 7 / 8) / 2
    assert drawn(0.0) == list(range(5)) and drawn(middle) == list(range(28)) and drawn(1.0) == list(range(50))
    assert [curriculum.paced(i, 50, 1.0, (1, 0)) for i in range(9)] != [
        curriculum.paced(i, 50, 1.0, (2, 0)) for i in range(9)]


def test_sorted_once_takes_each_row_once_an_epoch_in_order():
    assert [curriculum.sorted_once(i, 4, 0.0, (0,)) for i in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [curriculum.sorted_once(i, 4, 0.0, (0,), hard=True) for i in range(6)] == [3, 2, 1, 0, 3, 2]


@pytest.mark.parametrize("inner", curriculum.PACKINGS)
def test_rows_are_sorted_by_the_mean_score_of_their_positions_and_hold_what_the_packing_gave(inner):
    documents = everything_of(partial(some, number=40))
    score = np.random.default_rng(0).random(40)
    lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
    plan = curriculum.PACKINGS[inner](lengths, 32)
    made = curriculum.sort_rows(plan, score)
    mean = [np.average(score[rows[:, DOCUMENT]], weights=rows[:, LENGTH]) for rows in
            (made[made[:, ROW] == r] for r in range(made[-1, ROW] + 1))]
    assert np.all(np.diff(mean) >= 0) and np.all(np.diff(made[:, ROW]) >= 0)
    before, after = (sorted(p[p[:, ROW] == r][:, 1:].tolist() for r in range(p[-1, ROW] + 1))
                     for p in (plan, made))
    assert before == after


@pytest.mark.parametrize("hard", [False, True])
def test_a_curriculum_s_batches_begin_with_the_shortest_documents(hard):
    phase = replace(PLAIN, packing=curriculum.easy_first, order=partial(curriculum.sorted_once, hard=hard))
    loader = load(partial(some, number=40), phase, score=curriculum.length)
    documents, _, plan = loader.rows[0][0][0].window(0)
    score = documents.of(lambda shard: shard.score)
    of_row = score[plan[np.unique(plan[:, ROW], return_index=True)[1], DOCUMENT]]
    assert np.all(np.diff(of_row) >= 0) and of_row[0] == score.min() < of_row[-1] == score.max()
    first = bytes(loader.batch(1).arrays["targets"][0][:10].astype(np.uint8)).decode()
    assert (first == prose(0, 10)) == (not hard)


def test_scores_of_a_document():
    easy, hard = data.Document("a", "aaaa " * 99, dict(level=3)), data.Document("b", prose(0, 495))
    assert curriculum.length(easy, [1, 2]) == 2
    assert curriculum.compressibility(easy, []) < 0.1 < 0.3 < curriculum.compressibility(hard, [])
    assert curriculum.field(easy, [], "level") == 3 and curriculum.field(hard, [], "level") == math.inf


def planted():
    """Three documents of common and one of rare bytes."""
    yield from (data.Document(str(i), "a" * 30) for i in range(3))
    yield data.Document("rare", "ab")


def test_rarity_is_the_mean_negative_log_frequency_of_tokens():
    documents = everything_of(planted)
    paths = [d["path"] for d in documents.of(Shard.documents)]
    found = dict(zip(paths, curriculum.rarity(documents), strict=True))
    a, b = -math.log(91 / 92), -math.log(1 / 92)
    assert found["0"] == pytest.approx(a) and found["rare"] == pytest.approx((a + b) / 2)
    plan = curriculum.easy_first(np.full(4, 31), 31, documents, by="rarity")
    assert paths[plan[-1, DOCUMENT]] == "rare"


def test_loss_under_a_checkpoint_is_that_of_its_model_over_its_own_tokens(monkeypatch):
    def apply(params, ids):
        logits = np.zeros((*ids.shape, 258))
        logits[..., ord("a")] = 3
        return logits

    monkeypatch.setattr(curriculum, "model_of", lambda run: (None, None, Bytes(), apply))
    total = math.log(257 + math.exp(3))
    found = curriculum.loss(data.Document("x", "aab"), [], run="somewhere")
    assert found == pytest.approx((2 * (total - 3) + 2 * total) / 4)  # a a b, and the end
    assert curriculum.loss(data.Document("x", "a" * 9), [], run="", context=4) == pytest.approx(total - 3)


@pytest.mark.parametrize("packing", [curriculum.easy_first, selection.top, selection.sampled,
                                     partial(selection.threshold, least=0.5)])
def test_what_needs_scores_is_refused_without_them(packing):
    with pytest.raises(data.InputError, match="has none"):
        load(partial(some, number=4), replace(PLAIN, packing=packing))


def test_names_that_are_not_known_are_refused_by_a_sentence():
    with pytest.raises(data.InputError, match="'cubic'; allowed are linear, root, exponential, step"):
        curriculum.share(0.5, "cubic")
    for packing in (curriculum.easy_first, selection.top):
        with pytest.raises(data.InputError, match="'worst_fit'.*allowed are concat, best_fit"):
            packing(np.full(3, 4), 4, scored([1, 2, 3]), packing="worst_fit")
    with pytest.raises(data.InputError, match="'word'; allowed are line, sentence"):
        metadata.shuffled_units(data.Document("p", "text"), None, "word")


# -------------------------------------------------------------------------------------------------- selection


class Scored(SimpleNamespace):
    """Documents of one shard, as a packing sees them."""

    def of(self, fact):
        return fact(self.shard)


def scored(score, name: str = "000003") -> Scored:
    shard = SimpleNamespace(score=np.asarray(score, np.float32), split=np.zeros(len(score), np.uint8),
                            directory=SimpleNamespace(name=name))
    return Scored(shard=shard)


def kept(plan: np.ndarray) -> list[int]:
    return np.unique(plan[:, DOCUMENT]).tolist()


@pytest.mark.parametrize("inner", selection.PACKINGS)
def test_top_and_threshold_keep_exactly_the_documents_that_score_highest(inner):
    score, lengths = np.array([0.3, 0.9, -1.0, 0.5, 0.9, 0.0]), np.array([10, 20, 30, 40, 50, 50])
    documents = scored(score)
    for share, expected in ((0.1, [1]), (0.35, [1, 4]), (0.36, [1, 3, 4]), (0.6, [0, 1, 3, 4]),
                            (1.0, [0, 1, 2, 3, 4, 5])):
        assert kept(selection.top(lengths, 16, documents, share, inner)) == expected
    plan = selection.threshold(lengths, 16, documents, 0.5, inner)
    assert kept(plan) == [1, 3, 4]
    whole = np.bincount(plan[:, DOCUMENT], plan[:, LENGTH], 6)
    assert whole.tolist() == [0, 20, 0, 40, 50, 0]
    assert np.all(np.bincount(plan[:, ROW], plan[:, LENGTH]) <= 16)
    assert len(selection.threshold(lengths, 16, documents, 2.0, inner)) == 0


def test_sampling_includes_documents_as_often_as_drawing_one_by_one_without_replacement():
    score = np.array([0.0, 1.0, 2.0, 3.0, 0.5])
    documents, lengths, temperature = scored(score), np.full(5, 4), 0.7
    chance = np.exp((score - score.mean()) / score.std() / temperature)
    expected = np.zeros(5)
    for order in itertools.permutations(range(5), 2):  # two of five
        left, p = chance.sum(), 1.0
        for i in order:
            p, left = p * chance[i] / left, left - chance[i]
        expected[list(order)] += p
    draws, found = 4_000, np.zeros(5)
    for seed in range(draws):
        found[kept(selection.sampled(lengths, 16, documents, 0.4, temperature, seed))] += 1
    assert expected.sum() == pytest.approx(2) and found.sum() == 2 * draws
    assert np.all(np.abs(found / draws - expected) < 4 * np.sqrt(expected * (1 - expected) / draws))


def test_sampling_is_the_seed_s_own_and_of_the_document_not_of_the_order():
    documents, lengths = scored(np.zeros(50)), np.full(50, 4)
    first = kept(selection.sampled(lengths, 16, documents, 0.5, 2.0, 1))
    assert first == kept(selection.sampled(lengths, 16, documents, 0.5, 2.0, 1)) and len(first) == 25
    assert first != kept(selection.sampled(lengths, 16, documents, 0.5, 2.0, 2))
    assert first != kept(selection.sampled(lengths, 16, scored(np.zeros(50), "000004"), 0.5, 2.0, 1))
    cold = scored(np.arange(50.0))
    assert kept(selection.sampled(lengths, 16, cold, 0.5, 1e-6)) == list(range(25, 50))
    by_seed = []
    for seed in (0, 1):  # of the run: it permutes the documents
        source = {"one": data.Source(partial(some, number=40), score=curriculum.length)}
        loader = load_all(source, replace(PLAIN, packing=partial(selection.sampled, share=0.5)), seed=seed)
        documents, _, plan = loader.rows[0][0][0].window(0)
        by_seed.append({documents.of(Shard.documents)[i]["path"] for i in kept(plan)})
    assert by_seed[0] == by_seed[1]


COPIES = [data.Document("a", prose(1, 900)), data.Document("b", prose(2, 900)),
          data.Skipped("c", "unreadable"), data.Document("d", prose(1, 900)),
          data.Document("e", prose(3, 900)), data.Document("f", prose(2, 900) + " planted"),
          data.Document("g", ""), data.Document("h", "")]


def copies():
    yield from COPIES


def test_exact_duplicates_are_skipped_and_counted():
    found = list(selection.distinct(COPIES))
    assert found == [data.Skipped("d", "duplicate") if d.path == "d" else d for d in COPIES]


def distinct_copies():
    return selection.distinct(copies())


def test_the_cache_counts_duplicates():
    loader = load(distinct_copies, PLAIN)
    counts = loader.rows[0][0][0].cache.total["counts"]
    assert counts["skipped: duplicate"] == 1 and counts["documents"] == 4


def test_near_duplicates_are_found_and_others_kept():
    pytest.importorskip("datasketch", reason="near duplicates need datasketch")
    texts = [prose(seed, 1_500) for seed in range(30)]
    changed = [t[:700] + " something else " + t[700:] for t in texts[:10]]
    documents = [data.Document(str(i), t) for i, t in enumerate(texts + changed)]
    found = list(selection.distinct(documents, near=0.8))
    assert found[:30] == documents[:30]
    assert found[30:] == [data.Skipped(str(i), "near-duplicate") for i in range(30, 40)]
    assert [d.kind for d in selection.distinct(COPIES, near=0.8) if isinstance(d, data.Skipped)] == [
        "unreadable", "duplicate", "near-duplicate"]


def test_near_duplicates_without_the_library_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(data.InputError, match="pip install datasketch"):
        list(selection.distinct(COPIES, near=0.8))


# --------------------------------------------------------------------------------------------------- metadata

FRONT = partial(metadata.in_front, template="URL: {domain}\n\n")


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
    made = metadata.in_front(data.Document("p", "text", {}), None, "URL: {domain}\n\n")
    assert (made.prefix, made.text) == ("URL: \n\n", "text")
    known = data.Document("p", "text", dict(domain="x"))
    made = metadata.tagged(known, None, "<{domain} {path}>", "</{domain}>")
    assert (made.prefix, made.text) == ("", "<x p>text</x>")


@pytest.mark.parametrize("unit, text, units", [
    ("line", "one\ntwo\n\nthree", ["one\n", "two\n", "\n", "three"]),
    ("sentence", "One. Two? Three", ["One.", " Two?", " Three"])])
def test_shuffled_units_keep_every_character(unit, text, units):
    made = metadata.shuffled_units(data.Document("p", text, dict(a=1)), np.random.default_rng(0), unit, 4)
    assert [d.path for d in made] == ["p", "p#1", "p#2", "p#3"] and made[0].text == text
    orders = {"".join(order) for order in itertools.permutations(units)}
    assert all(d.text in orders and d.meta == dict(a=1) for d in made) and len({d.text for d in made}) > 2


def test_told_documents_are_those_of_the_library_with_their_package_in_front():
    plain, told = (list(itertools.islice(f, 20)) for f in (data.stdlib(), metadata.told("URL: {domain}\n\n")))
    assert [replace(d, prefix="") for d in told] == plain
    assert [d.prefix for d in told] == [f"URL: {d.meta['domain']}\n\n" for d in plain]


def test_metadata_then_plain_changes_sources_after_nine_tenths():
    config = metadata.arms["metadata_then_plain"]
    steps = [p.steps for p in config.phases]
    assert steps == [540, 60] and [p.mixture for p in config.phases] == [{"told": 1.0}, {"plain": 1.0}]
    assert {sum(p.steps for p in arm.phases) for arm in metadata.arms.values()} == {600}
    sources = dict(plain=data.Source(partial(some, number=12)),
                   told=data.Source(partial(some, number=12), prepare=FRONT))
    loader = load_all(sources, *(replace(p, steps=n, batch=2, seq=64)
                                 for p, n in zip(config.phases, (9, 1), strict=True)))
    drawn = [loader.batch(step) for step in range(1, 11)]
    assert [set(b.arrays["source"].ravel()) for b in drawn] == [{1}] * 9 + [{0}]
    assert drawn[0].metrics["data/told/rows"] == 2 and drawn[9].metrics["data/plain/rows"] == 2


# ---------------------------------------------------------------------------------------------- decomposition


def pieces_of(length: int, least: int, longest: int) -> list[int]:
    """The pieces of one document, in the order of their starts, checked to follow each other."""
    seqs = [2**k for k in range(least.bit_length() - 1, longest.bit_length())]
    plans = [decomposition.power_of_two(np.array([3, length]), seq, longest) for seq in seqs]
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
        plan = decomposition.power_of_two(lengths, seq, 32)
        assert np.array_equal(plan[:, ROW], np.arange(len(plan))) and np.all(plan[:, LENGTH] == seq)
        assert np.all(plan[:, SEGMENT] == 1) and not plan[:, QUIET].any()
        for _, _, document, start, length, _ in plan:
            taken[document][start:start + length] += 1
    for n, t in zip(lengths, taken, strict=True):
        assert t.tolist() == [1] * (n // 4 * 4) + [0] * (n % 4)
    with pytest.raises(data.InputError, match="powers of two up to 32"):
        decomposition.power_of_two(lengths, 24, 32)


def test_a_phase_s_batches_hold_pieces_of_one_length_and_no_padding():
    shares = dict(lengths=[8, 16, 32], shares=[0.2, 0.3, 0.5])
    phase = replace(PLAIN, steps=40, packing=partial(decomposition.power_of_two, longest=32),
                    lengths=partial(decomposition.uniform, **shares))
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
    grow = partial(decomposition.grow_p2, lengths=[1, 2, 4, 8], shares=shares, odds=odds, cycles=8)
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


# -------------------------------------------------------------------------------------------------- related


def topics(number: int = 8, each: int = 30):
    """Documents of planted topics, each with letters of its own beside common ones."""
    rng = np.random.default_rng(0)
    for i in range(number * each):
        own = [chr(97 + 3 * (i % number) + j) for j in range(3)]
        yield data.Document(f"t{i}", "".join(rng.choice([*own, *"0123456789"], 80)), dict(topic=i % number))


def test_the_path_goes_through_every_document_once_from_like_to_like():
    documents = everything_of(topics)
    ids = [np.asarray(documents.ids(i), np.int64) for i in range(240)]
    vectors = related.tf_idf(ids)
    near = related.neighbours(vectors, 10)
    like = vectors @ vectors.T
    for i in range(240):
        assert i not in near[i]
        others = np.delete(like[i], i)
        assert like[i][near[i]] == pytest.approx(np.sort(others)[::-1][:10], abs=1e-6)
    path = related.path(near, 21)
    assert sorted(path) == list(range(240)) and path == related.path(near, 21)
    along = np.mean([like[a, b] for a, b in itertools.pairwise(path)])
    chance = np.mean([like[i, i + 1] for i in range(239)])
    assert along >= 3 * chance
    topic = [d["meta"]["topic"] for d in documents.of(Shard.documents)]
    assert np.mean([topic[a] == topic[b] for a, b in itertools.pairwise(path)]) > 0.85


def test_a_cluster_ends_at_its_size_or_where_no_neighbour_is_left():
    near = np.array([[1], [2], [3], [0], [3]])
    assert related.path(near, 21) == [0, 1, 2, 3, 4] and related.path(near, 2) == [0, 1, 2, 3, 4]
    near = np.array([[4], [0], [0], [1], [2]])
    assert related.path(near, 21) == [0, 4, 2, 1, 3] and related.path(near, 2) == [0, 4, 1, 2, 3]
    assert related.path(np.zeros((1, 0), int), 3) == [0]
    assert related.neighbours(np.ones((1, 2)), 10).shape == (1, 0)


def test_consecutive_near_copies_leave_the_path():
    ids = [np.arange(100), np.arange(100) + 1, np.arange(50), np.arange(100), np.zeros(0, int), np.array([7])]
    assert related.distinct([0, 1, 2, 3, 4, 5], ids, 0.85) == [0, 2, 3, 4, 5]  # 97 of 99 runs, 48 of 98
    assert related.distinct([0, 1, 3], ids, 0.99) == [0, 1, 3]


def test_related_rows_hold_every_document_whole_in_the_path_s_order():
    phase = replace(PLAIN, packing=related.related, objective=related.one_segment)
    loaders = [load(topics, phase) for _ in range(2)]
    documents, lengths, plan = loaders[0].rows[0][0][0].window(0)
    assert np.array_equal(np.bincount(plan[:, DOCUMENT], plan[:, LENGTH]), lengths)
    assert np.array_equal(plan, related.related(lengths, 32, documents))
    for step in (1, 5):
        batch, again = (loader.batch(step) for loader in loaders)
        assert all(np.array_equal(batch.arrays[k], again.arrays[k]) for k in batch.arrays)
        assert set(np.unique(batch.arrays["segments"])) <= {0, 1}


# -------------------------------------------------------------------------------------------------- mixtures


def shares_of(weights: dict) -> list[float]:
    return [w / sum(weights.values()) for w in weights.values()]


def test_the_steered_rule_is_skill_it_s():
    graph = [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    names = list("abcde")
    rule = partial(mixtures.steered, 0.5, names=names, graph=graph, eta=0.5)
    first, second = dict.fromkeys(names, 2.0), dict(zip(names, (0.1, 1, 2, 2, 2), strict=True))
    assert shares_of(rule([])) == pytest.approx([.163, .346, .163, .163, .163], abs=6e-4)
    assert shares_of(rule([first])) == pytest.approx([.118, .528, .118, .118, .118], abs=6e-4)
    assert shares_of(rule([first, second])) == pytest.approx([.035, .691, .091, .091, .091], abs=6e-4)
    assert rule([second, first, first, first]) == rule([first] * 3)  # a window of three
    alone = mixtures.steered(0.5, [dict(a=1.0, b=3.0)], ["a", "b"], eta=0.5)
    assert alone["b"] / alone["a"] == pytest.approx(math.e)


def test_the_moving_mixture_goes_from_first_to_last():
    moving = partial(mixtures.moving, log=[], first=dict(a=0.2, b=0.8), last=dict(a=0.6, b=0.4))
    assert [moving(t)["a"] for t in (0, 0.5, 1)] == pytest.approx([0.2, 0.4, 0.6])
    assert sum(moving(0.3).values()) == pytest.approx(1)


def test_a_problem_is_a_document_with_its_hints(tmp_path):
    lines = [json.dumps(dict(problem="1 + 1?", hints=["= 2", "done"])), "{", '{"problem": "no hints"}']
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    assert list(mixtures.problems(str(tmp_path / "some.jsonl"))) == [
        data.Document("some.jsonl#1", "1 + 1?\n= 2\ndone"), data.Skipped("some.jsonl#2", "malformed JSON"),
        data.Skipped("some.jsonl#3", "missing key", "no key 'hints'; the record has the keys 'problem'")]


def test_a_steered_loader_draws_by_its_log():
    names = ["a", "b"]
    sources = {n: data.Source(partial(some, number=20 + i)) for i, n in enumerate(names)}
    phase = replace(PLAIN, steps=20, batch=8, steer=10,
                    mixture=partial(mixtures.steered, names=names, eta=math.log(3) / 2))
    rows = [[load_all(sources, phase, log=[log]).batch(step).metrics["data/b/rows"] for step in (1, 15)]
            for log in ([dict(a=1.0, b=3.0)], [dict(a=3.0, b=1.0)])]
    assert rows == [[4, 6], [4, 2]]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rsplit("_", 1)[0])
def test_every_arm_is_a_valid_config_that_can_be_written_down(module):
    for config in module.arms.values():
        train.check(config)
        written = json.loads(json.dumps(to_json(config)))
        assert to_json(from_json(train.Config, written)) == to_json(config)
