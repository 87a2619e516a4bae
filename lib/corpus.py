"""The token caches that a run reads."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from lib.cache import Cache, build, cache_directory
from lib.config import ROOT, to_json
from lib.disk import write
from lib.errors import InputError
from lib.tokenizers import Tokenizer, load_tokenizer, make_tokenizer


def open_caches(config, tokenizer: Tokenizer) -> dict[str, Cache]:
    """The token cache of each source: built, or if `data.stream` left to a process of its own."""
    d, caches = config.data, {}
    if not d.stream:
        return {name: build(name, d, tokenizer, config.seed) for name in d.sources}
    for name in d.sources:
        place = cache_directory(name, d, tokenizer, config.seed)
        caches[name] = Cache(place, name, None if (place / "complete").exists() else
                                  spawn(config, name, place))
    return caches


def spawn(config, name: str, place: Path) -> tuple[subprocess.Popen, Path]:
    """(process, log): a source's token cache being built at `place`, for as long as this process lives."""
    file, log = place.with_suffix(".json"), place.with_suffix(".log")
    write(file, json.dumps(to_json(config)))
    command = [sys.executable, ROOT / "train.py", "corpus", "build", file, "--only", name,
               "--parent", str(os.getpid())]
    with open(log, "w") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
    return process, log


def assemble(config, own: Path | None = None):
    """(config with its vocabulary, tokenizer, caches by source): all that a run reads, built if need be.

    own: a tokenizer file to use in place of what the config names.
    """
    tokenizer = load_tokenizer(own) if own else make_tokenizer(config.data, config.model.vocab)
    if config.model.vocab not in (0, tokenizer.vocab) and not config.init_from:
        raise InputError(f"model.vocab is {config.model.vocab}, but the tokenizer {config.data.tokenizer!r} "
                         f"has {tokenizer.vocab} pieces; allowed is that, or 0 for as many as it has")
    config = replace(config, model=replace(config.model, vocab=config.model.vocab or tokenizer.vocab))
    caches = open_caches(config, tokenizer)
    most = config.data.window if config.data.stream else math.inf
    for name, cache in caches.items():
        counts = cache.counts(min(most, cache.wait(most)))
        for kind in (k for k in counts if k.startswith("skipped")):
            print(f"source {name}: {counts[kind]} documents {kind}")
        for split, share in dict(train=1, dev=config.data.dev, test=config.data.test).items():
            if share and not counts.get(f"{split} documents"):
                raise InputError(f"source {name!r} has {counts['documents']} documents, none in {split}; "
                                 "give it more (a separator cuts a file), or set data.dev or data.test to 0")
    return config, tokenizer, caches
