"""Tokenizers: text to ids and back."""
import heapq
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from lib.disk import FORMAT, cache_home, digest, locked, write
from lib.errors import InputError, user_errors
from lib.keys import function_key
from lib.sources import SURROGATE, Skipped, Source, describe_skipped, path_hash, split_of

LEAST_PIECES = 260  # of SentencePiece with byte fallback: 256 bytes, unknown, bos, eos and one more

# SentencePiece decodes U+2581 as a space, and it drops training texts with U+2585, which marks what
# it does not know. Both become pairs that begin with U+0010, which is escaped itself, so that every
# string comes back as it was.
ESCAPES = {"\x10": "\x10e", "\u2581": "\x10b", "\u2585": "\x10c"}
UNESCAPES = {pair: char for char, pair in ESCAPES.items()}


def escape(text: str) -> str:
    """The text as SentencePiece may see it; see ESCAPES."""
    return re.sub("[\x10\u2581\u2585]", lambda match: ESCAPES[match[0]], text)


def unescape(text: str) -> str:
    """The inverse of `escape`."""
    return re.sub("\x10[ebc]", lambda match: UNESCAPES[match[0]], text)


class SentencePiece:
    """A SentencePiece model behind the escaping that makes it lossless for every string."""

    def __init__(self, model: bytes):
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab = len(self.processor)
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise InputError(
                "the SentencePiece model has no bos or no eos piece; train it with both")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self.processor.encode(escape(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        escaped = [escape(text) for text in texts]
        return self.processor.encode(escaped, num_threads=os.cpu_count())

    def decode(self, ids) -> str:
        """The text of ids; bos and eos are left out, and part of a character is U+FFFD."""
        return unescape(self.processor.decode([int(i) for i in ids]))


class Bytes:
    """UTF-8 bytes 0..255, bos 256, eos 257."""

    vocab, bos, eos = 258, 256, 257
    model = b"coppice bytes 1\n"

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids) -> str:
        """The text of ids; bos and eos are left out, and part of a character is U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")


class HuggingFace:
    """A tokenizer.json for the package tokenizers, as JSON {bos, eos, vocab, tokenizer}.

    vocab: rows of the model's embedding, which may be more than there are tokens. Text that spells
    a special token stays text: no document can end another, or open a turn. Other added tokens are
    found in it, as the model knows them. Whether text comes back as it was is up to the tokenizer.
    """

    def __init__(self, model: bytes):
        said = "a tokenizer.json needs a package: pip install tokenizers"
        with user_errors(ImportError, sentence=said):
            import tokenizers
        self.model = model
        facts = json.loads(model)
        self.vocab, self.bos, self.eos = facts["vocab"], facts["bos"], facts["eos"]
        said = "tokenizer.json cannot be read by the package tokenizers: {error}"
        with user_errors(Exception, sentence=said):  # the package raises bare Exceptions
            self.processor = tokenizers.Tokenizer.from_str(json.dumps(facts["tokenizer"]))
        self.processor.no_truncation()
        self.processor.no_padding()
        self.processor.encode_special_tokens = True  # as the text that spells them
        tokens = 1 + max([self.bos, self.eos, *self.processor.get_vocab().values()])
        if tokens > self.vocab:
            raise InputError(
                f"the tokenizer has {tokens} tokens, but the model's embedding {self.vocab} rows; "
                "allowed are as many rows or more")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self.processor.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        encodings = self.processor.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids) -> str:
        """The text of ids; special and unknown ones are left out, part of a character is U+FFFD."""
        return self.processor.decode([int(i) for i in ids])


Tokenizer = SentencePiece | Bytes | HuggingFace


def make_tokenizer(config, vocab: int) -> Tokenizer:
    """The tokenizer that the data config names; "bpe" with `vocab` pieces is trained and cached."""
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer.startswith("hf:"):
        return read_hf_tokenizer(config.tokenizer)
    if config.tokenizer != "bpe":
        return load_tokenizer(Path(config.tokenizer).expanduser())
    if vocab <= 0:
        raise InputError(
            "model.vocab is 0, but a tokenizer that is to be trained needs a number of pieces; set "
            'model.vocab, or data.tokenizer to "bytes" or a SentencePiece file')
    documents = [[name, function_key(s.documents)] for name, s in config.sources.items()]
    key = digest([FORMAT, "bpe", vocab, config.sample_mib, config.dev, config.test, documents])
    path = cache_home() / "tokenizers" / f"{key}.model"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            write(path, train_bpe(tokenizer_texts(config), vocab))
    return load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.model` file."""
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"data.tokenizer is {str(path)!r}, which cannot be read ({error.strerror}); allowed "
            'are "bpe", "bytes", the path of a SentencePiece model and "hf:DIRECTORY"') from None
    if model == Bytes.model:
        return Bytes()
    if model.startswith(b'{"bos":'):
        return HuggingFace(model)
    try:
        return SentencePiece(model or b"nothing")  # no bytes at all would end the process
    except RuntimeError:
        sentence = f"tokenizer file {str(path)!r} is not a SentencePiece model"
        if model.startswith(b"{"):
            sentence += "; a tokenizer.json is given as hf:DIRECTORY, with what lies beside it"
        raise InputError(sentence) from None


def train_bpe(texts: Iterable[str], vocab: int) -> bytes:
    """A SentencePiece model: BPE with byte fallback and no normalisation.

    The same texts give the same bytes. Pieces may hold spaces: 4096 pieces give 3.7 bytes a token
    on the standard library, but 3.3 where they stop at spaces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(escape(text) for text in texts), model_writer=model,
            model_type="bpe", vocab_size=max(vocab, LEAST_PIECES),
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            byte_fallback=True, character_coverage=0.9995,
            normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            split_by_whitespace=False, split_by_unicode_script=False,
            max_sentence_length=2**30, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise InputError(training_problem(str(error), vocab)) from None
    if vocab < LEAST_PIECES:
        raise InputError(f"model.vocab is {vocab}, but 256 bytes and their like need at least "
                         f"{LEAST_PIECES} pieces")
    return model.getvalue()


def training_problem(message: str, vocab: int) -> str:
    """What SentencePiece could not do, in our words; what it can stands only in its message."""
    most = re.search(r"<= (\d+)", message)
    if most:
        return f"model.vocab is {vocab}, but this corpus can give at most {most[1]} pieces"
    least = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if least:
        return f"model.vocab is {vocab}, but this corpus needs at least {least[1]} pieces"
    return "the tokenizer has no text to learn from"


def tokenizer_texts(config) -> list[str]:
    """Texts to train a tokenizer on: of each source as much as its share of `sample_mib`.

    Raises InputError with what each source left out, if there is no text.
    """
    most = int(config.sample_mib * 2**20 / len(config.sources))
    texts, problems = [], []
    for name, source in config.sources.items():
        found, left_out = sample_texts(source, most, config)
        texts += found
        if not any(found):
            why = describe_skipped(left_out, source) if left_out else "gives no documents"
            problems.append(f"source {name!r} {why}")
    if not any(texts):
        raise InputError(f"the tokenizer has no text to learn from: {'; '.join(problems)}")
    return texts


def sample_texts(source: Source, most: int, config) -> tuple[list[str], Counter]:
    """(texts, what was left out by kind): the training documents of lowest path hash.

    They have about `most` characters, and do not depend on the order of the documents. A source
    without end is read until it gave 64 times as many.
    """
    heap = []  # by falling hash: the largest is dropped first
    left_out, held, seen = Counter(), 0, 0
    for number, document in enumerate(source.documents()):
        kind = why_left_out(document, config)
        if kind:
            left_out[kind] += 1
            continue
        heapq.heappush(heap, (-path_hash(document.path), number, document.text))
        held += len(document.text)
        seen += len(document.text)
        while held > most and len(heap) > 1:
            held -= len(heapq.heappop(heap)[2])
        if seen > 64 * most:
            break
    return [text[:most] for _, _, text in sorted(heap, reverse=True)], left_out


def why_left_out(document, config) -> str:
    """Why a tokenizer does not learn from a document; "" if it does."""
    if isinstance(document, Skipped):
        return document.kind
    if SURROGATE.search(document.text):
        return "lone surrogates"
    if split_of(document.group or document.path, config.dev, config.test) != 0:
        return "held out"
    return "" if document.text else "empty"


def read_hf_json(name: str, file: str) -> dict:
    """A JSON file of hf:DIRECTORY; {} where it is not there, but config.json must be."""
    path = Path(name.removeprefix("hf:")).expanduser() / file
    if not path.is_file() and file != "config.json":
        return {}
    sentence = f"{name} is no local Hugging Face directory: {path} cannot be read ({{reason}})"
    with user_errors((OSError, ValueError), InputError, sentence):
        return json.loads(path.read_text("utf-8"))


def read_hf_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of hf:DIRECTORY: its tokenizer.json or, without one, its tokenizer.model."""
    tokenizer = read_hf_json(name, "tokenizer.json")
    config = read_hf_json(name, "config.json")
    if not tokenizer:
        return load_tokenizer(Path(name.removeprefix("hf:")).expanduser() / "tokenizer.model")
    eos = hf_special(name, "eos", tokenizer)
    bos = hf_special(name, "bos", tokenizer)
    if eos is None:
        raise InputError(f"{name}: neither eos_token_id in config.json nor eos_token in "
                         "tokenizer_config.json says which token ends a document; give one")
    facts = dict(bos=eos if bos is None else bos, eos=eos, vocab=config["vocab_size"],
                 tokenizer=tokenizer)
    return HuggingFace(json.dumps(facts, ensure_ascii=False).encode())


def hf_special(name: str, which: str, tokenizer: dict) -> int | None:
    """The id of the "bos" or "eos" token of hf:DIRECTORY, where its files say it."""
    number = read_hf_json(name, "config.json").get(f"{which}_token_id")
    if isinstance(number, list):
        return number[0]  # the first ends a text, the others a turn
    if number is not None:
        return number
    token = read_hf_json(name, "tokenizer_config.json").get(f"{which}_token")
    content = token["content"] if isinstance(token, dict) else token
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    return added.get(content)
