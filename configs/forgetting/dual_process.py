"""Dual process: can a model read a new word off its context, and still know old ones by heart?

Paper: Dual Process Learning: Controlling Use of In-Context vs. In-Weights Strategies with Weight
    Forgetting, Anand et al. 2025 (003:16)
Method: draw the embeddings anew every so many steps, for ever (active forgetting) or for a while
    (temporary forgetting). In the paper vanilla learns to read the context, then loses it on new
    words; active keeps it and gives up the weights; temporary has both: weights for frequent
    words, context for rare ones.
Here: a sentence is `noun is adjective` or `is adjective noun`, then one of the two as a query and
    the answer: `adjective noun noun` to a noun, `adjective adjective adjective` to an adjective.
    What a query is shows in the context, from where the copula stands, and in the weights, for
    words that have been seen. Arms have the same sentences and the same rate for the body. active:
    a reset every 25 steps. temporary: so for 1,200 of 2,400 steps. `probe` says what is measured.
    The paper's is a BERT that fills three masks and takes 8 million sentences of 10,000 words. This
    is a causal model with loss on the answer alone, and takes 150,000 of 250 words. Embeddings
    begin each episode with a fresh optimiser.
Cost: nine runs of a minute, ten minutes on one CPU core.
Run:
    python train.py study configs/forgetting/dual_process.py
    python train.py configs/forgetting/dual_process.py:temporary          by hand, a minute
"""
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, Document, Source
from lib.edits import reset_embeddings
from lib.study import Claim, Paper, Study
from model import ModelConfig
from train import Config, Edit, Phase, Schedule

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


def late(rows: list[dict], figure: str) -> float:
    """Mean of a figure's last three values: one swings by 0.1 from evaluation to evaluation."""
    return float(np.mean([row[figure] for row in rows if figure in row][-3:]))


def lost(rows: list[dict], figure: str) -> float:
    """How far a figure is below its best on the way, in the end."""
    return max(row[figure] for row in rows if figure in row) - late(rows, figure)


WORDS, ZIPF, AMBIGUOUS, EVERY = 250, 1.25, 10, 25
plain = Phase(steps=2_400, batch=8, seq=8 * LENGTH, objective=partial(
    part_of_speech, words=WORDS, zipf=ZIPF, ambiguous=AMBIGUOUS))
vanilla = Config(
    model=ModelConfig(layers=2, embed=64, heads=4, kv_heads=4, head_dim=16, mlp=128,
                      vocab=FIRST + WORDS),
    data=DataConfig(sources={"lexicon": Source(partial(lexicon, words=WORDS))}, dev=0.0, test=0.0),
    phases=(plain,), schedule=Schedule(shape="wsd", peak=3e-3, warmup=50, decay=0.2, final=0.05),
    evals=(partial(probe, words=WORDS, ambiguous=AMBIGUOUS),), eval_every=200, overlap=0,
    save_every=2_400, keep=1, sample_tokens=LENGTH,
)
# New embeddings have few steps to learn in: their rate is twice as high, and anew each time.
forgetting = replace(plain, repeat=(Edit(reset_embeddings, every=EVERY),), lr={
    "embed": Schedule(shape="linear", peak=6e-3, warmup=5, final=0.1, cycle=EVERY)})
halves = replace(forgetting, steps=1_200), replace(plain, steps=1_200)
FIGURES = "new new_choice known head/context head/weights tail/context tail/weights".split()
study = Study(
    question="Can a model read a new word off its context, and still know old ones by heart?",
    paper=Paper(title="Dual Process Learning: Controlling Use of In-Context vs. In-Weights "
                "Strategies with Weight Forgetting", authors="Anand et al.", year=2025,
                seeds=("003:16",)),
    arms={"vanilla": vanilla, "active": replace(vanilla, phases=(forgetting,)),
          "temporary": replace(vanilla, phases=halves)},
    measures={name: partial(late, figure=f"pos/{name}") for name in FIGURES} | {
        "new_lost": partial(lost, figure="pos/new")},
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "model.head_dim": 4,
           "eval_every": 4},
    claims=(
        Claim(says="active forgetting keeps what vanilla loses: reading new words off their "
              "context", arm="active", measure="new", above=0.2),
        Claim(says="vanilla had it: it loses more of its best than active does", arm="active",
              measure="new_lost", below=0.0),
        Claim(says="active forgetting gives up the weights, for frequent words too", arm="active",
              measure="head/weights", below=-0.2),
        Claim(says="temporary forgetting keeps new words as well", arm="temporary", measure="new",
              above=0.2),
        Claim(says="beside the weights for frequent words, which active has not", arm="temporary",
              control="active", measure="head/weights", above=0.0),
        Claim(says="and it goes by the context for rare ones, more than vanilla", arm="temporary",
              measure="tail/context", above=0.0),
    ),
    seeds=3,
)
