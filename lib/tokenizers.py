"""Tokenizers: text to ids and back."""
import base64
import heapq
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from lib.bind import bind, parameters
from lib.config import function_of, to_json
from lib.disk import FORMAT, cache_home, digest, locked, read_checked, user_path, write_checked
from lib.errors import ODD, InputError, user_errors
from lib.hub import place
from lib.keys import function_key, source_above
from lib.seams import TOKENIZER, require_gave
from lib.sources import (
    SPLITS,
    SURROGATE,
    Skipped,
    Source,
    describe_skipped,
    documents_of,
    path_hash,
    split_in,
)
from lib.trust import read_record

NUMBERS = b"coppice numbers "  # how the file of such a tokenizer begins
OWN = "vocab", "bos", "eos", "model", "encode", "decode"  # what a tokenizer of a config has
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


def char_of_byte(chars: list[str]) -> np.ndarray:
    """The number of the character that each byte of their UTF-8 is of [bytes]."""
    sizes = [len(char.encode("utf-8")) for char in chars]
    return np.repeat(np.arange(len(chars)), sizes)


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

    def spans(self, text: str) -> np.ndarray:
        """(start, end) of each token in characters of a text [tokens 2]; see `marked_tokens`."""
        ids = self.encode(text)
        if not ids:
            return np.zeros((0, 2), np.int64)
        chars = char_of_byte([escape(char) for char in text])
        ends = np.cumsum([self.size(i) for i in ids])
        extra = ends[-1] - len(chars)  # 1 if the model adds a space in front
        if extra not in (0, 1):
            raise InputError("the SentencePiece model changes the text that it reads, so marks "
                             "have no place in it; allowed is one that does not normalise")
        starts = np.maximum(0, np.append(0, ends[:-1]) - extra)
        ends = np.maximum(1, ends - extra)
        return np.stack([chars[starts], chars[ends - 1] + 1], axis=1)

    def size(self, token: int) -> int:
        """The bytes of UTF-8 that a token stands for."""
        if self.processor.is_byte(token):
            return 1
        piece = self.processor.id_to_piece(token)
        return len(piece.replace("\u2581", " ").encode("utf-8"))


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

    def spans(self, text: str) -> np.ndarray:
        """(start, end) of each token in characters of a text [tokens 2]; see `marked_tokens`."""
        chars = char_of_byte(list(text))
        return np.stack([chars, chars + 1], axis=1)


class Numbers:
    """Ids 0 to n - 1, which a text writes as numbers with spaces between, bos n, eos n + 1."""

    def __init__(self, n: int):
        self.vocab, self.bos, self.eos = n + 2, n, n + 1
        self.model = NUMBERS + b"%d\n" % n

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos. Raises InputError for what is no such number."""
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) < self.bos):
                raise InputError(f"the tokenizer numbers:{self.bos} reads {word!r}; allowed are "
                                 f"numbers from 0 to {self.bos - 1} with spaces between them")
        return [int(word) for word in words]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        """The numbers of ids with a space between them; bos and eos are left out."""
        return " ".join(str(int(i)) for i in ids if i < self.bos)

    def spans(self, text: str) -> np.ndarray:
        """(start, end) of each token in characters of a text [tokens 2]; see `marked_tokens`."""
        found = [match.span() for match in re.finditer(r"\S+", text)]
        return np.array(found, np.int64).reshape(-1, 2)


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
        with user_errors(Exception, sentence=said):  # of tokenizers, which raises bare ones
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

    def spans(self, text: str) -> np.ndarray:
        """(start, end) of each token in characters of a text [tokens 2]; see `marked_tokens`."""
        encoding = self.processor.encode(text, add_special_tokens=False)
        return np.array(encoding.offsets, np.int64).reshape(-1, 2)


class Own:
    """A tokenizer of a class that a config file defines, as JSON {class, source, model}.

    The class is at the top level of its file. It is made of bytes that it has as its attribute
    `model`: `Class(tokenizer.model)` is the same tokenizer again. It has vocab, bos, eos (each an
    integer), encode(text) -> ids and decode(ids) -> text. It may have encode_batch(texts), and
    spans(text), which documents with marks need; see `marked_tokens`.
    """

    def __init__(self, model: bytes):
        self.model = model
        facts = json.loads(model)
        made = function_of({"function": facts["class"], "arguments": {}})
        self.inner = made(base64.b64decode(facts["model"]))
        self.vocab, self.bos, self.eos = self.inner.vocab, self.inner.bos, self.inner.eos

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos. Raises InputError for what are none."""
        return self.check_ids(self.inner.encode(text), "encode")

    def encode_batch(self, texts: list[str]) -> list:
        """Ids of each text."""
        if not hasattr(self.inner, "encode_batch"):
            return [self.encode(text) for text in texts]
        found = self.inner.encode_batch(texts)
        self.require(isinstance(found, list) and len(found) == len(texts), "encode_batch", found)
        for ids in found:
            self.check_ids(ids, "encode_batch")
        return found

    def decode(self, ids) -> str:
        """The text of ids; bos and eos are left out. Raises InputError for what is none."""
        text = self.inner.decode([int(i) for i in ids])
        self.require(isinstance(text, str), "decode", text)
        return text

    def check_ids(self, ids, method: str) -> list[int]:
        """What a method gave as ids, where it is that."""
        fine = isinstance(ids, list | tuple | np.ndarray)
        array = np.asarray(ids)
        if fine and array.size:
            fine = array.ndim == 1 and array.dtype.kind in "iu"
            fine = fine and 0 <= array.min()
            fine = fine and array.max() < self.vocab
        self.require(fine, method, ids)
        return array.tolist()

    def require(self, fine: bool, method: str, gave):
        """Raise InputError unless what a method gave is fine."""
        function = getattr(type(self.inner), method)
        more = f": ids from 0 to {self.vocab - 1}, and texts of them"
        require_gave(fine, TOKENIZER, function, gave, more)

    def spans(self, text: str) -> np.ndarray:
        """(start, end) of each token in characters of a text [tokens 2]; see `marked_tokens`."""
        if not hasattr(self.inner, "spans"):
            raise InputError(f"a document has marks, but the tokenizer {type(self.inner).__name__} "
                             "has no method spans; give it one, see lib/tokenizers.py")
        return np.asarray(self.inner.spans(text), np.int64).reshape(-1, 2)


def class_of(tokenizer: "Tokenizer") -> dict:
    """{"function": FILE:CLASS} of a tokenizer whose class a config file defines, otherwise {}."""
    if not isinstance(tokenizer, Own):
        return {}
    return {"function": json.loads(tokenizer.model)["class"]}


Tokenizer = SentencePiece | Bytes | Numbers | HuggingFace | Own


def is_tokenizer(made) -> bool:
    """Whether what a function made has what a tokenizer has, and encodes a text and the end."""
    if not all(hasattr(made, name) for name in OWN):
        return False
    if not isinstance(made.model, bytes) or not isinstance(made.vocab, int):
        return False
    for number in (made.bos, made.eos):
        if not isinstance(number, int) or not 0 <= number < made.vocab:
            return False
    return callable(made.encode) and callable(made.decode)


def own_model(tokenizer) -> bytes:
    """What `Own` is made of, for a tokenizer of a class in a config file. Raises InputError.

    It depends on the class's source and on its file's up to the config, as caches must.
    """
    made = type(tokenizer)
    written = to_json(made)
    facts = {
        "class": written["function"],
        "source": digest([written["source"], source_above(made)]),
        "model": base64.b64encode(tokenizer.model).decode(),
    }
    return json.dumps(facts).encode()


def marked_tokens(tokenizer: Tokenizer, text: str, marks: Sequence[tuple[int, int]],
                  tokens: int) -> np.ndarray:
    """int32 [spans 2]: the first token and the end of what holds a character of each mark.

    marks: (start, end) in characters of the text, which has so many tokens. They come from
    `tokenizer.spans`: what each token covers of the whole text as it is encoded, in rising order.
    """
    spans = tokenizer.spans(text)
    if len(spans) != tokens:
        raise InputError(f"the tokenizer has {tokens} tokens for a text with marks and says where "
                         f"{len(spans)} of them stand; allowed is a place for each")
    wanted = np.array(marks, np.int64).reshape(-1, 2)
    empty = wanted[:, 0] == wanted[:, 1]
    wanted = wanted[~empty]
    first = np.searchsorted(spans[:, 1], wanted[:, 0], side="right")
    end = np.searchsorted(spans[:, 0], wanted[:, 1], side="left")
    end = np.maximum(first, end)
    return np.stack([first, end], axis=1).astype(np.int32)


def make_tokenizer(config, vocab: int) -> Tokenizer:
    """The tokenizer that the data config names; "bpe" with `vocab` pieces is trained and cached."""
    if callable(config.tokenizer):
        return call_tokenizer(config, vocab)
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer.startswith("numbers:"):
        return Numbers(number_of(config.tokenizer))
    if config.tokenizer.startswith("hf:"):
        return read_hf_tokenizer(config.tokenizer)
    if config.tokenizer != "bpe":
        return load_tokenizer(user_path(config.tokenizer))
    if vocab <= 0:
        raise InputError(
            "model.vocab is 0, but a tokenizer that is to be trained needs a number of pieces; set "
            'model.vocab, or data.tokenizer to "bytes" or a SentencePiece file')
    key = ["bpe", vocab, *texts_key(config)]
    return kept_tokenizer(key, lambda: train_bpe(tokenizer_texts(config), vocab))


def kept_tokenizer(key: list, make: Callable[[], bytes]) -> Tokenizer:
    """The tokenizer whose file `make` gives, made once for a key and kept in the cache."""
    path = cache_home() / "tokenizers" / f"{digest([FORMAT, *key])}.model"
    with locked(path.with_suffix(".lock")):
        model = read_checked(path)
        if model is None:
            if path.exists():
                print(f"the tokenizer {path} is damaged; it is made again", flush=True)
            model = make()
            write_checked(path, model)
    return tokenizer_of_model(model, str(path))


def texts_key(config) -> list:
    """What `tokenizer_texts` depends on, as JSON."""
    documents = [[name, function_key(s.documents)] for name, s in config.sources.items()]
    splits = {name: s.split for name, s in config.sources.items() if s.split}
    more = [splits] if splits else []
    shares = [config.shares(name) for name in config.sources]
    return [config.sample_mib, shares, documents, *more]


def call_tokenizer(config, vocab: int) -> Tokenizer:
    """The tokenizer that a function `[texts, vocab] -> tokenizer` makes, once; it is then cached.

    texts: as many training texts as "bpe" would get. vocab: `model.vocab`, 0 where that is open. It
    gives a tokenizer of this file, or one as `Own` says. Raises InputError for what is neither.
    """
    function = config.tokenizer
    asked = parameters(function)
    key = ["function", function_key(function)]
    if "vocab" in asked:
        key.append(vocab)
    if "texts" in asked:
        key += texts_key(config)

    def make() -> bytes:
        texts = tokenizer_texts(config) if "texts" in asked else []
        made = bind(function, texts=texts, vocab=vocab)()
        if isinstance(made, Tokenizer):
            return made.model
        has = ", ".join(OWN)
        more = f": it has {has}, ids from 0 to vocab - 1 and texts of them"
        require_gave(is_tokenizer(made), TOKENIZER, function, made, more)
        return own_model(made)

    return kept_tokenizer(key, make)


def number_of(name: str) -> int:
    """N of "numbers:N"."""
    number = name.removeprefix("numbers:")
    if not (number.isascii() and number.isdigit() and int(number)):
        raise InputError(f"data.tokenizer is {name!r}; allowed is numbers:N with N from 1")
    return int(number)


def load_tokenizer(path: str | Path, own: bool = True) -> Tokenizer:
    """The tokenizer in a `tokenizer.model` file.

    own: whether it may name a class in a file of Python, which is then run. A model from elsewhere
    may not.
    """
    read_record(Path(path).parent)  # a run's
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"data.tokenizer is {str(path)!r}, which cannot be read ({error.strerror}); allowed "
            'are "bpe", "bytes", "numbers:N", the path of a SentencePiece model, "hf:DIRECTORY" '
            "and a function") from None
    return tokenizer_of_model(model, str(path), own)


def tokenizer_of_model(model: bytes, path: str, own: bool = True) -> Tokenizer:
    """The tokenizer that the content of a `tokenizer.model` is of. path: for what is said."""
    if model == Bytes.model:
        return Bytes()
    if model.startswith(NUMBERS):
        return Numbers(int(model.removeprefix(NUMBERS)))
    if model.startswith(b'{"class":') and own:
        return Own(model)
    if model.startswith(b'{"bos":'):
        return HuggingFace(model)
    try:
        return SentencePiece(model or b"nothing")  # no bytes at all would end the process
    except RuntimeError:
        sentence = f"tokenizer file {path!r} is not a SentencePiece model"
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
        found, left_out = sample_texts(source, most, config.shares(name))
        texts += found
        if not any(found):
            why = describe_skipped(left_out, source) if left_out else "gives no documents"
            problems.append(f"source {name!r} {why}")
    if not any(texts):
        raise InputError(f"the tokenizer has no text to learn from: {'; '.join(problems)}")
    return texts


def sample_texts(source: Source, most: int,
                 shares: tuple[float, float]) -> tuple[list[str], Counter]:
    """(texts, what was left out by kind): the training documents of lowest path hash.

    They have about `most` characters, and do not depend on the order of the documents. A source
    without end is read until it gave 64 times as many. shares: (dev, test) by the hash of the path.
    """
    heap = []  # by falling hash: the largest is dropped first
    left_out, held, seen = Counter(), 0, 0
    for number, document in enumerate(documents_of(source)):
        kind = why_left_out(document, source, shares)
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


def why_left_out(document, source: Source, shares: tuple[float, float]) -> str:
    """Why a tokenizer does not learn from a document; "" if it does."""
    if isinstance(document, Skipped):
        return document.kind
    if SURROGATE.search(document.text):
        return "lone surrogates"
    if SPLITS[split_in(document, source, *shares)] != "train":
        return "held out"
    return "" if document.text else "empty"


def read_hf_json(name: str, file: str) -> dict:
    """A JSON file of hf:DIRECTORY or hf:ORG/NAME; {} without it, but config.json must be there."""
    path = place(name) / file
    if path.exists() and not path.is_file():  # one that another program feeds would wait for it
        raise InputError(f"{name}: {path} is no regular file; allowed is a file of JSON")
    if not path.exists() and file != "config.json":
        return {}
    sentence = f"{name} is no local Hugging Face directory: {path} cannot be read ({{reason}})"
    with user_errors((OSError, *ODD), InputError, sentence):
        found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}; allowed is a JSON object")
    return found


def read_hf_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of hf:DIRECTORY: its tokenizer.json or, without one, its tokenizer.model."""
    if not read_hf_json(name, "tokenizer.json"):
        return load_tokenizer(place(name) / "tokenizer.model", own=False)
    said = f"{name}: tokenizer.json or config.json is not as a tokenizer's are ({{reason}})"
    with user_errors(ODD, InputError, said):
        return hf_tokenizer(name)


def hf_tokenizer(name: str) -> Tokenizer:
    """The same of a tokenizer.json."""
    tokenizer = read_hf_json(name, "tokenizer.json")
    config = read_hf_json(name, "config.json")
    eos = hf_special(name, "eos", tokenizer)
    bos = hf_special(name, "bos", tokenizer)
    if eos is None:
        raise InputError(f"{name}: neither eos_token_id in config.json nor eos_token in "
                         "tokenizer_config.json says which token ends a document; give one")
    facts = dict(bos=eos if bos is None else bos, eos=eos, vocab=config["vocab_size"],
                 tokenizer=tokenizer)
    for field in ("bos", "eos", "vocab"):
        number = facts[field]
        if type(number) is not int or number < 0:
            raise InputError(f"{name}: {field} is {number!r}; allowed is a whole number")
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
