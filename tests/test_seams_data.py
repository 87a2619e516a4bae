"""The seams of data: what objectives, orders, packings and scores are told; marks; splits; tokenizers."""
import json
import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import prose
from data_cases import PLAIN, load, load_all
from hypothesis import given
from test_tokenizers import AWKWARD

import data
import train
from data import DataConfig, Document, Source
from lib.cache import build
from lib.config import ROOT, from_json, load_file, to_json
from lib.corpus import assemble
from lib.errors import InputError
from lib.evaluate import Setting, dev_figures
from lib.packing import one_per_row
from lib.sources import nothing, split_in, split_of
from lib.tokenizers import Bytes, Numbers, Own, load_tokenizer, make_tokenizer, marked_tokens
from model import ModelConfig

equal = np.testing.assert_array_equal
CAUSAL = dict(kind="causal", window=0)
TINY = ModelConfig(layers=2, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=0)


def short(number: int = 30, letter: str = "a"):
    """Documents shorter than a row."""
    for i in range(number):
        yield Document(f"{letter}{i}", letter * (1 + i % 20), dict(number=i))


def same(one: data.Batch, other: data.Batch):
    """Two batches are the same."""
    assert one.mask == other.mask and one.arrays.keys() == other.arrays.keys()
    for key, value in one.arrays.items():
        equal(value, other.arrays[key])


# ----------------------------------------------------------------------------- objectives, orders, packings


def both_ways(row, rng):
    """Predict a token from all of the row; adds no array."""
    return row | dict(targets=row["tokens"]), dict(kind="bidirectional", window=0)


def with_noise(row, rng):
    return row | dict(noise=rng.random(len(row["tokens"]))), CAUSAL


both_ways.masks = (dict(kind="bidirectional", window=0),)

TWO = {"a": Source(short), "b": Source(partial(short, letter="b"))}
HALF = dict(a=0.5, b=0.5)


def undeclared(row, rng):
    return both_ways(row, rng)


@pytest.mark.parametrize("objective", [both_ways, undeclared])
def test_each_source_has_its_own_objective_and_the_others_are_causal(objective):
    made = load_all(TWO, replace(PLAIN, mixture=HALF, objective={"b": objective}))
    plain = load_all(TWO, replace(PLAIN, mixture=HALF))
    for step in (1, 2):
        batch, before = made.batch(step), plain.batch(step).arrays
        b = before["source"] == 1
        assert batch.mask == dict(kind="prefix", window=0) and 0 < b.sum() < b.size
        equal(batch.arrays["targets"], np.where(b, before["tokens"], before["targets"]))
        equal(batch.arrays["prefix"], b & (before["segments"] > 0))
        for i in range(2):  # as two processes make it
            part = made.batch(step, lambda rows, i=i: np.arange(i, rows, 2))
            same(part, batch._replace(arrays={k: v[i::2] for k, v in batch.arrays.items()}))


def test_an_array_that_not_all_rows_of_a_batch_have_is_refused():
    made = load_all(TWO, replace(PLAIN, mixture=HALF, objective={"b": with_noise}))
    with pytest.raises(InputError, match=r"phases\.0\.objective .*noise.*allowed are the same in all"):
        made.batch(1)
    both = load_all(TWO, replace(PLAIN, mixture=HALF, objective=dict.fromkeys("ab", with_noise)))
    assert both.batch(1).arrays["noise"].dtype == np.float64


def test_a_dictionary_of_objectives_is_checked_written_and_read(tmp_path):
    phase = replace(PLAIN, objective={"c": both_ways})
    config = train.Config(data=DataConfig(sources=TWO), phases=(phase,), overlap=8)
    with pytest.raises(InputError, match=r"phases\.0\.objective names c; allowed are the sources a, b"):
        train.check(config)
    file = tmp_path / "file.py"
    file.write_text("def f(row, rng, size: int = 3):\n    return row, size\n")
    objective = {"b": partial(load_file(file).f, size=4)}
    phase = replace(PLAIN, mixture=HALF, objective=objective)
    config = replace(config, phases=(phase,))
    train.check(config)
    again = from_json(train.Config, json.loads(json.dumps(to_json(config))))
    assert again.phases[0].objective["b"](0, 0) == (0, 4)
    wrong = replace(config, phases=(replace(phase, objective={"b": 3}),))
    with pytest.raises(InputError, match=r"phases\.0\.objective\.b is 3"):
        train.check(wrong)


SEEN = []


def nosy(row, rng, tokenizer, progress, log, document, own: int = 7):
    """Keeps what it is told."""
    SEEN.append((tokenizer, progress, log, document, own, row["targets"][row["weights"] > 0]))
    return row, CAUSAL


def test_an_objective_is_told_what_it_asks_for():
    SEEN.clear()
    phase = replace(PLAIN, steps=4, packing=one_per_row, objective=partial(nosy, own=8))
    made = load(short, phase)
    made.batch(1), made.batch(4)
    originals = {document.path: document for document in short()}
    assert [told[1] for told in SEEN] == [0.0] * 4 + [0.75] * 4
    for tokenizer, _, log, document, own, targets in SEEN:
        original = originals[document.path]
        assert isinstance(tokenizer, Bytes) and log == [] and own == 8
        assert (document.text, document.meta) == (original.text, original.meta)
        assert document.text == tokenizer.decode(targets)


def quoted():
    yield Document("q", "answer", prefix="question ")


def test_the_document_of_a_row_is_its_first_with_its_prefix():
    SEEN.clear()
    load(quoted, replace(PLAIN, objective=nosy)).batch(1)
    assert [(told[3].prefix, told[3].text) for told in SEEN[:1]] == [("question ", "answer")]


def by_log(row, rng, log):
    """The number of evaluations, and what the last one says of the source and of an eval."""
    last = log[-1] if log else {"one": 0.0, "own/figure": 0.0}
    told = [len(log), last["one"], last["own/figure"]]
    return row | dict(told=np.tile(np.float32(told), (len(row["tokens"]), 1))), CAUSAL


def pick(draw, rows, progress, key, log):
    """An order that stays where the last evaluation says."""
    return int(log[-1]["own/figure"]) % rows if log else 0


@pytest.mark.parametrize("field, function", [("objective", by_log), ("order", pick)])
def test_who_asks_for_the_log_waits_for_it(field, function):
    phase = replace(PLAIN, steps=8, steer=2, **{field: function})
    plain = replace(PLAIN, steps=4)
    made = load(short, plain, phase, plain)
    first = made.batch(6)
    assert made.decided() == 6
    with pytest.raises(InputError, match="step 2 of phase 1 is beyond the decisions taken so far"):
        made.batch(7)
    row = {"eval/one/loss": np.float32(2.5), "eval/one/bpb_se": math.nan, "own/figure": 3}
    made.decide(1, row)
    assert made.decided() == 8
    assert made.log[1] == [pytest.approx({"one": 2.5, **row}, nan_ok=True)]
    second = made.batch(8)
    key = "told" if field == "objective" else "tokens"
    assert not np.array_equal(first.arrays[key], second.arrays[key])
    if field == "objective":
        equal(np.unique(second.arrays["told"].reshape(-1, 3), axis=0), [[1, 2.5, 3]])
    again = load(short, plain, phase, plain)
    again.restore(again.start, json.loads(json.dumps(made.log)))
    same(again.batch(8), second)
    for _ in range(2):
        made.decide(1, row)
    assert made.decided() == 16


def test_steering_is_for_those_who_ask():
    sources = {"one": Source(short)}
    config = train.Config(data=DataConfig(sources=sources), phases=(replace(PLAIN, steer=2),), overlap=8)
    with pytest.raises(InputError, match=r"phases\.0\.steer is 2; allowed is 0, unless"):
        train.check(config)
    for more in (dict(order=pick), dict(objective=by_log), dict(objective={"one": by_log})):
        train.check(replace(config, phases=(replace(PLAIN, steer=2, **more),)))


def test_a_bad_place_is_refused():
    made = load(short, replace(PLAIN, order=lambda draw, rows, progress, key: rows))
    with pytest.raises(InputError, match=r"order: .*<lambda> of .* gives \d+ .*, of 'one'"):
        made.batch(1)


TOLD = []


def curious(lengths, seq, tokenizer, documents):
    TOLD.append((tokenizer, len(documents.shard)))
    return one_per_row(lengths, seq)


def test_a_packing_is_told_the_tokenizer(home):
    TOLD.clear()
    load(short, replace(PLAIN, packing=curious))
    assert isinstance(TOLD[0][0], Bytes) and TOLD[0][1] == 30


def test_rows_of_another_split():
    config = DataConfig(sources={"one": Source(short)}, tokenizer="bytes", dev=0.3, test=0.2)
    cache = build("one", config, Bytes(), 0)
    texts = {}
    for split in ("train", "dev", "test"):
        rows = data.Rows(cache, 32, one_per_row, data.shuffled, 8, Bytes(), (0, 0), split)
        texts[split] = {rows.get(i).document().path for i in range(rows.epoch)}
    expected = {document.path: split_of(document.path, 0.3, 0.2) for document in short()}
    for number, found in enumerate(texts.values()):
        assert found == {path for path, split in expected.items() if split == number} != set()


# --------------------------------------------------------------------------------------------------- scores


def vector(document, tokens):
    """Length and number; training documents of one token are left out."""
    return [-math.inf] * 2 if len(tokens) == 1 else [len(tokens), -math.inf]


CALLS = []


def together(documents, tokens):
    CALLS.append(len(documents))
    return [vector(*pair) for pair in zip(documents, tokens, strict=True)]


def lengths_together(documents, tokens):
    return np.array([len(ids) for ids in tokens])


def twins(document, rng):
    return [document, replace(document, path=document.path + "'")]


def scored(documents=short, **fields):
    """The cache of a scored source, with held-out documents."""
    config = DataConfig(sources={"s": Source(documents, **fields)}, tokenizer="bytes", dev=0.2, test=0.2)
    return build("s", config, Bytes(), 0)


@pytest.mark.parametrize("score", [vector, together])
def test_vectors_of_scores_are_kept_and_leave_out_training_documents_alone(home, score):
    CALLS.clear()
    cache = scored(partial(short, number=600), score=score)
    shard = cache.shard(0)
    sizes = np.diff(shard.offsets)
    equal(shard.score, np.array([vector(None, [0] * n) for n in sizes], np.float32))
    assert shard.score.dtype == np.float32
    equal(np.unique(shard.split[sizes == 1]), [1, 2])
    lost = [d for d in short(600) if len(d.text) == 1 and split_of(d.path, 0.2, 0.2) == 0]
    assert cache.total["counts"]["skipped: deselected"] == len(lost) > 0
    if score is together:
        assert CALLS == [256, 256, 88]


def test_scores_of_many_at_once_are_those_of_each(home):
    cache = scored(partial(short, number=300), score=lengths_together, prepare=twins)
    shard = cache.shard(0)
    equal(shard.score, np.diff(shard.offsets))
    CALLS.clear()
    scored(partial(short, number=300), score=together, prepare=twins)
    assert max(CALLS) == 256 and sum(CALLS) > 400


def test_scores_reach_a_packing_as_they_are():
    made = load(short, PLAIN, score=together)
    documents = made.rows[0][0][0].window(0).documents
    found = documents.of(lambda shard: shard.score)
    equal(found[:, 0], documents.of(lambda shard: np.diff(shard.offsets)))


def test_scores_of_odd_shapes_are_refused(home):
    def one_less(documents, tokens):
        return [0.0] * (len(documents) - 1)

    def ragged(document, tokens):
        return [0.0] * len(tokens)

    with pytest.raises(InputError, match=r"score: .*one_less of .*\(29,\).*sources\.s, .*\(30, k\)"):
        scored(score=one_less)
    with pytest.raises(InputError, match="score of s.* the shapes .*allowed is the same for all"):
        scored(score=ragged)


# ---------------------------------------------------------------------------------------------------- marks

awkward = st.lists(st.sampled_from([*AWKWARD, "the tree", " stronger", "木木"])).map("".join)
awkward = awkward.filter(lambda text: "\ufffd" not in text)


def check_marked(tokenizer, text, start, end):
    """The tokens are those that hold a character of the span; what they decode to surrounds it."""
    ids = list(tokenizer.encode(text))
    ((first, last),) = marked_tokens(tokenizer, text, [(start, end)], len(ids))
    parts = [tokenizer.decode(part) for part in (ids[:first], ids[first:last], ids[last:])]
    assert "".join(parts) == text
    assert len(parts[0]) <= start < end <= len(parts[0] + parts[1])
    if {"\x10", "\u2581", "\u2585"} & set(text):  # two pieces may hold what SentencePiece escapes
        return
    without = tokenizer.decode(ids[:first + 1]), tokenizer.decode(ids[:last - 1])
    assert len(without[0]) > start or without[0].endswith("\ufffd")
    assert len(without[1]) < end or without[1].endswith("\ufffd")


@given(awkward, st.data())
def test_marks_are_exact(pieces, text, choose):
    for tokenizer in (Bytes(), pieces):
        assert len(tokenizer.spans(text)) == len(tokenizer.encode(text))
        if text:
            start = choose.draw(st.integers(0, len(text) - 1))
            check_marked(tokenizer, text, start, choose.draw(st.integers(start + 1, len(text))))
        assert not len(marked_tokens(tokenizer, text, [(0, 0)], len(tokenizer.encode(text))))


def test_marks_in_a_hugging_face_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from lib.tokenizers import HuggingFace

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    every = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>"], initial_alphabet=every)
    made.train_from_iterator(["the tree is stronger than the other tree"] * 20, trainer)
    facts = dict(bos=0, eos=0, vocab=400, tokenizer=json.loads(made.to_str()))
    tokenizer = HuggingFace(json.dumps(facts).encode())
    text = "the tree 木 été is stronger"
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            check_marked(tokenizer, text, start, end)


def test_marks_of_numbers():
    text = "  12 7  300 0 "
    tokenizer = Numbers(301)
    assert tokenizer.encode(text) == [12, 7, 300, 0]
    assert marked_tokens(tokenizer, text, [(3, 6), (8, 9), (11, 13)], 4).tolist() == [[0, 2], [2, 3], [3, 4]]
    assert marked_tokens(tokenizer, text, [(6, 8), (0, 2)], 4).tolist() == [[2, 2], [0, 0]]


def secrets(number: int = 20):
    """Documents of prose in which what stands between brackets is marked; some have a prefix."""
    for i in range(number):
        text = f"{prose(i, 3 * i)}[é{i} 木secret]{prose(i + 50, 20)}[{i}]"
        spans = [match.span() for match in re.finditer(r"\[.*?\]", text)]
        yield Document(f"s{i}", text, prefix="before " if i % 2 else "", marks=tuple(spans))


def test_marked_targets_decode_to_the_spans(pieces):
    """Whatever rows a document is cut into; bos, eos, prefixes and padding are not marked."""
    config = DataConfig(sources={"s": Source(secrets, marks=True), "a": Source(short)}, dev=0.0, test=0.0)
    caches = {name: build(name, config, pieces, 0) for name in config.sources}
    phase = replace(PLAIN, batch=1, seq=24, mixture=dict(s=1.0, a=0.0))
    made = data.Loader(caches, [phase], config, pieces, 0)
    rows = made.rows[0][0][0]
    found = Counter()
    for i in range(rows.epoch):
        arrays = rows.get(i).arrays
        marked = arrays["marks"] == 1
        assert arrays["marks"].dtype == np.int32 and not arrays["marks"][arrays["weights"] == 0].any()
        found.update(arrays["targets"][marked].tolist())
    expected = Counter()
    for document in secrets():
        ids = np.array(pieces.encode(document.text))
        spans = pieces.spans(document.text)
        inside = np.zeros(len(ids), bool)
        for start, end in document.marks:
            inside |= (spans[:, 0] < end) & (spans[:, 1] > start)
        expected.update(ids[inside].tolist())
    assert found == expected
    mixed = data.Loader(caches, [replace(phase, batch=4, mixture=dict(s=0.5, a=0.5))], config, pieces, 0)
    arrays = mixed.batch(1).arrays
    assert arrays["marks"][arrays["source"] == 0].any() and not arrays["marks"][arrays["source"] == 1].any()


def test_marked_bytes_read_as_they_were():
    rows = load(secrets, replace(PLAIN, seq=512, packing=one_per_row), marks=True).rows[0][0][0]
    for i in range(rows.epoch):
        row = rows.get(i)
        said = Bytes().decode(row.arrays["targets"][row.arrays["marks"] == 1])
        assert said == "".join(re.findall(r"\[.*?\]", row.document().text))


def test_rows_without_marks_have_no_such_array():
    assert "marks" not in load(short, PLAIN).batch(1).arrays


def test_marks_must_be_declared_and_lie_in_the_text(home):
    with pytest.raises(InputError, match=r"'s0' has marks, but data\.sources\.one\.marks is false"):
        load(secrets, PLAIN)

    def beyond():
        yield Document("d", "tree", marks=((2, 5),))

    with pytest.raises(InputError, match=r"'d' has the mark \(2, 5\); allowed .* <= 4"):
        load(beyond, PLAIN, marks=True)


# --------------------------------------------------------------------------------------------------- splits


def own_splits():
    """Documents that say their split, and some that do not."""
    for i in range(60):
        yield Document(f"d{i}", f"tree {i}", split=("", "train", "dev", "test")[i % 4], group=f"g{i % 3}")


def test_a_document_s_split_wins_over_the_source_s_and_that_over_the_hash(home):
    for split in ("", "train", "dev"):
        config = DataConfig(sources={"s": Source(own_splits, split=split)}, dev=0.2, test=0.2)
        shard = build("s", config, Bytes(), 0).shard(0)
        for document, found in zip(own_splits(), shard.split, strict=True):
            said = document.split or split
            number = ("train", "dev", "test").index(said) if said else split_of(document.group, 0.2, 0.2)
            assert found == number == split_in(document, config.sources["s"], 0.2, 0.2)
    with pytest.raises(InputError, match="'x' has the split 'valid'; allowed are"):
        split_in(Document("x", "", split="valid"), Source(short), 0.1, 0.1)


def test_a_source_for_training_alone_has_nothing_to_evaluate(home):
    """And one that is held out as a whole is measured, and never drawn."""
    sources = {"a": Source(short, split="train"), "v": Source(partial(short, letter="v"), split="dev")}
    config = train.Config(
        data=DataConfig(sources=sources, tokenizer="bytes"), model=TINY, phases=(PLAIN,), overlap=8)
    train.check(config)
    config, tokenizer, caches = assemble(config)
    assert caches["a"].total["counts"]["train documents"] == 30
    assert caches["v"].total["counts"]["dev documents"] == 30
    made = data.Loader(caches, config.phases, config.data, tokenizer, 0)
    assert not made.batch(2).arrays["source"].any()
    assert made.epochs(2)["v"] == 0 < made.epochs(2)["a"]
    losses = lambda params, step, arrays: np.ones(arrays["tokens"].shape)  # noqa: E731
    setting = Setting(config, PLAIN, caches, tokenizer, train.make_mesh(config.mesh))
    dev = dev_figures(losses, {}, 0, setting)
    assert set(dev) == {"eval/v/loss", "eval/v/bpb", "eval/v/bpb_se"}
    made.decide(0, dev)
    assert made.log[0][0]["v"] == 1.0 and "a" not in made.log[0][0]
    drawn = data.Loader(caches, [replace(PLAIN, mixture=dict(a=1, v=1))], config.data, tokenizer, 0)
    with pytest.raises(InputError, match=r"phases\.0\.mixture gives the source v a share.* allowed is 0"):
        drawn.batch(1)


# ----------------------------------------------------------------------------------------------- tokenizers


@given(st.lists(st.integers(0, 41)))
def test_numbers_come_back(numbers):
    tokenizer = Numbers(42)
    text = " ".join(map(str, numbers))
    assert tokenizer.encode(text) == list(tokenizer.encode_batch([text])[0]) == numbers
    assert tokenizer.decode([42, *numbers, 43]) == text and tokenizer.vocab == 44


@pytest.mark.parametrize("word", ["42", "-1", "x", "1.0", "²"])
def test_what_is_no_number_is_refused(word):
    with pytest.raises(InputError, match=rf"numbers:42 reads '{word}'; allowed are numbers from 0 to 41"):
        Numbers(42).encode(f"1 {word} 2")


@pytest.mark.parametrize("name", ["numbers:", "numbers:0", "numbers:x", "numbers:-1"])
def test_numbers_need_a_number(name):
    with pytest.raises(InputError, match=f"data.tokenizer is '{name}'; allowed is numbers:N"):
        make_tokenizer(DataConfig(tokenizer=name), 0)


def test_numbers_are_saved_and_read(tmp_path):
    made = make_tokenizer(DataConfig(tokenizer="numbers:7"), 0)
    (tmp_path / "tokenizer.model").write_bytes(made.model)
    again = load_tokenizer(tmp_path / "tokenizer.model")
    assert (again.vocab, again.bos, again.eos, again.model) == (9, 7, 8, made.model)


LETTERS = '''
from train import Config, Phase, Schedule
from data import DataConfig, Document, Source
from model import ModelConfig


class Letters:
    """The most frequent letters of the training texts; others are one unknown."""

    def __init__(self, model: bytes):
        self.model = model
        self.letters = model.decode()
        self.unknown = len(self.letters)
        self.vocab, self.bos, self.eos = self.unknown + 3, self.unknown + 1, self.unknown + 2

    def encode(self, text):
        found = [self.letters.find(letter) for letter in text]
        return [self.unknown if place < 0 else place for place in found]

    def decode(self, ids):
        return "".join((self.letters + "?")[i] for i in ids if i <= self.unknown)


def learned(texts, vocab, most: int = 50):
    letters = sorted(set("".join(texts)))
    return Letters("".join(letters[:min(most, vocab or most)]).encode())


def verses():
    for i in range(60):
        yield Document(f"{i}", f"the tree number {i} " * 9)


config = Config(
    model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=0),
    data=DataConfig(sources={"verse": Source(verses)}, tokenizer=learned, dev=0.1, test=0.1),
    phases=(Phase(steps=4, batch=2, seq=32),), schedule=Schedule(shape="constant", warmup=0),
    save_every=2, overlap=8, sample_tokens=5,
)
'''


def test_a_config_brings_a_tokenizer_that_it_learns(home, tmp_path, capsys):
    """The run keeps it, goes on with it, and whoever loads the run has it."""
    file = tmp_path / "letters.py"
    file.write_text(LETTERS)
    words = str(file), "--runs", str(tmp_path / "runs"), "--data.tokenizer.most", "12"
    assert train.main([*words]) == 0
    directory = tmp_path / "runs/letters"
    tokenizer = load_tokenizer(directory / "tokenizer.model")
    assert isinstance(tokenizer, Own) and tokenizer.vocab == 15
    assert tokenizer.model == (directory / "tokenizer.model").read_bytes()
    text = "the tree"
    assert len(tokenizer.encode(text)) == 8
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.inner.decode(tokenizer.inner.encode(text))
    capsys.readouterr()
    assert train.main([*words, "--phases.0.steps", "6"]) == 0
    assert "resuming from step 4" in capsys.readouterr().out
    params, config, again, _ = train.load(str(directory))
    assert again.model == tokenizer.model and config.model.vocab == 15 and len(params["embed"]) == 15


def test_a_function_s_tokenizer_is_made_once_and_told_what_it_asks_for(home, tmp_path):
    file = tmp_path / "once.py"
    file.write_text(LETTERS)
    config = load_file(file).config.data
    made = make_tokenizer(config, 0)
    (kept,) = (home / "tokenizers").glob("*.model")
    before = kept.stat().st_mtime_ns
    assert make_tokenizer(config, 0).model == made.model and kept.stat().st_mtime_ns == before
    assert make_tokenizer(config, 5).vocab == 8
    assert made.inner.letters == "".join(sorted(set("the tree number 0123456789 ")))
    equal(made.encode_batch(["the", "x"])[0], made.encode("the"))
    with pytest.raises(InputError, match="the tokenizer Letters has no method spans"):
        made.spans("the")


def test_a_tokenizer_s_class_is_part_of_its_model(home, tmp_path):
    """So that token caches of another class with the same bytes are others."""
    models = []
    for name, text in (("one", LETTERS), ("two", LETTERS.replace("place < 0", "place <= 0"))):
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        models.append(json.loads(make_tokenizer(load_file(file).config.data, 0).model))
    assert models[0]["model"] == models[1]["model"] and models[0]["source"] != models[1]["source"]


def test_a_model_from_elsewhere_brings_no_code(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_text('{"class": "evil.py:Evil", "source": "", "model": ""}')
    (tmp_path / "evil.py").write_text("raise AssertionError('run')")
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        make_tokenizer(DataConfig(tokenizer=f"hf:{tmp_path}"), 0)
    with pytest.raises(InputError, match=r"the function Evil of evil\.py, a file that is gone"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_a_function_in_the_place_of_a_tokenizer_s_name_is_set_by_flags(tmp_path):
    file = tmp_path / "flags.py"
    file.write_text(LETTERS)
    for flag, vocab in (("--data.tokenizer=bytes", 258), ("--data.tokenizer=numbers:9", 11)):
        config, _ = train.parse([str(file), flag])
        assert make_tokenizer(config.data, 0).vocab == vocab
    config, _ = train.parse([str(file), "--data.tokenizer.most=7"])
    again = from_json(train.Config, json.loads(json.dumps(to_json(config))))
    assert again.data.tokenizer.keywords == config.data.tokenizer.keywords == {"most": 7}


def plain_bytes():
    return Bytes()


def no_tokenizer():
    return 7


def test_a_function_may_give_a_tokenizer_of_the_house_and_nothing_else(home):
    assert isinstance(make_tokenizer(DataConfig(tokenizer=plain_bytes), 0), Bytes)
    with pytest.raises(InputError, match="no_tokenizer of .* it has vocab, bos, eos, model"):
        make_tokenizer(DataConfig(tokenizer=no_tokenizer), 0)


# ---------------------------------------------------------------------------------------- sources of nothing


def regression(row, rng, dim: int = 3):
    """Points x and values w x of a fresh w, for a row that needs no text."""
    length = len(row["tokens"])
    x = rng.normal(size=(length, dim)).astype(np.float32)
    y = x @ rng.normal(size=dim).astype(np.float32)
    ones = np.ones(length, np.int32)
    row = row | dict(
        tokens=np.zeros(length, np.int32), targets=np.zeros(length, np.int32), segments=ones,
        positions=np.arange(length, dtype=np.int32), weights=ones.astype(np.float32), x=x, y=y)
    return row, CAUSAL


regression.masks = (CAUSAL,)


def squared(logits, batch, extras):
    """The squared error of a little of the first logit, in chunks of 32 positions."""
    assert batch["x"].shape == (*batch["y"].shape, 3) == (*logits.shape[:2], 3)
    assert logits.shape[1] == 32
    return jnp.square(logits[..., 0] / 1_000 - batch["y"])


def test_rows_that_are_made_of_random_numbers_alone_train(home, tmp_path):
    """In chunks of logits and parts of a batch; no split is missed and nothing is evaluated."""
    config = train.Config(
        name="icl", runs=str(tmp_path), seed=3, overlap=8, mesh=train.MeshConfig(data=8),
        model=replace(TINY, logits_mib=1), token_loss=squared,
        data=DataConfig(sources={"none": Source(nothing)}, tokenizer="numbers:5000"),
        phases=(train.Phase(steps=2, batch=16, seq=64, accumulate=2, objective=regression),))
    assert train.train(config) is not None
    loader = load_all(config.data.sources, *config.phases, seed=3)
    expected = [np.mean(np.square(loader.batch(step).arrays["y"])) for step in (1, 2)]
    rows = [json.loads(line) for line in (tmp_path / "icl/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == pytest.approx(expected, abs=0.02)
    assert rows[0]["data/waste"] == 0 and not any(key.startswith("eval/") for row in rows for key in row)


def test_rows_of_nothing_follow_seed_and_step_on_any_number_of_processes():
    phase = replace(PLAIN, objective=regression)
    made, other = (load_all({"none": Source(nothing)}, phase, seed=seed) for seed in (0, 1))
    whole = made.batch(5)
    assert whole.arrays["x"].shape == (4, 32, 3) and len({y.tobytes() for y in whole.arrays["y"]}) == 4
    for i in range(4):
        part = made.batch(5, lambda rows, i=i: np.arange(i, i + 1))
        same(part, whole._replace(arrays={k: v[i:i + 1] for k, v in whole.arrays.items()}))
    assert not np.array_equal(whole.arrays["y"], other.batch(5).arrays["y"])
    assert not np.array_equal(whole.arrays["y"], made.batch(6).arrays["y"])


# --------------------------------------------------------------------------------- the guide, and whole runs

GUIDE = (ROOT / "docs/extending.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"(?ms)^### (.*?)$.*?^```python\n(.*?)^```", GUIDE))


@pytest.mark.parametrize("name, key", [
    ("`Source.split`", ""), ("`Source.marks`", "marks"), ("Sources without text", "x"),
    ("Scores of many documents at once", ""), ("`DataConfig.tokenizer`", ""), ("Objectives by source", ""),
    ("Text that is read without loss", ""), ("`Schedule.shape`", "")])
def test_examples_of_the_guide_make_batches(home, tmp_path, name, key):
    """On a few documents in the place of the standard library."""
    file = tmp_path / "example.py"
    file.write_text(EXAMPLES[name])
    config = train.load_config(str(file))
    sources = {}
    for source, own in config.data.sources.items():
        documents = own.documents if own.documents is nothing else partial(quotes, letter=source)
        sources[source] = replace(own, documents=documents)
    tokenizer = "bytes" if config.data.tokenizer == "bpe" else config.data.tokenizer
    made = replace(config.data, sources=sources, tokenizer=tokenizer, dev=0.2, test=0.2)
    config = replace(config, data=made, model=replace(config.model, vocab=0), runs=str(tmp_path))
    run = train.prepare(replace(config, name="example"))
    first, last = run.loader.batch(1), run.loader.batch(config.phases[0].steps)
    assert first.arrays.keys() == last.arrays.keys() and (not key or first.arrays[key].any())
    assert config.token_loss is train.cross_entropy or key
    assert first.arrays["weights"].any() and last.arrays["weights"].any()
    if name == "Text that is read without loss":
        read_alone = (first.arrays["weights"] == 0) & (first.arrays["segments"] > 0)
        assert 0.1 < read_alone.mean() < 0.9


def quotes(number: int = 60, letter: str = "q"):
    """Documents with something between quotes."""
    for i in range(number):
        yield Document(f"{letter}{i}", f'say "{letter} {i}" and {prose(i, 40)}')


STEERED = '''
from train import Config, Phase
from data import DataConfig, Document, Source, causal
from model import ModelConfig


def verses(letter: str = "a"):
    for i in range(9 if letter == "a" else 40):
        yield Document(f"{letter}{i}", f"{letter} tree number {i} " * 9)


def figure(params, apply):
    return {"own/figure": 2}


def weighed(row, rng, log):
    factor = 1 + sum(entry["own/figure"] + entry["b"] + entry["eval/a/loss"] for entry in log)
    return row | {"weights": row["weights"] * factor}, {"kind": "causal", "window": 0}


def staying(draw, rows, progress, key, log):
    return len(log) % rows


config = Config(
    model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=0),
    data=DataConfig(sources={"a": Source(verses), "b": Source(verses)}, tokenizer="bytes", dev=0.2, test=0.2),
    phases=(Phase(steps=6, batch=8, seq=32, mixture={"a": 1, "b": 1}, steer=2, order=staying,
                  objective={"a": weighed}),),
    evals=(figure,), overlap=8, eval_tokens=500, prompts=(), save_every=1, keep=9,
)
'''


def test_a_run_that_is_steered_by_all_its_figures_resumes_as_it_was(home, tmp_path):
    """Its log has NaN in it: the error of a split of one document."""
    file = tmp_path / "steered.py"
    file.write_text(STEERED)
    given = {"data.sources.b.documents.letter": "b"}
    config, _ = train.parse([str(file), *[f"--{flag}={word}" for flag, word in given.items()]])
    config = replace(config, runs=str(tmp_path))
    assert train.train(config) is not None
    losses = figures(tmp_path / "steered")
    for step in (4, 5, 6):
        (tmp_path / f"steered/checkpoints/{step}").rename(tmp_path / f"{step}")
    meta = json.loads((tmp_path / "steered/checkpoints/3/meta/metadata").read_text())
    (logged,) = meta["log"][0]
    assert math.isnan(logged["eval/a/bpb_se"]) and logged["own/figure"] == 2
    assert logged["a"] == logged["eval/a/loss"] and "eval/b/bpb" in logged
    assert train.train(config) is not None
    assert figures(tmp_path / "steered") == losses and len(losses) == 6


def figures(directory) -> list[float]:
    """The training losses of a run."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_fit_knows_the_arrays_of_a_batch():
    """Whatever the objectives of the sources ask for, and of a source that has marks."""
    fit = load_file(ROOT / "tools/fit.py")
    sources = {"a": Source(short, marks=True), "b": Source(short), "v": Source(short, split="dev")}
    objective = {"a": nosy, "b": both_ways, "v": with_noise}
    phase = replace(PLAIN, mixture=dict(a=1, b=1), batch=8, objective=objective)
    shapes, mask = fit.rows_like(phase, sources, 32, train.make_mesh(train.MeshConfig()))
    batch = load_all(sources, phase).batch(1)
    assert train.Mask(**batch.mask) == mask
    assert {key: x.shape for key, x in batch.arrays.items()} == {key: x.shape for key, x in shapes.items()}
