"""Held-out documents are predicted once, and their losses become bits per byte."""
import math

import numpy as np
import pytest

import data
from data import DataConfig, Document, Source
from lib.cache import build
from lib.evaluate import HeldOut, bits_per_byte, held_out
from lib.sources import SPLITS, split_of
from lib.tokenizers import Bytes

equal = np.testing.assert_array_equal


def opened(cache, split: str = "test", most: int | None = None) -> HeldOut:
    """The documents of a split in batches of 3 rows of 64, which overlap by 16."""
    return held_out(cache, split, Bytes(), seq=64, batch=3, overlap=16, most=most)


def paths_in(split: str, corpus) -> set[str]:
    """The paths of the corpus that are in a split."""
    paths = [document.path for document in data.text(str(corpus))]
    return {path for path in paths if SPLITS[split_of(path, 0.1, 0.1)] == split}


def predicted(held: HeldOut) -> list[list[int]]:
    """The targets that count, of each document, in the order in which they come."""
    found = [[] for _ in held.paths]
    for arrays, document in held.batches():
        names = {"tokens", "targets", "segments", "positions", "weights", "source"}
        assert set(arrays) == names
        assert all(values.shape == (3, 64) for values in arrays.values())
        assert document.shape == (3, 64)
        counted = document >= 0
        equal(counted, arrays["weights"] > 0)
        for number, target in zip(document[counted], arrays["targets"][counted], strict=True):
            found[number].append(int(target))
    return found


@pytest.mark.parametrize("split, documents", [
    ("dev", 3),
    ("test", 6),
    ("train", 31),
])
def test_every_byte_of_a_split_is_predicted_once_and_in_order(cache, corpus, split, documents):
    held = opened(cache, split)
    contents = [(corpus / path).read_bytes() for path in held.paths]
    assert len(held.paths) == documents
    assert set(held.paths) == paths_in(split, corpus)
    assert held.bytes.tolist() == [len(content) for content in contents]
    assert list(held.texts()) == contents
    assert predicted(held) == [[*content, Bytes.eos] for content in contents]


def test_as_many_documents_are_read_as_fit_a_limit_but_at_least_one(cache):
    whole = opened(cache)
    sizes = np.cumsum(whole.bytes + 1)
    three = int(sizes[2])
    cases = {three: 3, three - 1: 2, 1: 1, 10**9: len(sizes)}
    for most, kept in cases.items():
        held = opened(cache, most=most)
        counted = sum(len(targets) for targets in predicted(held))
        assert held.paths == whole.paths[:kept]
        assert counted == sizes[kept - 1]


def one_document():
    """A document, which is in the train split where that is all."""
    yield Document("a", "tree")


@pytest.mark.parametrize("most", [None, 10])
def test_a_split_without_documents_is_read_without_batches(home, most):
    config = DataConfig(sources={"one": Source(one_document)}, dev=0.0, test=0.0)
    held = opened(build("one", config, Bytes(), 0), "dev", most)
    assert held.paths == []
    assert list(held.batches()) == []
    assert list(held.texts()) == []


def hundredths(arrays):
    """Losses that depend on the target alone."""
    return arrays["targets"] / 100


def test_bits_per_byte_are_those_of_known_losses(cache):
    """Summed here document by document. The error is that of a ratio (Cochran 1977, 6.4)."""
    held = opened(cache)
    got = bits_per_byte(hundredths, held)

    sums = [sum(text) + Bytes.eos for text in held.texts()]
    nats = np.array(sums) / 100
    bits = nats / math.log(2)
    bpb = bits.sum() / held.bytes.sum()
    tokens = (held.bytes + 1).sum()
    assert got["loss"] == pytest.approx(nats.sum() / tokens)
    assert got["bpb"] == pytest.approx(bpb)
    residual = bits - bpb * held.bytes
    n = len(nats)
    variance = residual @ residual / (n - 1) / n
    assert got["bpb_se"] == pytest.approx(math.sqrt(variance) / held.bytes.mean())


def test_the_bits_of_a_single_document_have_no_error(cache):
    held = opened(cache, most=1)
    got = bits_per_byte(hundredths, held)
    (text,) = held.texts()
    nats = (sum(text) + Bytes.eos) / 100
    assert math.isnan(got["bpb_se"])
    assert got["bpb"] == pytest.approx(nats / math.log(2) / len(text))
