"""lib/tokenizers.py: lossless for every string, trained on training documents alone, read from files."""
from dataclasses import replace
from functools import partial

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

AWKWARD = ["\t", " ", "  ", "\n", "\r\n", "\x00", "\x10", "\x10e", "\x10b", "e", "b", "c", "\u2581", "\u2585",
           "\u0301", "\u200d", "é", "木", "🌳", "👩‍🌾", "<s>", "</s>", "<unk>", "<0x0A>", "def", "\ufffd",
           "\ufeff", "\U0010ffff"]
anything = st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join),
                     st.text(st.sampled_from("\x10ebc\u2581\u2585 ")))


@given(anything)
@example("\u2581 \x10b\u2585\x10")
def test_pieces_come_back_as_the_text(pieces, text):
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert pieces.decode([pieces.bos, *ids, pieces.eos]) == text
    assert all(0 <= i < pieces.vocab and i not in (pieces.bos, pieces.eos) for i in ids)


@given(anything)
def test_bytes_come_back_as_the_text(text):
    ids = Bytes().encode(text)
    assert Bytes().decode([256, *ids, 257]) == text and bytes(ids) == text.encode()


@given(st.lists(anything, max_size=4))
def test_encoding_together_is_as_encoding_apart(pieces, texts):
    for tokenizer in (pieces, Bytes()):
        together = tokenizer.encode_batch(texts)
        assert [list(ids) for ids in together] == [list(tokenizer.encode(text)) for text in texts]


@given(anything, anything)
@example("\u2585", "\x10c")
def test_escapes_are_unambiguous(one, other):
    assert (escape(one) == escape(other)) == (one == other)
    assert not {"\u2581", "\u2585"} & set(escape(one))


def test_cut_characters_are_replaced(pieces):
    assert Bytes().decode("木".encode()[:2]) == "\ufffd"
    assert "\ufffd" in pieces.decode(pieces.encode("🌳")[:-1])


def test_tokenizer_is_smaller_than_bytes(pieces, corpus):
    assert pieces.vocab == 320
    texts = [file.read_text("utf-8") for file in corpus.rglob("*.txt")]
    tokens, size = sum(map(len, pieces.encode_batch(texts))), sum(len(text.encode()) for text in texts)
    assert tokens < 0.8 * size


def test_training_gives_the_same_pieces_for_the_same_texts(corpus, pieces):
    texts = [file.read_text("utf-8") for file in sorted(corpus.rglob("*.txt"))]
    assert train_bpe(texts, 320) == pieces.model
    assert train_bpe(texts, 310) != pieces.model


@pytest.mark.parametrize("asked,word", [
    (5_000, "at most"), (262, "at least"), (200, "at least"), (1, "at least")])
def test_impossible_vocabularies_name_a_possible_one(asked, word):
    texts = ["the tree is cut back so that it grows again stronger"]
    with pytest.raises(InputError, match=f"model.vocab is {asked}, but .* {word} \\d+ pieces") as caught:
        train_bpe(texts, asked)
    allowed = int(str(caught.value).split(f"{word} ")[1].split()[0])
    assert SentencePiece(train_bpe(texts, allowed)).vocab == allowed


def test_texts_with_sentencepiece_s_own_marks_are_learnt_from():
    """It drops training texts with U+2585, unless they are escaped."""
    model = train_bpe(["tree \u2585\u2581 " * 50, "stool"], 290)
    assert len(SentencePiece(model).encode("tree tree ")) < 6


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_tokenizer_without_text_is_an_input_error(texts):
    with pytest.raises(InputError, match="no text to learn from"):
        train_bpe(texts, 300)


def test_load_tokenizer_takes_what_was_saved(tmp_path, pieces):
    (tmp_path / "a.model").write_bytes(pieces.model)
    (tmp_path / "b.model").write_bytes(Bytes.model)
    assert load_tokenizer(tmp_path / "a.model").encode("the tree") == pieces.encode("the tree")
    assert isinstance(load_tokenizer(str(tmp_path / "b.model")), Bytes)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 100, None, "directory"])
def test_load_tokenizer_refuses_junk(tmp_path, pieces, content):
    path = tmp_path / "t.model"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"t\.model"):
        load_tokenizer(path)


def test_load_tokenizer_refuses_half_a_model(tmp_path, pieces):
    (tmp_path / "t.model").write_bytes(pieces.model[:len(pieces.model) // 2])
    with pytest.raises(InputError, match=r"t\.model.*not a SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")


def test_bpe_is_trained_once_and_kept(home, data_config):
    config = replace(data_config, tokenizer="bpe")
    one = make_tokenizer(config, 310)
    (file,) = (home / "tokenizers").glob("*.model")
    before = file.stat().st_mtime_ns
    assert one.vocab == 310 and make_tokenizer(config, 310).model == one.model
    assert file.stat().st_mtime_ns == before and not list(home.rglob("*.partial"))
    assert make_tokenizer(config, 315).vocab == 315


def test_bpe_needs_a_size(home, data_config):
    with pytest.raises(InputError, match="model.vocab is 0"):
        make_tokenizer(replace(data_config, tokenizer="bpe"), 0)


def test_tokenizer_is_learnt_from_training_documents_alone(data_config, corpus):
    texts = tokenizer_texts(data_config)
    expected = [d.text for d in data.text(str(corpus)) if split_of(d.path, 0.1, 0.1) == 0]
    assert sorted(texts) == sorted(expected) and len(texts) < 40


def test_sample_is_bounded_and_does_not_follow_the_order(data_config, corpus):
    def backwards(path):
        return reversed(list(data.text(path)))

    config = replace(data_config, sample_mib=0.01)
    texts = tokenizer_texts(config)
    assert 0 < sum(map(len, texts)) <= 0.01 * 2**20 and texts == tokenizer_texts(config)
    turned = replace(config, sources={"corpus": Source(partial(backwards, str(corpus)))})
    assert tokenizer_texts(turned) == texts


def test_sample_of_a_source_without_end_ends():
    def endless():
        for i in range(10**6):
            yield Document(str(i), "a tree " * 100)
        raise AssertionError("read to the end")

    texts = tokenizer_texts(DataConfig(sources={"endless": Source(endless)}, sample_mib=0.01))
    assert 0 < sum(map(len, texts)) <= 0.01 * 2**20


def no_text(home, tmp_path, content: bytes, documents=jsonl) -> str:
    """What is said where a tokenizer is to be trained on a file of this content."""
    (tmp_path / "a").write_bytes(content)
    source = Source(partial(documents, path=str(tmp_path / "a")))
    with pytest.raises(InputError) as caught:
        make_tokenizer(DataConfig(sources={"mine": source}, dev=0.0, test=0.0), 300)
    assert not list(home.rglob("*.model"))
    return str(caught.value)


def test_a_tokenizer_without_text_says_what_was_skipped(home, tmp_path):
    empty = "the tokenizer has no text to learn from: source 'mine' gives no documents"
    begin = empty.replace("gives no documents", "skipped ")
    other_key = no_text(home, tmp_path, b'{"body": "tree", "id": 7}\n' * 3)
    assert other_key == begin + "3 missing key (a#1: no key 'text'; the record has the keys 'body', 'id')"
    parquet = b"PAR1\x15\x04\xff\xfe\n\x15\x00\xff\nPAR1"
    assert no_text(home, tmp_path, parquet) == begin + "2 undecodable, 1 malformed JSON"
    assert no_text(home, tmp_path, b"") == empty
    assert no_text(home, tmp_path, b"", data.text) == begin + "1 empty"


def test_a_tokenizer_without_text_tells_of_each_source_and_of_what_is_held_out(home, data_config, tmp_path):
    (tmp_path / "empty").write_text("")
    empty = Source(partial(data.text, path=str(tmp_path / "empty")))
    config = replace(data_config, sources={"one": empty, **data_config.sources}, dev=0.5, test=0.5)
    with pytest.raises(InputError, match=r"source 'one' skipped 1 .*; source 'corpus' skipped 40 held out$"):
        make_tokenizer(replace(config, tokenizer="bpe"), 300)
    config = replace(config, dev=0.1, test=0.1)
    assert len(tokenizer_texts(config)) == 31  # a source without text is no error beside one that has some
