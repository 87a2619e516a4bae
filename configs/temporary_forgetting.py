"""Temporary forgetting: can a model read a new word off its context, and still know old ones by heart?

A sentence is `noun is adjective` or `is adjective noun`, then one of the two words as a query and the answer:
`adjective noun noun` to a noun, `adjective adjective adjective` to an adjective. What a query is shows in the
context, from where the copula stands, and in the weights, for words that have been seen. Arms, with the same
sentences and the same rate for the body:

    vanilla    the control
    active     embeddings are drawn again every 25 steps, for ever: nothing is worth knowing by heart
    temporary  so too for the first 1,200 of 2,400 steps

The paper (Dual Process Learning, Anand et al. 2025): vanilla learns to read the context, then loses it on new
words; active keeps it and gives up the weights; temporary has both, weights for frequent words and context
for rare ones. `probe` says what is measured. Differences: theirs is a BERT that fills three masks and takes 8
million sentences of 10,000 words; here a causal model is told the query and answers, with loss on the answer
alone, and takes 150,000 of 250 words. Embeddings begin each episode with a fresh optimiser.

    python train.py study configs/temporary_forgetting.py --seeds 3       ten minutes on one CPU core
    python train.py configs/temporary_forgetting.py:temporary             one arm by hand, a minute

On seed 0, on which the settings were chosen (means of the last three evaluations; `best` is on the way):

                 new   best   new_choice   head/weights   tail/context
    vanilla      .13    .56          .79            .63            .61
    active       .82    .92          .84            .28            .78
    temporary    .70    .91          .89            .45            .80

To copy the query gives 0.5. So vanilla hardly had the new words before it lost them (with Zipf exponent 1 and
1 % of words ambiguous: 0.70, then 0.02), and chooses well between a sentence's two words to the end: in good
part others win because they have grown, to 1.9 times their first norm. With a weight decay of 0.1 on
embeddings too, at exponent 1.5, vanilla did not lose new words: 0.78 after 2,500 steps.
"""
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from data import DataConfig, Document, Source
from lib.edits import reset_embeddings
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Edit, Phase

COPULA, FIRST = 1, 259  # ids: of the copula, which is bos; of the first word, after unk, bos, eos and bytes
LENGTH = 6  # positions of a sentence: context, query and answer, less the last word, which is only a target
ANSWER = 3  # the first position with loss, the query: the only one whose target is not a copy of the query


# ------------------------------------------------------------------------------------------------ the process


def lexicon(words: int) -> Iterator[Document]:
    """A document of so many different characters, which a tokenizer trained on it gives a piece each.

    It is there for this vocabulary alone: `part_of_speech` overwrites what rows say.
    """
    yield Document("lexicon", "".join(chr(0x4E00 + i) for i in range(words)))


def split(words: int) -> tuple[int, int]:
    """(nouns, new words) of a vocabulary: nouns come first, as many adjectives follow, both from frequent to
    rare; then at least a tenth of new words, which training never shows."""
    nouns = (words - words // 10) // 2
    return nouns, words - 2 * nouns


def sentences(noun: np.ndarray, adjective: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ids [n, 7] of sentences about given words, numbered from 0 [n]; orders and queries are drawn."""
    noun, adjective, copula = FIRST + noun, FIRST + adjective, np.full_like(noun, COPULA)
    order, which = rng.random((2, len(noun))) < 0.5
    query = np.where(which, noun, adjective)
    return np.stack([np.where(order, noun, copula), np.where(order, copula, adjective),
                     np.where(order, adjective, noun), query, adjective, query, query], axis=1)


def draw_words(n: int, rng: np.random.Generator, words: int, zipf: float, ambiguous: int) -> np.ndarray:
    """[2, n] nouns and adjectives, of probability rank^-zipf.

    Every so many ranks (`ambiguous`; 0: never) a word is ambiguous: half of the time that it is due, the word
    of the same rank and the other part of speech stands in its place.
    """
    nouns, _ = split(words)
    chance = np.arange(1, nouns + 1, dtype=float) ** -zipf
    rank = rng.choice(nouns, (2, n), p=chance / chance.sum())
    swapped = (rng.random((2, n)) < 0.5) & (ambiguous > 0) & (rank % max(1, ambiguous) == ambiguous - 1)
    return rank + nouns * (np.array([[False], [True]]) ^ swapped)


def part_of_speech(row: dict, rng: np.random.Generator, words: int, zipf: float,
                   ambiguous: int) -> tuple[dict, dict]:
    """An objective that fills a row with fresh sentences, a segment each, with loss on their answers."""
    n = len(row["tokens"]) // LENGTH
    ids = sentences(*draw_words(n, rng, words, zipf, ambiguous), rng).astype(np.int32)
    place = np.tile(np.arange(LENGTH, dtype=np.int32), n)
    return row | dict(tokens=ids[:, :-1].ravel(), targets=ids[:, 1:].ravel(), positions=place,
                      segments=np.repeat(np.arange(1, n + 1, dtype=np.int32), LENGTH),
                      weights=(place >= ANSWER).astype(np.float32)), dict(kind="causal", window=0)


# ----------------------------------------------------------------------------------------------- the measures


def probe(params: dict, apply: Callable, words: int, ambiguous: int, n: int = 512) -> dict[str, float]:
    """Shares of n sentences whose answer begins as it should, with the piece likeliest of all.

    new         two new words, whose embeddings are drawn afresh here: structural in-context learning. (In the
                paper they keep their own, which training, as outputs, makes unlikely.)
    new_choice  there, the right one of the sentence's two words is likelier than the other: 0.5 is chance
    known       a noun and an adjective, unambiguous and uniform over all ranks
    head, tail  switched sentences: an adjective where the noun should be, and the reverse, unambiguous, of
                the most frequent tenth of ranks or the rarest. /context: answered as the context says;
                /weights: as the parts of speech in training say, the other word of the two
    """
    rng, (nouns, new) = np.random.default_rng(0), split(words)
    table = params["embed"]
    fresh = rng.normal(size=(new, table.shape[1])) * table.shape[1] ** -0.5  # as at initialisation
    params = params | {"embed": table.at[FIRST + 2 * nouns:FIRST + words].set(fresh)}
    plain = np.array([r for r in range(nouns) if not ambiguous or r % ambiguous != ambiguous - 1])
    head, tail = plain[plain < nouns / 10], plain[plain >= nouns - nouns / 10]
    pair = 2 * nouns + (first := rng.integers(new, size=n)), \
        2 * nouns + (first + rng.integers(1, new, size=n)) % new
    sets = dict(new=pair, known=(rng.choice(plain, n), nouns + rng.choice(plain, n)),
                head=(nouns + rng.choice(head, n), rng.choice(head, n)),
                tail=(nouns + rng.choice(tail, n), rng.choice(tail, n)))
    ids = np.concatenate([sentences(*pair, rng) for pair in sets.values()]).astype(np.int32)
    logits = np.asarray(apply(params, ids[:, :-1])[:, ANSWER])
    other, right = (FIRST + np.concatenate(side) for side in zip(*sets.values(), strict=True))
    ahead = np.take_along_axis(logits, right[:, None], 1) > np.take_along_axis(logits, other[:, None], 1)
    context, weights = (dict(zip(sets, np.mean((logits.argmax(1) == x).reshape(-1, n), 1).tolist(),
                                 strict=True)) for x in (right, other))
    out = dict(new=context["new"], new_choice=float(ahead[:n].mean()), known=context["known"])
    out |= {f"{part}/{name}": by[part] for part in ("head", "tail")
            for name, by in (("context", context), ("weights", weights))}
    return {f"pos/{name}": value for name, value in out.items()}


def late(rows: list[dict], figure: str) -> float:
    """Mean of a figure's last three values: one swings by 0.1 from evaluation to evaluation."""
    return float(np.mean([row[figure] for row in rows if figure in row][-3:]))


def lost(rows: list[dict], figure: str) -> float:
    """How far a figure is below its best on the way, in the end."""
    return max(row[figure] for row in rows if figure in row) - late(rows, figure)


# ------------------------------------------------------------------------------------------------- the study

WORDS, ZIPF, AMBIGUOUS, EVERY = 250, 1.25, 10, 25
plain = Phase(steps=2_400, batch=8, seq=8 * LENGTH, objective=partial(
    part_of_speech, words=WORDS, zipf=ZIPF, ambiguous=AMBIGUOUS))
config = Config(
    model=ModelConfig(layers=2, embed=64, heads=4, kv_heads=4, head_dim=16, mlp=128, vocab=FIRST + WORDS),
    data=DataConfig(sources={"lexicon": Source(partial(lexicon, words=WORDS))}, dev=0.0, test=0.0),
    phases=(plain,),
    schedule=Schedule(shape="wsd", peak=3e-3, warmup=50, decay=0.2, final=0.05),
    evals=(partial(probe, words=WORDS, ambiguous=AMBIGUOUS),),
    eval_every=200,
    overlap=0,
    save_every=2_400,
    keep=1,
    sample_tokens=LENGTH,
)
# New embeddings have few steps to learn in: theirs is a rate of its own, twice as high, and anew each time.
forgetting = replace(plain, repeat=(Edit(reset_embeddings, every=EVERY),), lr={
    "embed": Schedule(shape="linear", peak=6e-3, warmup=5, final=0.1, cycle=EVERY)})
arms = {
    "vanilla": config,
    "active": replace(config, phases=(forgetting,)),
    "temporary": replace(config, phases=(replace(forgetting, steps=1_200), replace(plain, steps=1_200))),
}
control = "vanilla"
figures = "new new_choice known head/context head/weights tail/context tail/weights".split()
measures = {name: partial(late, figure=f"pos/{name}") for name in figures} | {
    "new_lost": partial(lost, figure="pos/new")}
quick = {"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "model.head_dim": 4, "eval_every": 4}
claims = (
    dict(says="active forgetting keeps what vanilla loses: reading new words off their context",
         arm="active", measure="new", above=0.2),
    dict(says="vanilla had it: it loses more of its best than active does", arm="active",
         measure="new_lost", below=0.0),
    dict(says="active forgetting gives up the weights, for frequent words too", arm="active",
         measure="head/weights", below=-0.2),
    dict(says="temporary forgetting keeps new words as well", arm="temporary", measure="new", above=0.2),
    dict(says="... beside the weights for frequent words, which active has not", arm="temporary",
         control="active", measure="head/weights", above=0.0),
    dict(says="... and goes by the context for rare ones, more than vanilla", arm="temporary",
         measure="tail/context", above=0.0),
)
