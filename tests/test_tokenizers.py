"""lib/tokenizers.py: every text comes back, and only training documents are learnt from."""
from dataclasses import replace
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

import data
from data import DataConfig, Document, InputError, Source
from lib.readers import jsonl
from lib.sources import split_of
from lib.tokenizers import (
    Bytes,
    SentencePiece,
    escape,
    load_tokenizer,
    make_tokenizer,
    tokenizer_texts,
    train_bpe,
)

AWKWARD = [
    *("\t", " ", "  ", "\n", "\r\n", "\x00"),
    *("\x10", "\x10e", "\x10b", "e", "b", "c", "\u2581", "\u2585"),  # what is escaped, and how
    *("\u0301", "\u200d", "é", "木", "🌳", "👩‍🌾", "\ufffd", "\ufeff", "\U0010ffff"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "def"),
]
anything = st.one_of(
    st.text(),
    st.lists(st.sampled_from(AWKWARD)).map("".join),
    st.text(st.sampled_from("\x10ebc\u2581\u2585 ")),
)


def texts_of(corpus: Path) -> list[str]:
    """The texts of the corpus."""
    return [file.read_text("utf-8") for file in sorted(corpus.rglob("*.txt"))]


# ----------------------------------------------------------------------------------- there and back


@given(anything)
@example("\u2581 \x10b\u2585\x10")
def test_pieces_come_back_as_the_text(pieces, text):
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert pieces.decode([pieces.bos, *ids, pieces.eos]) == text
    assert all(0 <= i < pieces.vocab for i in ids)
    assert not {pieces.bos, pieces.eos} & set(ids)


@given(anything)
def test_bytes_come_back_as_the_text(text):
    ids = Bytes().encode(text)
    assert Bytes().decode([256, *ids, 257]) == text
    assert bytes(ids) == text.encode()


@given(st.lists(anything, max_size=4))
def test_encoding_together_is_as_encoding_apart(pieces, texts):
    for tokenizer in (pieces, Bytes()):
        together = [list(ids) for ids in tokenizer.encode_batch(texts)]
        apart = [list(tokenizer.encode(text)) for text in texts]
        assert together == apart


@given(anything, anything)
@example("\u2585", "\x10c")
def test_unlike_texts_are_escaped_unlike_one_another(one, other):
    assert (escape(one) == escape(other)) == (one == other)
    assert not {"\u2581", "\u2585"} & set(escape(one))


def test_cut_characters_are_replaced(pieces):
    assert Bytes().decode("木".encode()[:2]) == "\ufffd"
    assert "\ufffd" in pieces.decode(pieces.encode("🌳")[:-1])


# ----------------------------------------------------------------------------------------- training


def test_a_text_has_fewer_pieces_than_bytes(pieces, corpus):
    texts = texts_of(corpus)
    tokens = sum(len(ids) for ids in pieces.encode_batch(texts))
    size = sum(len(text.encode()) for text in texts)
    assert pieces.vocab == 320
    assert tokens < 0.8 * size


def test_training_gives_the_same_pieces_for_the_same_texts(corpus, pieces):
    texts = texts_of(corpus)
    assert train_bpe(texts, 320) == pieces.model
    assert train_bpe(texts, 310) != pieces.model


@pytest.mark.parametrize("asked, words", [
    (5_000, "at most"),
    (262, "at least"),
    (200, "at least"),
    (1, "at least"),
])
def test_an_impossible_vocabulary_is_refused_with_a_possible_one(asked, words):
    texts = ["the tree is cut back so that it grows again stronger"]
    sentence = rf"model.vocab is {asked}, but .* {words} \d+ pieces"
    with pytest.raises(InputError, match=sentence) as caught:
        train_bpe(texts, asked)
    named = str(caught.value).split(f"{words} ")[1]
    possible = int(named.split()[0])
    assert SentencePiece(train_bpe(texts, possible)).vocab == possible


def test_texts_with_sentencepiece_s_own_marks_are_learnt_from():
    """It drops training texts with U+2585, unless they are escaped."""
    model = train_bpe(["tree \u2585\u2581 " * 50, "stool"], 290)
    assert len(SentencePiece(model).encode("tree tree ")) < 6


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_nothing_is_learnt_from_no_text(texts):
    with pytest.raises(InputError, match="no text to learn from"):
        train_bpe(texts, 300)


# -------------------------------------------------------------------------------------------- files


def test_a_tokenizer_is_loaded_as_it_was_saved(tmp_path, pieces):
    trained = tmp_path / "a.model"
    trained.write_bytes(pieces.model)
    plain = tmp_path / "b.model"
    plain.write_bytes(Bytes.model)
    assert load_tokenizer(trained).encode("the tree") == pieces.encode("the tree")
    assert isinstance(load_tokenizer(str(plain)), Bytes)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 100])
def test_a_file_of_junk_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "t.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"t\.model"):
        load_tokenizer(path)


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path):
    with pytest.raises(InputError, match=r"t\.model"):
        load_tokenizer(tmp_path / "t.model")


def test_a_directory_is_refused_by_its_name(tmp_path):
    path = tmp_path / "t.model"
    path.mkdir()
    with pytest.raises(InputError, match=r"t\.model"):
        load_tokenizer(path)


def test_half_a_model_is_refused(tmp_path, pieces):
    path = tmp_path / "t.model"
    half = len(pieces.model) // 2
    path.write_bytes(pieces.model[:half])
    with pytest.raises(InputError, match=r"t\.model.*not a SentencePiece model"):
        load_tokenizer(path)


# ------------------------------------------------------------------------ the tokenizer of a config


def test_bpe_is_trained_once_and_kept(home, data_config):
    config = replace(data_config, tokenizer="bpe")
    first = make_tokenizer(config, 310)
    (file,) = (home / "tokenizers").glob("*.model")
    before = file.stat().st_mtime_ns
    again = make_tokenizer(config, 310)

    assert first.vocab == 310
    assert again.model == first.model
    assert file.stat().st_mtime_ns == before
    assert not list(home.rglob("*.partial"))
    assert make_tokenizer(config, 315).vocab == 315


def test_bpe_needs_a_size(home, data_config):
    config = replace(data_config, tokenizer="bpe")
    with pytest.raises(InputError, match="model.vocab is 0"):
        make_tokenizer(config, 0)


def test_a_tokenizer_learns_from_training_documents_alone(data_config, corpus):
    documents = list(data.text(str(corpus)))
    trained = [document.text for document in documents if split_of(document.path, 0.1, 0.1) == 0]
    texts = tokenizer_texts(data_config)
    assert sorted(texts) == sorted(trained)
    assert 0 < len(texts) < 40


def characters(texts: list[str]) -> int:
    """How many characters texts have together."""
    return sum(len(text) for text in texts)


def backwards(path: str) -> list[Document]:
    """The documents of a path from the last to the first."""
    return list(data.text(path))[::-1]


def test_a_sample_is_bounded_and_does_not_follow_the_order(data_config, corpus):
    config = replace(data_config, sample_mib=0.01)
    texts = tokenizer_texts(config)
    assert 0 < characters(texts) <= 0.01 * 2**20
    assert tokenizer_texts(config) == texts

    turned = {"corpus": Source(partial(backwards, str(corpus)))}
    assert tokenizer_texts(replace(config, sources=turned)) == texts


def endless():
    """Documents that nobody can read to the end."""
    for i in range(10**6):
        yield Document(str(i), "a tree " * 100)
    raise AssertionError("read to the end")


def test_the_sample_of_a_source_without_end_ends():
    config = DataConfig(sources={"endless": Source(endless)}, sample_mib=0.01)
    texts = tokenizer_texts(config)
    assert 0 < characters(texts) <= 0.01 * 2**20


def refusal_of(content: bytes, tmp_path: Path, home: Path, documents=jsonl) -> str:
    """What is said where a tokenizer is to be trained on a file of this content."""
    file = tmp_path / "a"
    file.write_bytes(content)
    source = Source(partial(documents, path=str(file)))
    config = DataConfig(sources={"mine": source}, dev=0.0, test=0.0)
    with pytest.raises(InputError) as caught:
        make_tokenizer(config, 300)
    assert not list(home.rglob("*.model"))
    return str(caught.value)


NO_TEXT = "the tokenizer has no text to learn from: source 'mine' "


def test_a_tokenizer_without_text_says_what_was_skipped(home, tmp_path):
    other_key = b'{"body": "tree", "id": 7}\n' * 3
    detail = "a#1: no key 'text'; the record has the keys 'body', 'id'"
    said = refusal_of(other_key, tmp_path, home)
    assert said == NO_TEXT + f"skipped 3 missing key ({detail})"

    parquet = b"PAR1\x15\x04\xff\xfe\n\x15\x00\xff\nPAR1"
    said = refusal_of(parquet, tmp_path, home)
    assert said == NO_TEXT + "skipped 2 undecodable, 1 malformed JSON"

    assert refusal_of(b"", tmp_path, home) == NO_TEXT + "gives no documents"
    assert refusal_of(b"", tmp_path, home, data.text) == NO_TEXT + "skipped 1 empty"


def beside_an_empty_file(data_config: DataConfig, tmp_path: Path, held_out: float) -> DataConfig:
    """A config with an empty source before its own; dev and test have this share each."""
    file = tmp_path / "empty"
    file.write_text("")
    empty = Source(partial(data.text, path=str(file)))
    sources = {"one": empty} | data_config.sources
    return replace(data_config, sources=sources, dev=held_out, test=held_out, tokenizer="bpe")


def test_a_tokenizer_without_text_tells_of_each_source_and_of_what_is_held_out(
    home, data_config, tmp_path
):
    config = beside_an_empty_file(data_config, tmp_path, held_out=0.5)
    sentence = r"source 'one' skipped 1 .*; source 'corpus' skipped 40 held out$"
    with pytest.raises(InputError, match=sentence):
        make_tokenizer(config, 300)


def test_a_source_without_text_is_no_error_beside_one_that_has_some(home, data_config, tmp_path):
    config = beside_an_empty_file(data_config, tmp_path, held_out=0.1)
    assert len(tokenizer_texts(config)) == 31
