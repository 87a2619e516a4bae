"""lib/corpus.py: what a run reads, built or being built."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import lib.corpus
from data import DataConfig, Document, InputError, Source
from lib.cache import build, cache_directory
from lib.corpus import assemble, open_caches, spawn
from lib.tokenizers import Bytes
from model import ModelConfig
from train import Config


@pytest.fixture
def config(data_config) -> Config:
    """A config on the corpus in bytes, which leaves the vocabulary to the tokenizer."""
    return Config(data=data_config, model=ModelConfig(vocab=0))


def test_the_vocabulary_is_the_tokenizer_s_unless_a_model_is_read(home, config):
    made, tokenizer, caches = assemble(config)
    assert made.model.vocab == tokenizer.vocab == 258
    assert list(caches) == ["corpus"]

    other = replace(config, model=ModelConfig(vocab=300))
    sentence = "model.vocab is 300, but the tokenizer 'bytes' has 258 pieces"
    with pytest.raises(InputError, match=sentence):
        assemble(other)

    made, _, _ = assemble(replace(other, init_from="runs/base"))
    assert made.model.vocab == 300


def test_a_tokenizer_file_takes_the_place_of_the_config_s(home, config, pieces, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(pieces.model)
    made, tokenizer, _ = assemble(config, file)
    assert made.model.vocab == tokenizer.vocab == 320


def two():
    """A document, and one without text."""
    yield Document("a", "tree")
    yield Document("b", "")


def test_what_was_skipped_is_printed_and_an_empty_split_refused(home, config, capsys):
    few = DataConfig(
        sources={"few": Source(two)},
        tokenizer="bytes",
        dev=0.5,
        test=0.0,
        max_skipped=0.5,
    )
    sentence = "source 'few' has 1 documents, none in (train|dev); give it more"
    with pytest.raises(InputError, match=sentence):
        assemble(replace(config, data=few))
    assert capsys.readouterr().out == "source few: 1 documents skipped: empty\n"


def test_a_stream_has_a_builder_unless_its_cache_is_complete(home, config, monkeypatch):
    streamed = replace(config, data=replace(config.data, stream=True))
    started = []
    monkeypatch.setattr(lib.corpus, "spawn", lambda *arguments: started.append(arguments))

    cache = open_caches(streamed, Bytes())["corpus"]
    assert started == [(streamed, "corpus", cache.directory)]

    build("corpus", config.data, Bytes(), config.seed)
    complete = open_caches(streamed, Bytes())["corpus"]
    assert complete.total["counts"]["documents"] == 40
    assert len(started) == 1


def test_a_builder_is_a_command_that_ends_with_this_process(home, config, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: commands.append(command))
    directory = cache_directory("corpus", config.data, Bytes(), config.seed)

    _, log = spawn(config, "corpus", directory)

    assert log == directory.with_suffix(".log")
    assert log.read_text() == ""
    file = directory.with_suffix(".json")
    assert json.loads(file.read_text())["data"]["tokenizer"] == "bytes"
    (command,) = commands
    train = lib.corpus.ROOT / "train.py"
    this_process = str(os.getpid())
    flags = ["--only", "corpus", "--parent", this_process, "--trust"]  # as tests do, see conftest
    assert command == [sys.executable, train, "corpus", "build", file, *flags]
