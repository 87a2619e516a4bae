"""The token caches that a run reads."""
import contextlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.cache import Cache, build, open_cache
from lib.config import ROOT, to_json
from lib.disk import digest, read_object, with_checksum, without_checksum, write
from lib.errors import InputError
from lib.help import short
from lib.processes import is_main_process
from lib.sources import SPLITS
from lib.tables import printable
from lib.tokenizers import Tokenizer, load_tokenizer, make_tokenizer


def assemble(config, tokenizer_file: Path | None = None):
    """(config with its vocabulary, tokenizer, {source: cache}) of a config, built if need be.

    tokenizer_file: a tokenizer to use in place of the one that the config names. Where caches are
    streamed, this returns when the first window of each is there.
    """
    if tokenizer_file:
        tokenizer = load_tokenizer(tokenizer_file)
    else:
        tokenizer = make_tokenizer(config.data, config.model.vocab)
    config = set_vocab(config, tokenizer)
    caches = open_caches(config, tokenizer)
    most = config.data.window if config.data.stream else math.inf
    for name, cache in caches.items():
        shards = min(most, cache.wait(most))
        counts = cache.counts(shards)
        for kind in counts:
            if kind.startswith(("skipped", "doubtful")):
                print(printable(f"source {name}: {counts[kind]} documents {kind}"))
        check_splits(name, counts, config.data)
    return config, tokenizer, caches


def set_vocab(config, tokenizer: Tokenizer):
    """The config with the tokenizer's vocabulary where it leaves that open."""
    asked = config.model.vocab
    if asked == 0:
        return replace(config, model=replace(config.model, vocab=tokenizer.vocab))
    if asked != tokenizer.vocab and not config.init_from:  # a model that was read may have more
        raise InputError(
            f"model.vocab is {asked}, but the tokenizer {short(config.data.tokenizer)!r} has "
            f"{tokenizer.vocab} pieces; allowed is that, or 0 for as many as it has")
    return config


def check_splits(name: str, counts: Counter, data):
    """Raise InputError unless a source has documents in each split that has a share.

    Where the source, or every document, says which split it is, no other is missed.
    """
    own = data.sources[name].split
    if own or counts["documents of a split of their own"] == counts["documents"]:
        return
    dev, test = data.shares(name)
    for split, share in {"train": 1, "dev": dev, "test": test}.items():
        if share and not counts.get(f"{split} documents"):
            raise InputError(
                f"source {name!r} has {counts['documents']} documents, none in {split}; give it "
                "more (a separator cuts a file), or set data.dev or data.test to 0")


def open_caches(config, tokenizer: Tokenizer) -> dict[str, Cache]:
    """{source: its token cache}: complete or, with `data.stream`, built by a process of its own."""
    caches = {}
    for name in config.data.sources:
        if config.data.stream:
            caches[name] = stream(config, name, tokenizer)
        else:
            caches[name] = build(name, config.data, tokenizer, config.seed)
    return caches


def open_held_out(config, tokenizer: Tokenizer, caches: dict[str, Cache]) -> dict[str, Cache]:
    """{name: token cache} of what `data.held_out` names, complete even where sources stream.

    Says how many of its documents are among those of `caches` that are trained on.
    """
    found = {}
    for name, source in config.data.held_out.items():
        found[name] = build(name, config.data.alone(name, source), tokenizer, config.seed)
    if not config.data.stream and is_main_process():
        for name, cache in found.items():
            say_overlap(name, cache, caches)
    return found


def say_overlap(name: str, held_out: Cache, caches: dict[str, Cache]):
    """Say how many documents of held-out text have the text of one that is trained on.

    It is counted once, and kept beside the held-out cache: to count, every shard is opened.
    """
    total = held_out.total
    fingerprints = [cache.total["fingerprint"] for cache in caches.values()]
    key = digest([total["fingerprint"], fingerprints])
    place = held_out.directory / "trained_on.json"
    kept = without_checksum(read_object(place)) or {}
    if kept.get("of") != key:
        kept = {"of": key, "documents": trained_on_too(held_out, caches)}
        with contextlib.suppress(OSError):  # caches that may only be read
            write(place, json.dumps(with_checksum(kept)))
    if kept["documents"]:
        print(f"held-out {name}: {kept['documents']} of {total['counts']['documents']} documents "
              "are trained on too: their text is that of a training document")


def trained_on_too(held_out: Cache, caches: dict[str, Cache]) -> int:
    """How many held-out documents have the text of one that is trained on."""
    trained = []
    for cache in caches.values():
        for number in range(cache.wait()):
            shard = cache.shard(number)
            trained.append(shard.texts[shard.split == SPLITS.index("train")])
    known = np.concatenate(trained)
    found = 0
    for number in range(held_out.wait()):
        shared = np.isin(held_out.shard(number).texts, known)
        found += int(shared.sum())
    return found


def stream(config, name: str, tokenizer: Tokenizer) -> Cache:
    """The token cache of a source, which a process is still building unless it is complete."""
    cache = open_cache(name, config.data, tokenizer, config.seed)
    if cache.length() is None:
        cache.wait_for(spawn(config, name, cache.directory))
    return cache


def spawn(config, name: str, directory: Path) -> tuple[subprocess.Popen, Path]:
    """Start to build a source's token cache; (process, its log).

    It is a command, not a fork of this process, whose threads and devices it must not share. It
    ends when this process ends.
    """
    config_file = directory.with_suffix(".json")
    log = directory.with_suffix(".log")
    write(config_file, json.dumps(to_json(config)))
    command = [sys.executable, ROOT / "train.py", "corpus", "build", config_file]
    command += ["--only", name, "--parent", str(os.getpid()), "--trust"]  # of this process
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)
    return process, log
