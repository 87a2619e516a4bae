"""Selection: is half of the data, chosen by a score, better than all of it?

Four arms with one model, one corpus and one number of steps, so that half the data is seen twice as often:

    everything  all documents
    top         those that score highest, half of all positions
    sampled     half, drawn without replacement with probabilities ~ exp(score / temperature): QuRating's
                middle way, which keeps some of every kind (Wettig et al. 2024 find 2.0 better than the top)
    chance      half, drawn without regard to the score: the control

The score here is the share of a module that is documentation, on the guess that explained code teaches more.
A wrapper leaves documents out of the plan, so all arms share one cache; the choice is made per window, and
`data.window` is large so that one holds the corpus. What it costs: nothing next to training. By hand, about
three minutes each on two CPU cores:

    python train.py configs/selection.py:sampled --phases.0.packing.temperature 1.0

The file also holds `distinct_stdlib` and `distinct_text`: sources without exact duplicates, and with `near`
above 0 without near duplicates (MinHash; `pip install datasketch`). They are counted as skipped.
"""
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, Document, Documents, InputError, Skipped, Source, concat_and_split, stdlib, text
from lib.cache import Shard
from lib.packing import DOCUMENT, best_fit
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

PACKINGS = dict(concat=concat_and_split, best_fit=best_fit)


def documented(document: Document, tokens) -> float:
    """Share of a module's characters in docstrings and comments."""
    found = re.findall(r'"""(?s:.*?)"""|#.*', document.text)
    return sum(map(len, found)) / max(1, len(document.text))


# ------------------------------------------------------------- packings that leave documents out of the plan


def pack(keep: np.ndarray, lengths: np.ndarray, seq: int, packing: str) -> np.ndarray:
    """The plan of a packing (a name in PACKINGS) for the documents where `keep` is true, in their order."""
    if packing not in PACKINGS:
        raise InputError(f"packing is {packing!r}; allowed are {', '.join(PACKINGS)}")
    kept = np.flatnonzero(keep)
    plan = PACKINGS[packing](lengths[kept], seq)
    plan[:, DOCUMENT] = kept[plan[:, DOCUMENT]]
    return plan


def scores(documents: Documents) -> np.ndarray:
    """The score of each document [documents]."""
    score = documents.of(lambda shard: shard.score).astype(float)
    if np.isnan(score).any():
        raise InputError("phases.packing selects by score, but a source has none; set Source.score")
    return score


def best(value: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """Which documents have the highest values, as many as reach `share` of all positions."""
    order = np.argsort(-value, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]
    keep = np.zeros(len(value), bool)
    keep[order[before < share * lengths.sum()]] = True
    return keep


def threshold(lengths, seq: int, documents: Documents, least: float = 0.0,
              packing: str = "concat") -> np.ndarray:
    """Documents that score `least` or more."""
    return pack(scores(documents) >= least, lengths, seq, packing)


def top(lengths, seq: int, documents: Documents, share: float = 0.5,
        packing: str = "concat") -> np.ndarray:
    """The documents of highest score, until they hold `share` of all positions."""
    return pack(best(scores(documents), lengths, share), lengths, seq, packing)


def gumbel(shard: Shard, seed: int) -> np.ndarray:
    """Standard Gumbel noise for each document of a shard, which the seed alone decides."""
    return np.random.default_rng([seed, int(shard.directory.name)]).gumbel(size=len(shard.split))


def sampled(lengths, seq: int, documents: Documents, share: float = 0.5, temperature: float = 2.0,
            seed: int = 0, packing: str = "concat") -> np.ndarray:
    """Documents drawn one by one, ~ exp(standardised score / temperature) of those left, up to `share`.

    The highest of score / temperature + Gumbel noise are such a sample (Gumbel top-k, Kool et al. 2019). The
    same documents for every seed of the run; a very high temperature ignores the score.
    """
    score = scores(documents)
    logits = (score - score.mean()) / max(score.std(), 1e-12) / temperature
    noise = documents.of(partial(gumbel, seed=seed))
    return pack(best(logits + noise, lengths, share), lengths, seq, packing)


# -------------------------------------------------------------------------------- sources without duplicates


def distinct(documents: Iterable[Document | Skipped], near: float = 0.0, hashes: int = 128,
             words: int = 5) -> Iterator[Document | Skipped]:
    """Documents, the first of each text; a repetition comes as Skipped "duplicate", or "near-duplicate".

    Near duplicates share about `near` of their runs of `words` words (Jaccard, by `hashes` MinHashes); 0
    looks for exact ones alone. Signatures stay in memory, about 1 KiB a document.
    """
    seen, signatures, index = set(), [], None
    if near:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise InputError(f"near is {near}, but near duplicates need the package datasketch, which is not "
                             "installed; pip install datasketch, or set near to 0") from None
        index = MinHashLSH(threshold=near, num_perm=hashes)
    for document in documents:
        if isinstance(document, Skipped) or not document.text:
            yield document
            continue
        key = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
        if key in seen:
            yield Skipped(document.path, "duplicate")
            continue
        seen.add(key)
        bag = re.findall(r"\w+", document.text) if near else []
        if bag:
            signature = MinHash(num_perm=hashes, seed=1)
            signature.update_batch([" ".join(bag[i:i + words]).encode("utf-8", "replace")
                                    for i in range(max(1, len(bag) - words + 1))])
            if any(signatures[i].jaccard(signature) >= near for i in index.query(signature)):
                yield Skipped(document.path, "near-duplicate")
                continue
            index.insert(len(signatures), signature)
            signatures.append(signature)
        yield document


def distinct_stdlib(near: float = 0.0) -> Iterator[Document | Skipped]:
    """`data.stdlib` without duplicates."""
    return distinct(stdlib(), near)


def distinct_text(path: str, separator: str = "", near: float = 0.0) -> Iterator[Document | Skipped]:
    """`data.text` without duplicates."""
    return distinct(text(path, separator), near)


phase = Phase(steps=600, batch=8, seq=256)
config = Config(
    model=ModelConfig(layers=4, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048),
    data=DataConfig(sources={"stdlib": Source(partial(distinct_stdlib, near=0.0), score=documented)},
                    window=1_000_000),
    phases=(phase,),
    schedule=Schedule(shape="wsd", peak=4e-3, warmup=20, decay=0.4, final=0.05),
    eval_every=100,
    prompts=("def ", "class "),
)
chosen = dict(top=partial(top, share=0.5), sampled=partial(sampled, share=0.5, temperature=2.0, seed=0),
              chance=partial(sampled, share=0.5, temperature=1e9, seed=0))
arms = {"everything": config} | {
    name: replace(config, phases=(replace(phase, packing=packing),)) for name, packing in chosen.items()}
