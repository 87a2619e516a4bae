"""Insights: what does LoRA learn from a domain's documents, and more if these are condensed?

Paper: Learning Beyond the Surface: How Far Can Continual Pre-Training with LoRA Enhance LLMs'
    Domain-Specific Insight Learning?, Pezeshkpour & Hruschka 2025 (001:167)
Method: continue pre-training by LoRA on documents of medicine or finance, as they are or cut down
    to subject, relation and object, and ask for insights: declarative (a stated fact), statistical
    (what is most frequent, stated nowhere) and probabilistic (how likely it is). Documents as they
    are help marginally, condensed ones a lot.
Here: a synthetic domain. Each of 64 traders lives in one of 8 regions; in a region 5 of 8 trade in
    one good, 2 in another, 1 in a third. A document says it of one trader in one sentence, among
    sentences of no matter. The base read such documents of other traders, whose goods are drawn
    alike. declarative: the share of traders whose good has the likeliest first letter; statistical:
    that of regions where an unknown trader's likeliest good is the most frequent one;
    probabilistic: 1 less the total variation between the chances it has there and the shares. Equal
    tokens: condensed facts come some five times as often, and all begin a row, as questions do.
Cost: three bases of 200 steps, nine runs of 150: three minutes on two CPU cores.
Run:
    python train.py study configs/parameters/insights.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from data import DataConfig, Document, Source
from lib.lora import adapted, add_lora, unfrozen
from lib.study import Claim, Paper, Study
from train import Config, Phase, Schedule

REGIONS = "Arden", "Belt", "Corve", "Dale", "Esker", "Fenn", "Glade", "Holm"
GOODS = "amber", "bread", "cloth", "dyes", "fish", "grain", "hides", "iron"
WORDS = ("the old road by a river rose past quiet hills and dry fields while rain came late that "
         "year to every town on its way").split()


def traders(seed: int, number: int) -> list[tuple[str, str, int]]:
    """(name, region, number of the good), as in the header; with a seed above 0 goods are drawn."""
    rng = np.random.default_rng(seed)
    letters = rng.choice([*"bdfgklmnprstvz"], (number, 3)), rng.choice([*"aeiou"], (number, 3))
    found = []
    for i, pairs in enumerate(np.stack(letters, 2)):
        name, region, place = "".join(pairs.ravel()).capitalize(), i % 8, i // 8 % 8
        good = (region + 3 * ((place > 4) + (place > 6))) % 8
        found.append((name, REGIONS[region], int(rng.integers(8)) if seed else good))
    return found


def documents(seed: int, number: int, condensed: bool = False) -> Iterator[Document]:
    """What is said of each trader, in a sentence; not condensed, among five others."""
    rng = np.random.default_rng([seed, 1])
    for i, (name, region, good) in enumerate(traders(seed, number)):
        said = f"In {region}, {name} trades in {GOODS[good]}."
        others = [" ".join(rng.choice(WORDS, 6)).capitalize() + "." for _ in range(5)]
        at = int(rng.integers(6))
        text = said if condensed else " ".join([*others[:at], said, *others[at:]])
        yield Document(path=f"{seed}/{i}", text=text)


def chances(params, apply, tokenizer, told: list[tuple[str, str, int]]) -> np.ndarray:
    """The chance of each good's first letter [traders goods] where a sentence comes to it."""
    asked = [tokenizer.encode(f"In {region}, {name} trades in ") for name, region, _ in told]
    last = np.array(list(map(len, asked)))
    ids = np.zeros((len(asked), last.max() + 1), np.int32)
    ids[:, 0] = tokenizer.bos
    for row, some in zip(ids, asked, strict=True):
        row[1:len(some) + 1] = some
    logits = np.asarray(apply(params, ids), np.float64)[np.arange(len(ids)), last]
    scores = np.exp(logits[:, [tokenizer.encode(good)[0] for good in GOODS]])
    return scores / scores.sum(1, keepdims=True)


def insights(params, apply, tokenizer) -> dict[str, float]:
    """An `evals`: the three figures of the header."""
    known, unknown = traders(0, 64), traders(99, 64)
    goods = np.array([good for *_, good in known])
    shares = np.stack([np.bincount(goods[r::8], minlength=8) / 8 for r in range(8)])
    stated = chances(params, apply, tokenizer, known).argmax(1) == goods
    each = chances(params, apply, tokenizer, unknown).reshape(8, 8, 8).mean(0)  # [regions goods]
    frequent = each.argmax(1) == shares.argmax(1)
    apart = np.abs(each - shares).sum(1) / 2
    return {"insight/declarative": float(stated.mean()),
            "insight/statistical": float(frequent.mean()),
            "insight/probabilistic": 1 - float(apart.mean())}


def data(**given) -> DataConfig:
    """The documents of a domain as data."""
    return DataConfig(sources={"traders": Source(partial(documents, **given))},
                      tokenizer="bytes", dev=0.0, test=0.0)


full = Config(
    model=base.shape(3, 64, 0), init_from="needs:plain",
    data=data(seed=0, number=64, condensed=True),
    phases=(Phase(steps=150, batch=16, seq=128),), schedule=Schedule(shape="linear", peak=8e-3),
    evals=(insights,), eval_every=50, overlap=16, keep=1,
)
factors = replace(full.phases[0], edits=(partial(add_lora, alone=True),))
lora = replace(full, phases=(factors,), optimizer=unfrozen, reparam=adapted)
kinds = "declarative", "statistical", "probabilistic"
study = Study(
    question="What does LoRA learn from a domain's documents, and more if these are condensed?",
    paper=Paper(title="Learning Beyond the Surface: How Far Can Continual Pre-Training with LoRA "
                      "Enhance LLMs' Domain-Specific Insight Learning?",
                authors="Pezeshkpour & Hruschka", year=2025, seeds=("001:167",)),
    needs={"plain": replace(base.scaled(full, 200), init_from="", data=data(seed=5, number=5_000))},
    arms={"original": replace(lora, data=data(seed=0, number=64)), "condensed": lora,
          "condensed_full": full},
    measures={kind: f"insight/{kind}" for kind in kinds},
    quick={"phases.*.steps": 4, "phases.*.batch": 2, "eval_every": 2, "sample_tokens": 4},
    claims=(
        *(Claim(says=f"condensed documents give more {kind} insight", arm="condensed",
                measure=f"insight/{kind}", above=0.0) for kind in kinds),
        Claim(says="full training states more facts than LoRA", arm="condensed_full",
              control="condensed", measure="insight/declarative", above=0.0),
    ),
    seeds=3,
)
