"""Tokenizers: text to ids and back."""
import heapq
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from lib.disk import FORMAT, cache_home, digest, locked, write
from lib.errors import InputError, user_errors
from lib.keys import function_key
from lib.sources import SURROGATE, Skipped, path_hash, split_of

# SentencePiece decodes U+2581 as a space and drops training texts with U+2585 (its unknown mark): both become
# pairs that begin with U+0010, which is escaped itself, so that every string comes back as it was.
ESCAPES = {"\x10": "\x10e", "\u2581": "\x10b", "\u2585": "\x10c"}
UNESCAPES = {pair: char for char, pair in ESCAPES.items()}


def escape(text: str) -> str:
    """The text as SentencePiece may see it; see ESCAPES."""
    return re.sub("[\x10\u2581\u2585]", lambda m: ESCAPES[m[0]], text)


class SentencePiece:
    """A SentencePiece model behind the escaping that makes it lossless for every string."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab, self.bos, self.eos = len(self.processor), self.processor.bos_id(), self.processor.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise InputError("the SentencePiece model has no bos or no eos piece; train it with both")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self.processor.encode(escape(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return self.processor.encode([escape(t) for t in texts], num_threads=os.cpu_count())

    def decode(self, ids) -> str:
        """The text of ids; bos and eos are nothing, and a cut character is U+FFFD."""
        return re.sub("\x10[ebc]", lambda m: UNESCAPES[m[0]], self.processor.decode([int(i) for i in ids]))


class Bytes:
    """UTF-8 bytes 0..255, bos 256, eos 257."""

    vocab, bos, eos, model = 258, 256, 257, b"coppice bytes 1\n"

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text."""
        return [np.frombuffer(t.encode("utf-8"), np.uint8) for t in texts]

    def decode(self, ids) -> str:
        """The text of ids; bos and eos are nothing, and a cut character is U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")


class HuggingFace:
    """A tokenizer.json of the library tokenizers, as JSON {bos, eos, vocab, tokenizer}; see tools/export.py.

    vocab: rows of the model's embedding, which may be more than there are tokens. Text that spells a special
    token stays text: no document can end another, or open a turn. Other added tokens are found in it, as the
    model knows them. Whether text comes back as it was is up to the tokenizer.
    """

    def __init__(self, model: bytes):
        try:
            import tokenizers
        except ImportError:
            raise InputError("a tokenizer.json needs a package: pip install tokenizers") from None
        self.model, kept = model, json.loads(model)
        self.vocab, self.bos, self.eos = kept["vocab"], kept["bos"], kept["eos"]
        try:
            self.processor = tokenizers.Tokenizer.from_str(json.dumps(kept["tokenizer"]))
        except Exception as error:  # the library has no kind of its own
            raise InputError(f"tokenizer.json cannot be read by the package tokenizers: {error}") from None
        self.processor.no_truncation()
        self.processor.no_padding()
        self.processor.encode_special_tokens = True  # as text
        tokens = 1 + max([self.bos, self.eos, *self.processor.get_vocab().values()])
        if tokens > self.vocab:
            raise InputError(f"the tokenizer has {tokens} tokens, but the model's embedding {self.vocab} "
                             "rows; allowed are as many rows or more")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self.processor.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        return [e.ids for e in self.processor.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids) -> str:
        """The text of ids; special tokens and ids of none are nothing, and a cut character is U+FFFD."""
        return self.processor.decode([int(i) for i in ids])
Tokenizer = SentencePiece | Bytes | HuggingFace


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.model` file."""
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"data.tokenizer is {str(path)!r}, which cannot be read ({error.strerror}); allowed "
                         'are "bpe", "bytes", the path of a SentencePiece model and "hf:DIRECTORY"') from None
    if model == Bytes.model:
        return Bytes()
    if model.startswith(b'{"bos":'):
        return HuggingFace(model)
    try:
        return SentencePiece(model or b"nothing")
    except RuntimeError:
        hint = "; a tokenizer.json is given as hf:DIRECTORY, with what lies beside it" * (model[:1] == b"{")
        raise InputError(f"tokenizer file {str(path)!r} is not a SentencePiece model{hint}") from None


def train_bpe(texts: Iterable[str], vocab: int) -> bytes:
    """Train a BPE model with byte fallback and no normalisation; the same bytes for the same texts. Pieces
    may hold spaces: 4096 give 3.7 bytes a token on the standard library, 3.3 where they stop at spaces."""
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(escape(t) for t in texts), model_writer=out, model_type="bpe", unk_id=0,
            bos_id=1, eos_id=2, pad_id=-1, vocab_size=max(vocab, 260), byte_fallback=True,
            add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_by_whitespace=False, allow_whitespace_only_pieces=True, split_by_unicode_script=False,
            character_coverage=0.9995, max_sentence_length=2**30, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        most, least = (re.search(r, str(error)) for r in (r"<= (\d+)", r"required_chars\. \d+ vs (\d+)"))
        problem = "the tokenizer has no text to learn from: the training split is empty"
        if most or least:
            limit = f"can give at most {most[1]}" if most else f"needs at least {least[1]}"
            problem = f"model.vocab is {vocab}, but this corpus {limit} pieces"
        raise InputError(problem) from None
    if vocab < 260:
        raise InputError(f"model.vocab is {vocab}, but 256 bytes and their like need at least 260 "
                              "pieces")
    return out.getvalue()


def tokenizer_texts(config) -> list[str]:
    """Texts for the tokenizer: of each source, those of lowest path hash within its share of `sample_mib`."""
    share, texts = int(config.sample_mib * 2**20 / len(config.sources)), []
    for source in config.sources.values():
        heap, held, seen = [], 0, 0  # by falling hash: the largest hash leaves first
        for number, document in enumerate(source.documents()):
            if isinstance(document, Skipped) or SURROGATE.search(document.text) \
                    or split_of(document.group or document.path, config.dev, config.test):
                continue
            heapq.heappush(heap, (-path_hash(document.path), number, document.text))
            held, seen = held + len(document.text), seen + len(document.text)
            while held > share and len(heap) > 1:
                held -= len(heapq.heappop(heap)[2])
            if seen > 64 * share:  # so that a corpus without end has a tokenizer too
                break
        texts += [t[:share] for _, _, t in sorted(heap, reverse=True)]
    return texts


def make_tokenizer(config, vocab: int) -> Tokenizer:
    """The tokenizer that the config names; a "bpe" one of `vocab` pieces is trained once and cached."""
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer.startswith("hf:"):
        return read_hf_tokenizer(config.tokenizer)
    if config.tokenizer != "bpe":
        return load_tokenizer(Path(config.tokenizer).expanduser())
    if vocab <= 0:
        raise InputError("model.vocab is 0, but a tokenizer that is to be trained needs a number of "
                              'pieces; set model.vocab, or data.tokenizer to "bytes" or a SentencePiece file')
    key = digest([FORMAT, "bpe", vocab, config.sample_mib, config.dev, config.test,
                       [[name, function_key(s.documents)] for name, s in config.sources.items()]])
    path = cache_home() / "tokenizers" / f"{key}.model"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            write(path, train_bpe(tokenizer_texts(config), vocab))
    return load_tokenizer(path)


def read_hf_json(name: str, file: str) -> dict:
    """A JSON file of hf:DIR; {} where it is not there, but for config.json, which must be."""
    path = Path(name.removeprefix("hf:")).expanduser() / file
    if not path.is_file() and file != "config.json":
        return {}
    with user_errors((OSError, ValueError), InputError, f"{name} is no local Hugging Face directory: {path} "
                     "cannot be read ({reason})"):
        return json.loads(path.read_text("utf-8"))


def read_hf_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of hf:DIR: its tokenizer.json or, without one, its tokenizer.model."""
    config, named = read_hf_json(name, "config.json"), read_hf_json(name, "tokenizer_config.json")
    tokenizer = read_hf_json(name, "tokenizer.json")
    if not tokenizer:
        return load_tokenizer(Path(name.removeprefix("hf:")).expanduser() / "tokenizer.model")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}

    def find(which: str) -> int | None:
        number, token = config.get(f"{which}_token_id"), named.get(f"{which}_token")
        number = number[0] if isinstance(number, list) else number  # the first ends a text, others a turn
        return added.get(token["content"] if isinstance(token, dict) else token) if number is None else number

    if (eos := find("eos")) is None:
        raise InputError(f"{name}: neither eos_token_id in config.json nor eos_token in "
                         "tokenizer_config.json says which token ends a document; give one")
    bos = find("bos")
    kept = dict(bos=eos if bos is None else bos, eos=eos, vocab=config["vocab_size"], tokenizer=tokenizer)
    return HuggingFace(json.dumps(kept, ensure_ascii=False).encode())
