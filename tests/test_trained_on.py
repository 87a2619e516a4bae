"""Held-out documents that are trained on too: counted once, and kept with the cache."""
import json

import lib.corpus
from data import DataConfig, Document, Source
from lib.cache import Cache
from lib.corpus import open_caches, open_held_out
from lib.tokenizers import Bytes
from model import ModelConfig
from train import Config

TEXTS = [f"text {i}" for i in range(8)]


def trained():
    """Documents to train on."""
    yield from (Document(f"d{i}", text) for i, text in enumerate(TEXTS))


def more():
    """The same, and another one."""
    yield from trained()
    yield Document("new", "held out")


def held_out():
    """Two of those texts under other names, and one of its own."""
    yield Document("a", TEXTS[0])
    yield Document("b", TEXTS[1])
    yield Document("c", "held out")


def opened(documents=trained):
    """Open the caches of a config, and say what is said of them."""
    data = DataConfig(
        sources={"x": Source(documents)},
        held_out={"mine": Source(held_out)},
        tokenizer="bytes",
        dev=0.0,
        test=0.0,
    )
    config = Config(data=data, model=ModelConfig(vocab=258))
    caches = open_caches(config, Bytes())
    return open_held_out(config, Bytes(), caches)


def test_they_are_counted_once_and_said_each_time(home, monkeypatch, capsys):
    cache = opened()["mine"]
    said = "held-out mine: 2 of 3 documents are trained on too"
    assert said in capsys.readouterr().out
    assert json.loads((cache.directory / "trained_on.json").read_text())["documents"] == 2

    def none_is_opened(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "open", none_is_opened)
        opened()
    assert said in capsys.readouterr().out

    opened(more)  # other text to train on is another count
    assert "held-out mine: 3 of 3 documents" in capsys.readouterr().out


def test_a_count_that_is_damaged_or_cannot_be_kept_is_made_again(home, monkeypatch, capsys):
    cache = opened()["mine"]
    place = cache.directory / "trained_on.json"
    place.write_text(place.read_text().replace('"documents": 2', '"documents": 7'))
    opened()
    place.write_text("{")

    def refuses(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(lib.corpus, "write", refuses)
    opened()
    assert capsys.readouterr().out.count("2 of 3 documents are trained on too") == 3
    assert place.read_text() == "{"


def test_one_process_alone_says_it(home, monkeypatch, capsys):
    monkeypatch.setattr(lib.corpus, "is_main_process", lambda: False)
    opened()
    assert "trained on too" not in capsys.readouterr().out
