"""Sentences whose query is a noun or an adjective, as the context or the weights may tell, and what
a model makes of them.

The source is Anand et al. 2025; see configs/forgetting/dual_process.py.

A sentence is `noun is adjective` or `is adjective noun`, then one of the two as a query and the
answer: `adjective noun noun` to a noun, `adjective adjective adjective` to an adjective.
"""
from collections.abc import Callable, Iterator

import numpy as np

from data import Document, InputError

COPULA, FIRST = 1, 259  # ids: of the copula, which is bos; of the first word, after all others
LENGTH = 6  # positions of a sentence: context, query, answer less its last word, a target alone
ANSWER = 3  # the first position with loss, the query: its target alone is no copy of the query


def lexicon(words: int) -> Iterator[Document]:
    """A document of so many different characters: a tokenizer trained on it gives each a piece.

    It is there for this vocabulary alone: `part_of_speech` overwrites what rows say.
    """
    yield Document("lexicon", "".join(chr(0x4E00 + i) for i in range(words)))


def split(words: int) -> tuple[int, int]:
    """(nouns, new words) of a vocabulary.

    Nouns come first, as many adjectives follow, both from frequent to rare; then at least a tenth
    of new words, which training never shows.
    """
    nouns = (words - words // 10) // 2
    return nouns, words - 2 * nouns


def sentences(noun: np.ndarray, adjective: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ids [n, 7] of sentences about words numbered from 0 [n]; orders and queries are drawn."""
    noun, adjective, copula = FIRST + noun, FIRST + adjective, np.full_like(noun, COPULA)
    order, which = rng.random((2, len(noun))) < 0.5
    query = np.where(which, noun, adjective)
    return np.stack([np.where(order, noun, copula), np.where(order, copula, adjective),
                     np.where(order, adjective, noun), query, adjective, query, query], axis=1)


def draw_words(n: int, rng: np.random.Generator, words: int, zipf: float,
               ambiguous: int) -> np.ndarray:
    """[2, n] nouns and adjectives, of probability rank^-zipf.

    Every so many ranks (`ambiguous`; 0: never) a word is ambiguous: half of the time that it is
    due, the word of the same rank and the other part of speech stands in its place.
    """
    nouns, _ = split(words)
    chance = np.arange(1, nouns + 1, dtype=float) ** -zipf
    rank = rng.choice(nouns, (2, n), p=chance / chance.sum())
    may = (ambiguous > 0) & (rank % max(1, ambiguous) == ambiguous - 1)
    swapped = (rng.random((2, n)) < 0.5) & may
    return rank + nouns * (np.array([[False], [True]]) ^ swapped)


def part_of_speech(row: dict, rng: np.random.Generator, words: int, zipf: float,
                   ambiguous: int) -> tuple[dict, dict]:
    """An objective: a row of fresh sentences, a segment each, with loss on their answers."""
    n = len(row["tokens"]) // LENGTH
    ids = sentences(*draw_words(n, rng, words, zipf, ambiguous), rng).astype(np.int32)
    place = np.tile(np.arange(LENGTH, dtype=np.int32), n)
    made = dict(tokens=ids[:, :-1].ravel(), targets=ids[:, 1:].ravel(), positions=place,
                segments=np.repeat(np.arange(1, n + 1, dtype=np.int32), LENGTH),
                weights=(place >= ANSWER).astype(np.float32))
    return row | made, dict(kind="causal", window=0)


def asked(rng: np.random.Generator, words: int, ambiguous: int, n: int) -> dict[str, tuple]:
    """{set: (nouns, adjectives)} that `probe` asks about, n of each."""
    nouns, new = split(words)
    plain = [r for r in range(nouns) if not ambiguous or r % ambiguous != ambiguous - 1]
    plain = np.array(plain)
    head, tail = plain[plain < nouns / 10], plain[plain >= nouns - nouns / 10]
    first = rng.integers(new, size=n)
    pair = 2 * nouns + first, 2 * nouns + (first + rng.integers(1, new, size=n)) % new
    return dict(new=pair, known=(rng.choice(plain, n), nouns + rng.choice(plain, n)),
                head=(nouns + rng.choice(head, n), rng.choice(head, n)),
                tail=(nouns + rng.choice(tail, n), rng.choice(tail, n)))


def probe(params: dict, apply: Callable, words: int, ambiguous: int,
          n: int = 512) -> dict[str, float]:
    """Shares of n sentences whose answer begins as it should, with the piece likeliest of all.

    new         two new words, whose embeddings are drawn afresh here: structural in-context
                learning. (In the paper they keep their own, which training, as outputs, makes
                unlikely.)
    new_choice  there, the right one of the sentence's two words is likelier: 0.5 is chance
    known       a noun and an adjective, unambiguous and uniform over all ranks
    head, tail  switched sentences: an adjective where the noun should be, and the reverse,
                unambiguous, of the most frequent tenth of ranks or the rarest. /context: answered
                as the context says. /weights: as the parts of speech in training say, the other
                word of the two
    """
    if "head" in params:
        raise InputError("probe: the model has a head of its own, in which no new word is an "
                         "answer; allowed is one whose embeddings are the head, tied=True")
    rng, (nouns, new) = np.random.default_rng(0), split(words)
    table = params["embed"]
    fresh = rng.normal(size=(new, table.shape[1])) * table.shape[1] ** -0.5  # as the table draws
    drawn = table.at[FIRST + 2 * nouns:FIRST + words].set(fresh)
    sets = asked(rng, words, ambiguous, n)
    ids = np.concatenate([sentences(*pair, rng) for pair in sets.values()]).astype(np.int32)
    logits = np.asarray(apply(params | {"embed": drawn}, ids[:, :-1])[:, ANSWER])
    other, right = (FIRST + np.concatenate(side) for side in zip(*sets.values(), strict=True))

    def logit(of):
        return np.take_along_axis(logits, of[:, None], 1)

    def shares(answer):
        hits = (logits.argmax(1) == answer).reshape(-1, n)
        return dict(zip(sets, np.mean(hits, 1).tolist(), strict=True))

    context, weights = shares(right), shares(other)
    choice = float((logit(right) > logit(other))[:n].mean())
    out = {"pos/new": context["new"], "pos/new_choice": choice, "pos/known": context["known"]}
    for part in ("head", "tail"):
        out[f"pos/{part}/context"] = context[part]
        out[f"pos/{part}/weights"] = weights[part]
    return out
