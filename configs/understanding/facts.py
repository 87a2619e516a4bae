"""Facts: how does a model come to know a fact that its text tells, and how does it lose it again?

Paper: How Do Large Language Models Acquire Factual Knowledge During Pretraining?, Chang et al. 2024
    (000:57)
Method: tell made-up facts in the midst of pre-training, and follow the log-probability of what they
    say, in the words told (memory) and in words never told (sense). Each time it rises, and then
    falls: of the gain, a - b log t is kept after t steps. The paper finds that facts told again in
    the same words are learnt and lost faster than paraphrased ones, and large batches lose less.
Here: functions of Python's library; 16 people are born in made-up towns. In 80 of 480 steps half
    the rows tell of them. same: in one sentence. paraphrased: in five. large: in one, by batches of
    four times the rows, of which as many tell. "other" is of people never told of; that falls too,
    as made-up names are alike. So memory and sense are nats a character less those of others.
    "gain" is from before to the best after, "kept" its share at the end, "decay" is b, "r2" how
    well the line fits. The rate is constant. large reads four times the library besides. In decay,
    kept and sense, seeds differ by as much as arms do.
Cost: three arms, nine runs of a minute, five minutes on two CPU cores.
Run:
    python train.py study configs/understanding/facts.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from configs import base as shared
from data import DataConfig, Document, Source, stdlib
from lib.study import Claim, Paper, Study
from lib.tasks import judged
from train import Phase, Schedule

TOLD = ("{0} was born in {1}.", "The birthplace of {0} is {1}.", "{0}, who comes from {1}.",
        "Born in {1} was {0}.", "It was in {1} that {0} was born.")
SENSE = "The home town of {0} is {1}."  # never told
BEFORE, DURING, AFTER = 200, 80, 200  # steps
KINDS = "memory", "sense", "other"


def people(count: int = 32) -> list[tuple[str, str]]:
    """(name, town) of people; the first half is told of."""
    rng = np.random.default_rng(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(rng.choice(syllables, 4)).capitalize() for _ in range(2 * count)]
    return list(zip(words[::2], words[1::2], strict=True))


def told(paraphrased: bool, copies: int = 100) -> Iterator[Document]:
    """Each fact so many times, in the same words or each time in others of TOLD."""
    rng = np.random.default_rng(1)
    for copy in range(copies):
        for name, town in people()[:16]:
            form = TOLD[int(rng.integers(len(TOLD)))] if paraphrased else TOLD[0]
            yield Document(f"{copy}/{name}", f"# {form.format(name, town)}\n")


def recall(params, apply, tokenizer, config) -> dict[str, float]:
    """An `evals`: nats a character of towns, of each of KINDS; of the first two, less others'."""
    def nats(form: str, group: list[tuple[str, str]]) -> float:
        pairs = []
        for name, town in group:
            before = "# " + form.split("{1}")[0].format(name)
            pairs.append(([tokenizer.bos, *tokenizer.encode(before)], tokenizer.encode(town)))
        each, _ = judged(params, apply, tokenizer, pairs, config.phases[-1].seq)
        return float(each.sum() / sum(len(ids) for _, ids in pairs))
    known, others = people()[:16], people()[16:]
    other = nats(TOLD[0], others)
    return {"fact/memory": nats(TOLD[0], known) - other, "fact/other": other,
            "fact/sense": nats(SENSE, known) - nats(SENSE, others)}


def course(rows: list[dict], kind: str, what: Literal["gain", "kept", "decay", "r2"]) -> float:
    """What becomes of a kind of fact, by the rows of a run: before, during, after the telling."""
    found = [row for row in rows if f"fact/{kind}" in row]
    at = {row["step"]: row[f"fact/{kind}"] for row in found}
    begin, end = (max(row["step"] for row in found if row["phase"] == i) for i in (0, 1))
    gain = at[begin] - min(nats for step, nats in at.items() if step >= end)
    later = [step for step in at if step > end]
    kept = np.array([at[begin] - at[step] for step in later]) / max(gain, 1e-9)
    log_t = np.log(np.array(later) - end)
    slope, constant = np.polyfit(log_t, kept, 1)
    left = np.var(kept - slope * log_t - constant)
    r2 = 1 - left / max(np.var(kept), 1e-12)
    return float({"gain": gain, "kept": kept[-1], "decay": -slope, "r2": r2}[what])


def arm(paraphrased: bool, batch: int = 8, share: float = 0.5):
    """A run that is told of people by a share of the rows for a while."""
    facts = Source(partial(told, paraphrased=paraphrased), split="train")
    plain = Phase(steps=BEFORE, batch=batch, seq=128, mixture={"stdlib": 1.0})
    telling = replace(plain, steps=DURING, mixture={"stdlib": 1 - share, "facts": share})
    return replace(
        shared.small, model=shared.shape(3, 96, vocab=258), evals=(recall,), eval_every=10,
        data=DataConfig(sources={"stdlib": Source(partial(stdlib, unit="definition")),
                                 "facts": facts}, tokenizer="bytes", dev=0.005, test=0.005),
        phases=(plain, telling, replace(plain, steps=AFTER)), eval_tokens=1_024,
        schedule=Schedule(shape="constant", peak=2e-3, warmup=50))


claim, alone = partial(Claim, control="same"), partial(Claim, control=None)
study = Study(
    question="How does a model come to know a fact that its text tells, and lose it again?",
    paper=Paper(title="How Do Large Language Models Acquire Factual Knowledge During Pretraining?",
                authors="Chang et al.", year=2024, seeds=("000:57",)),
    arms={"same": arm(False), "paraphrased": arm(True),
          "large": arm(False, batch=32, share=0.125)},
    measures={f"{kind}_{what}": partial(course, kind=kind, what=what)
              for kind in KINDS for what in ("gain", "kept", "decay", "r2")},
    quick=shared.quick(keep=("data.dev", "data.test")), seeds=3,
    claims=(
        alone(says="what is told is learnt", arm="same", measure="memory_gain", above=0.5),
        alone(says="the loss goes on as the log of time", arm="same", measure="memory_r2",
              above=0.8),
        claim(says="paraphrases are lost more slowly", arm="paraphrased", measure="memory_decay",
              below=0.0),
        claim(says="and are of more use in other words", arm="paraphrased", measure="sense_gain",
              above=0.0),
        claim(says="large batches keep more", arm="large", measure="memory_kept", above=0.0),
    ),
)
