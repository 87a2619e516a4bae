"""Duplicates: sources without the documents that repeat earlier ones."""
import hashlib
import re
from collections.abc import Iterable, Iterator

from lib.errors import InputError
from lib.sources import Document, Skipped, stdlib, text


def distinct(documents: Iterable[Document | Skipped], near: float = 0.0, hashes: int = 128,
             words: int = 5) -> Iterator[Document | Skipped]:
    """The first document of each text; a repetition is Skipped "duplicate" or "near-duplicate".

    near: 0 looks for exact repetitions alone; else documents that share about so much of their runs
    of `words` words (Jaccard, by `hashes` MinHashes) are left out too. Signatures stay in memory,
    about 1 KiB a document. Raises InputError where `near` needs a package that is not installed.
    """
    seen = set()
    repeats = near_copies(near, hashes, words) if near else None
    for document in documents:
        if isinstance(document, Skipped) or not document.text:
            yield document
            continue
        key = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
        if key in seen:
            yield Skipped(document.path, "duplicate")
            continue
        seen.add(key)
        if repeats and repeats(document.text):
            yield Skipped(document.path, "near-duplicate")
            continue
        yield document


def near_copies(near: float, hashes: int, words: int):
    """A function of texts, one after another: is this one a near copy of an earlier one?"""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise InputError(f"near is {near}, but near duplicates need the package datasketch, which "
                         "is not installed; pip install datasketch, or set near to 0") from None
    signatures, index = [], MinHashLSH(threshold=near, num_perm=hashes)

    def repeats(text: str) -> bool:
        bag = re.findall(r"\w+", text)
        if not bag:
            return False
        runs = [" ".join(bag[i:i + words]) for i in range(max(1, len(bag) - words + 1))]
        signature = MinHash(num_perm=hashes, seed=1)
        signature.update_batch([run.encode("utf-8", "replace") for run in runs])
        if any(signatures[i].jaccard(signature) >= near for i in index.query(signature)):
            return True
        index.insert(len(signatures), signature)
        signatures.append(signature)
        return False

    return repeats


def distinct_stdlib(near: float = 0.0) -> Iterator[Document | Skipped]:
    """The standard library without duplicates."""
    return distinct(stdlib(), near)


def distinct_text(
    path: str,
    separator: str = "",
    near: float = 0.0,
) -> Iterator[Document | Skipped]:
    """Text files (see `lib.sources.text`) without duplicates."""
    return distinct(text(path, separator), near)
