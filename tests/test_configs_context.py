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
from data_cases import PLAIN, everything_of, load, load_all, only_rows, only_window, some

import data
from lib.cache import Shard
from lib.config import ROOT, load_file
from lib.objectives import one_segment
from lib.packing import DOCUMENT, LENGTH, QUIET, ROW, SEGMENT, START, one_per_row
from lib.tokenizers import Bytes

pytestmark = pytest.mark.library

CHAPTER = ROOT / "configs/context"
dataset_decomposition = load_file(CHAPTER / "dataset_decomposition.py")
in_context = load_file(CHAPTER / "in_context_pretraining.py")
meco = load_file(CHAPTER / "meco.py")
truncation = load_file(CHAPTER / "truncation.py")

# --------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9])
def test_the_closed_form_of_truncation_is_what_enumeration_gives(p):
    for m in range(9):
        joint = np.zeros((2**m, 2))  # of the m bits seen and the next one
        sequences = itertools.product((0, 1), repeat=m + 2)
        for first, *bits in sequences:
            chances = [p if bit == first else 1 - p for bit in bits]
            *seen, following = bits
            seen_as_number = int("0" + "".join(map(str, seen)), 2)
            joint[seen_as_number, following] += 0.5 * math.prod(chances)

        conditional = joint / joint.sum(1, keepdims=True)
        nats = -np.sum(joint * np.log(conditional))

        assert truncation.closed_form(m, p) == pytest.approx(nats, abs=1e-12)


def test_the_closed_form_of_truncation_gives_the_table_of_the_paper():
    seen = (0, 1, 2, 4, 8, 16, 32, 64)
    table = {
        0.6: [.6931, .6923, .6916, .6903, .6880, .6846, .6803, .6762],
        0.75: [.6931, .6616, .6417, .6148, .5871, .5686, .5628, .5623],
        0.9: [.6931, .4714, .4085, .3493, .3275, .3251, .3251, .3251],
    }

    for p, losses in table.items():
        found = [truncation.closed_form(m, p) for m in seen]
        assert found == pytest.approx(losses, abs=6e-5)
    assert truncation.entropy(0.75) == pytest.approx(0.5623, abs=5e-5)


@pytest.mark.parametrize("truncated", [False, True])
def test_the_process_keeps_its_first_bit_with_probability_p(truncated):
    two_copies_agree = 0.8**2 + 0.2**2
    agrees_with_first = two_copies_agree if truncated else 0.8
    approx = partial(pytest.approx, abs=0.015)

    documents = list(truncation.process(20_000, 0.8, truncated))
    rows = [list(map(int, document.text)) for document in documents]
    bits = np.array(rows)

    assert bits.shape == (20_000, 15)
    assert len({document.path for document in documents}) == 20_000
    first, others = bits[:, :1], bits[:, 1:]
    assert first.mean() == approx(0.5)
    agreement = np.mean(others == first, 0)
    assert agreement == approx(np.full(14, agrees_with_first))
    agreement = np.mean(bits[:, 3] == bits[:, 9])
    assert agreement == approx(two_copies_agree)


def chance_of_one(ids, p: float, truncated: bool) -> np.ndarray:
    """The best prediction that the next bit is 1, after each bit of the rows of ids.

    Where the first bit is in the row, it alone decides; in a truncated row all bits seen decide.
    """
    seen = np.arange(1, ids.shape[1])
    if not truncated:
        first_is_one = ids[:, 1:2] == ord("1")
        return np.where(first_is_one, p, 1 - p) * np.ones_like(seen)
    ones = np.cumsum(ids[:, 1:] == ord("1"), 1)
    zeros = seen - ones
    log_odds = (ones - zeros) * np.log(p / (1 - p))
    first_was_one = 1 / (1 + np.exp(-log_odds))
    first_was_zero = 1 / (1 + np.exp(log_odds))
    return p * first_was_one + (1 - p) * first_was_zero


@pytest.mark.parametrize("truncated", [False, True])
def test_the_evaluation_gives_the_expected_loss_to_a_model_that_knows_the_process(truncated):
    def apply(params, ids, p=0.75):
        before_any_bit = np.full((len(ids), 1), 0.5)
        after_bits = chance_of_one(ids, p, truncated)
        one = np.concatenate([before_any_bit, after_bits], 1)
        logits = np.full((*ids.shape, 258), -100.0)
        logits[..., ord("0")] = np.log(1 - one)
        logits[..., ord("1")] = np.log(one)
        return logits

    found = truncation.by_position(None, apply, 0.75, truncated)

    after_two_bits = 0.6417 if truncated else 0.5623
    assert found["truncation/largest_error"] < 1e-9
    assert found["truncation/m0"] == pytest.approx(np.log(2))
    assert found["truncation/m2"] == pytest.approx(after_two_bits, abs=5e-5)


@pytest.mark.study
@pytest.mark.parametrize("arm", ["full", "truncated"])
def test_a_trained_model_is_within_a_hundredth_of_the_closed_form_of_truncation(arm, tmp_path):
    file = ROOT / "configs/context/truncation.py"
    train = ROOT / "train.py"
    line = [sys.executable, train, f"{file}:{arm}", "--runs", tmp_path]
    env = os.environ | conftest.USERS  # one device, as anyone would run it
    subprocess.run(line, env=env, check=True, stdout=subprocess.DEVNULL)

    lines = (tmp_path / f"truncation-{arm}/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    last = [row for row in rows if "truncation/m2" in row][-1]

    for m in (2, 8):
        expected = truncation.entropy(0.75)
        if arm == "truncated":
            expected = truncation.closed_form(m, 0.75)
        assert last[f"truncation/m{m}"] == pytest.approx(expected, abs=0.01)
    assert last["step"] == 1_500
    assert last["truncation/largest_error"] < 0.01


# --------------------------------------------------------------------------------------------- meco

with_url = partial(meco.in_front, template="URL: {domain}\n\n")


def url_of(document: data.Document) -> str:
    """What `with_url` puts in front of a document."""
    return f"URL: {document.meta['domain']}\n\n"


def test_a_prefix_is_read_but_not_predicted():
    phase = replace(PLAIN, steps=12, batch=1, seq=256, packing=one_per_row)
    loader = load(partial(some, number=12), phase, prepare=with_url)
    prefixes = {document.text: url_of(document) for document in some(12)}
    seen = set()

    for step in range(1, 13):
        arrays = loader.batch(step).arrays
        row = {name: values[0] for name, values in arrays.items()}
        real = row["segments"] > 0
        tokens = row["tokens"][real].tolist()
        targets = row["targets"][real].tolist()
        weights = row["weights"][real].tolist()
        pairs = zip(targets, weights, strict=True)
        predicted = [target for target, weight in pairs if weight]
        text = bytes(target for target in predicted if target < 256)
        prefix = prefixes[text.decode()].encode()
        n = len(prefix)

        predictions = len(text) + 1  # the end too
        assert weights == [0] * n + [1] * predictions
        assert not row["weights"][~real].any()
        assert tokens == [256, *prefix, *text]
        assert targets == [*prefix, *text, 257]
        assert targets[n] == text[0]
        seen.add(text.decode())

    assert seen == set(prefixes)


def unweighted_targets(batch: dict) -> list[int]:
    """The targets of a batch of one row that carry no loss and are no padding."""
    real = batch["segments"][0] > 0
    silent = batch["weights"][0] == 0
    return batch["targets"][0][real & silent].tolist()


@pytest.mark.parametrize("seq", [3, 7, 32])
def test_where_a_prefix_is_cut_all_of_it_still_weighs_nothing(seq):
    documents = partial(some, number=12)
    phase = replace(PLAIN, steps=1, batch=1, seq=seq)
    loader = load(documents, phase, prepare=with_url)
    rows = only_rows(loader).epoch
    phase = replace(phase, steps=rows)
    loader = load(documents, phase, prepare=with_url)

    weights, positions = 0, 0
    silent = Counter()
    for step in range(1, rows + 1):
        batch = loader.batch(step).arrays
        weights += int(batch["weights"].sum())
        positions += np.count_nonzero(batch["segments"])
        silent.update(unweighted_targets(batch))

    texts = [document.text.encode() for document in some(12)]
    predicted = sum(map(len, texts)) + 12  # and the ends
    prefixes = "".join(map(url_of, some(12)))
    assert weights == predicted
    assert positions == predicted + 12 * len("URL: site0\n\n")
    assert silent == Counter(prefixes.encode())


def test_metadata_that_a_document_lacks_leave_a_template_empty():
    unknown = data.Document("p", "text", {})
    made = meco.in_front(unknown, None, "URL: {domain}\n\n")
    assert (made.prefix, made.text) == ("URL: \n\n", "text")

    known = data.Document("p", "text", dict(domain="x"))
    made = meco.tagged(known, None, "<{domain} {path}>", "</{domain}>")
    assert (made.prefix, made.text) == ("", "<x p>text</x>")


@pytest.mark.parametrize("unit, text, units", [
    ("line", "one\ntwo\n\nthree", ["one\n", "two\n", "\n", "three"]),
    ("sentence", "One. Two? Three", ["One.", " Two?", " Three"]),
])
def test_shuffled_units_keep_every_character(unit, text, units):
    document = data.Document("p", text, dict(a=1))
    made = meco.shuffled_units(document, np.random.default_rng(0), unit, 4)
    orders = {"".join(order) for order in itertools.permutations(units)}

    assert [copy.path for copy in made] == ["p", "p#1", "p#2", "p#3"]
    assert made[0].text == text
    assert all(copy.text in orders for copy in made)
    assert all(copy.meta == dict(a=1) for copy in made)
    assert len({copy.text for copy in made}) > 2


def test_told_documents_are_those_of_the_library_with_their_package_in_front():
    plain = list(itertools.islice(data.stdlib(), 20))
    told = list(itertools.islice(meco.told("URL: {domain}\n\n"), 20))

    assert [replace(document, prefix="") for document in told] == plain
    assert [document.prefix for document in told] == [url_of(document) for document in plain]


def test_metadata_then_plain_changes_sources_after_nine_tenths():
    arms = meco.study.arms
    told_phase, plain_phase = arms["metadata_then_plain"].phases
    assert (told_phase.steps, plain_phase.steps) == (180, 20)
    assert told_phase.mixture == {"told": 1.0}
    assert plain_phase.mixture == {"plain": 1.0}
    for arm in arms.values():
        assert sum(phase.steps for phase in arm.phases) == 200

    documents = partial(some, number=12)
    sources = {
        "plain": data.Source(documents),
        "told": data.Source(documents, prepare=with_url),
    }
    nine = replace(told_phase, steps=9, batch=2, seq=64)
    one = replace(plain_phase, steps=1, batch=2, seq=64)
    loader = load_all(sources, nine, one)
    drawn = [loader.batch(step) for step in range(1, 11)]

    sources = [batch.arrays["source"] for batch in drawn]
    numbers = [set(source.ravel()) for source in sources]
    assert numbers == [{1}] * 9 + [{0}]
    assert drawn[0].metrics["data/told/rows"] == 2
    assert drawn[9].metrics["data/plain/rows"] == 2


def test_a_unit_that_is_not_known_is_refused_by_a_sentence():
    document = data.Document("p", "text")
    with pytest.raises(data.InputError, match="'word'; allowed are line, sentence"):
        meco.shuffled_units(document, None, "word")


# ---------------------------------------------------------------------------- dataset_decomposition


def pieces_of(length: int, least: int, longest: int) -> list[int]:
    """The lengths of the pieces of one document, in the order of their starts.

    Checks that each piece starts where the one before it ends.
    """
    lengths = np.array([3, length])  # the first document is too short for a piece
    powers = range(least.bit_length() - 1, longest.bit_length())
    found = []
    for power in powers:
        plan = dataset_decomposition.power_of_two(lengths, 2**power, longest)
        found += plan[:, [START, LENGTH]].tolist()
    found.sort()
    starts = [start for start, _ in found]
    sizes = [size for _, size in found]
    ends = np.cumsum(sizes).tolist()
    assert starts == [0, *ends][:-1]
    return sizes


@pytest.mark.parametrize("tokens, pieces, left", [
    (256, [], 256),
    (257, [256], 0),
    (258, [256], 1),
    (1_000, [512, 256], 230),
    (5_000, [4096, 512, 256], 133),
    (20_000, [8192, 8192, 2048, 1024, 512], 27),
])
def test_decomposition_gives_the_pieces_of_the_paper(tokens, pieces, left):
    """The paper counts tokens, ends included; a piece takes 2^k + 1 of them, so 2^k positions."""
    positions = tokens - 1
    assert pieces_of(positions, 256, 8192) == pieces
    # The paper loses a token at each cut. We lose none.
    assert positions - sum(pieces) == left + len(pieces) - 1


def test_decomposition_takes_every_position_but_the_last_few_once():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4, 1.5, 500)
    lengths = lengths.astype(np.int64) + 1
    taken = [np.zeros(n, int) for n in lengths]

    for seq in (4, 8, 16, 32):
        plan = dataset_decomposition.power_of_two(lengths, seq, 32)
        assert plan[:, ROW].tolist() == list(range(len(plan)))
        assert np.all(plan[:, LENGTH] == seq)
        assert np.all(plan[:, SEGMENT] == 1)
        assert not plan[:, QUIET].any()
        for _, _, document, start, length, _ in plan:
            taken[document][start:start + length] += 1

    for n, times in zip(lengths, taken, strict=True):
        left = n % 4
        assert times.tolist() == [1] * (n - left) + [0] * left


def test_decomposition_refuses_a_length_that_is_no_power_of_two():
    with pytest.raises(data.InputError, match="powers of two up to 32"):
        dataset_decomposition.power_of_two(np.array([40, 50]), 24, 32)


def test_a_phase_s_batches_hold_pieces_of_one_length_and_no_padding():
    phase = replace(
        PLAIN,
        steps=40,
        packing=partial(dataset_decomposition.power_of_two, longest=32),
        lengths=partial(
            dataset_decomposition.uniform,
            lengths=[8, 16, 32],
            shares=[0.2, 0.3, 0.5],
        ),
    )
    loader = load(partial(some, number=40), phase)
    shapes = Counter()

    for step in range(1, 41):
        batch = loader.batch(step)
        shape = batch.arrays["tokens"].shape
        shapes[shape] += 1
        assert batch.metrics["data/waste"] == 0
        assert np.all(batch.arrays["segments"] == 1)
        positions = batch.arrays["positions"][0]
        assert np.array_equal(positions, np.arange(shape[1]))

    assert shapes == {
        (16, 8): 8,
        (8, 16): 12,
        (4, 32): 20,
    }


SHARES = [0.1, 0.2, 0.3, 0.4]
grow_p2 = partial(
    dataset_decomposition.grow_p2,
    lengths=[1, 2, 4, 8],
    shares=SHARES,
    odds=[8, 4, 2, 1],
    cycles=8,
)


def test_grow_p2_begins_each_cycle_with_all_lengths_and_ends_it_with_the_longest():
    assert grow_p2(0.0) == {1: 8, 2: 4, 4: 2, 8: 1}
    assert grow_p2(0.125) == grow_p2(0.0)
    assert grow_p2(0.1249) == {1: 0, 2: 0, 4: 0, 8: 1}

    # The first length is used up at s = 0.1 / 8, when 15 s = 0.1875 of the cycle is drawn.
    assert grow_p2(0.187 / 8)[1] == 8
    assert grow_p2(0.188 / 8)[1] == 0


def test_grow_p2_gives_each_length_its_share_of_a_cycle():
    times = (np.arange(80_000) + 0.5) / 80_000
    total = np.zeros(4)
    for time in times[:10_000]:  # one cycle
        weights = np.array(list(grow_p2(time).values()))
        total += weights / weights.sum()
    assert total / 10_000 == pytest.approx(SHARES, abs=1e-3)


def test_the_steps_of_a_phase_under_grow_p2_have_its_shares_and_begin_with_short_ones():
    phase = replace(PLAIN, steps=800, lengths=grow_p2)
    lengths, picks = data.batch_lengths(phase)

    assert lengths == [1, 2, 4, 8]
    assert np.bincount(picks) / 800 == pytest.approx(SHARES, abs=0.01)
    assert np.mean(picks[:20]) < np.mean(picks[80:100])


# --------------------------------------------------------------------------- in_context_pretraining


def topics(number: int = 8, each: int = 30):
    """Documents of planted topics: each topic has three letters of its own beside the digits."""
    rng = np.random.default_rng(0)
    for i in range(number * each):
        topic = i % number
        own = [chr(97 + 3 * topic + j) for j in range(3)]
        text = "".join(rng.choice([*own, *"0123456789"], 80))
        yield data.Document(f"t{i}", text, dict(topic=topic))


def vectors_of(documents: data.Documents) -> np.ndarray:
    """The TF-IDF vectors of the 240 documents of `topics`."""
    ids = [np.asarray(documents.ids(i), np.int64) for i in range(240)]
    return in_context.tf_idf(ids)


def test_the_neighbours_of_a_document_are_the_most_similar_others():
    documents = everything_of(topics)
    vectors = vectors_of(documents)
    near = in_context.neighbours(vectors, 10)
    similarity = vectors @ vectors.T

    for i in range(240):
        assert i not in near[i]
        others = np.delete(similarity[i], i)
        highest = np.sort(others)[::-1][:10]
        found = similarity[i][near[i]]
        assert found == pytest.approx(highest, abs=1e-6)


def test_the_path_goes_through_every_document_once_from_like_to_like():
    documents = everything_of(topics)
    vectors = vectors_of(documents)
    near = in_context.neighbours(vectors, 10)
    similarity = vectors @ vectors.T

    path = in_context.path(near, 21)
    assert sorted(path) == list(range(240))
    assert path == in_context.path(near, 21)

    steps = list(itertools.pairwise(path))
    along = [similarity[step] for step in steps]
    chance = np.diagonal(similarity, 1)
    assert np.mean(along) >= 3 * np.mean(chance)

    known = documents.of(Shard.documents)
    topic = [document["meta"]["topic"] for document in known]
    same_topic = [topic[a] == topic[b] for a, b in steps]
    assert np.mean(same_topic) > 0.85


def test_a_cluster_ends_at_its_size_or_where_no_neighbour_is_left():
    chain = np.array([[1], [2], [3], [0], [3]])
    assert in_context.path(chain, 21) == [0, 1, 2, 3, 4]
    assert in_context.path(chain, 2) == [0, 1, 2, 3, 4]

    tree = np.array([[4], [0], [0], [1], [2]])
    assert in_context.path(tree, 21) == [0, 4, 2, 1, 3]
    assert in_context.path(tree, 2) == [0, 4, 1, 2, 3]


def test_a_document_alone_has_no_neighbours_and_is_a_path():
    near = in_context.neighbours(np.ones((1, 2)), 10)
    assert near.shape == (1, 0)
    none = np.zeros((1, 0), int)
    assert in_context.path(none, 3) == [0]


def test_consecutive_near_copies_leave_the_path():
    ids = [
        np.arange(100),
        np.arange(100) + 1,  # shares 97 of 99 runs with the first
        np.arange(50),  # shares 48 of 98
        np.arange(100),
        np.zeros(0, int),
        np.array([7]),
    ]
    assert in_context.without_near_copies([0, 1, 2, 3, 4, 5], ids, 0.85) == [0, 2, 3, 4, 5]
    assert in_context.without_near_copies([0, 1, 3], ids, 0.99) == [0, 1, 3]


def test_related_rows_hold_every_document_whole_in_the_path_s_order():
    phase = replace(PLAIN, packing=in_context.related, objective=one_segment)
    loader, same = load(topics, phase), load(topics, phase)
    documents, lengths, plan, _ = only_window(loader)

    taken = np.bincount(plan[:, DOCUMENT], plan[:, LENGTH])
    assert np.array_equal(taken, lengths)
    assert np.array_equal(plan, in_context.related(lengths, 32, documents))

    for step in (1, 5):
        batch = loader.batch(step).arrays
        again = same.batch(step).arrays
        assert all(np.array_equal(batch[name], again[name]) for name in batch)
        assert set(np.unique(batch["segments"])) <= {0, 1}


def uniform(params, ids) -> np.ndarray:
    """An `apply` that knows nothing."""
    return np.zeros((*ids.shape, 258), np.float32)


def test_a_dev_document_is_asked_for_alone_after_another_and_after_its_nearest(monkeypatch):
    texts = [document.text[:64] for document in topics(8, 4)]
    monkeypatch.setattr(in_context, "held_out", lambda dev, test: [*texts, "too short"])
    asked = partial(in_context.in_context, None, tokenizer=Bytes(), config=in_context.chance, n=20)
    seen = []

    def knows_what_follows(params, ids):
        seen.append(ids)
        logits = uniform(params, ids)
        following = np.roll(ids, -1, axis=1)
        np.put_along_axis(logits, following[..., None], 100, 2)
        return logits

    names = ["in_context/alone", "in_context/other", "in_context/related"]
    assert asked(knows_what_follows) == pytest.approx(dict.fromkeys(names, 0.0), abs=1e-6)
    assert asked(uniform) == pytest.approx(dict.fromkeys(names, np.log(258)), rel=1e-4)

    ids = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    near = in_context.neighbours(in_context.tf_idf(ids), 1)[:, 0]
    alone, other, related = ([bytes((row % 256).tolist()).decode() for row in rows] for rows in seen)
    for i in range(20):  # bos is 256
        assert alone[i] == "\0" + texts[i]
        assert other[i] == "\0" + texts[(i + 16) % 32] + alone[i]
        assert related[i] == "\0" + texts[near[i]] + alone[i]
