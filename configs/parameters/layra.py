"""LayRA: does LoRA in the first and last layers alone forget less of what a model knew?

Paper: Continually Adding New Languages to Multilingual Language Models, Owodunni & Kumar 2025
    (002:27)
Method: train on text of the new language alone, no replay; LoRA in a few first and last layers,
    the rest frozen, embeddings too. The first layers read a language, the last ones write it, those
    between are said to reason. The paper adds Galician, Swahili and Urdu: LayRA is the best
    trade-off between old and new, LoRA in all layers learns the new ones a little better.
Here: a model of bytes, six layers, reads definitions of Python's library, then the same in another
    alphabet, its letters permuted: a frozen head writes no byte that it never saw. LayRA has layers
    0 and 5, rank 8. Each arm has the rate that is best for the new alphabet on dev.
Cost: three bases of 300 steps, eighteen runs of 150: six minutes on two CPU cores.
Run:
    python train.py study configs/parameters/layra.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from string import ascii_lowercase

import numpy as np

from configs import base
from data import DataConfig, Document, Skipped, Source, stdlib
from lib.lora import adapted, add_lora, unfrozen
from lib.study import Claim, Paper, Study
from train import Config, Phase, Schedule


def enciphered(seed: int = 0) -> Iterator[Document | Skipped]:
    """Definitions of Python's library, letters permuted, large ones as small ones."""
    letters = "".join(np.random.default_rng(seed).permutation(list(ascii_lowercase)))
    table = str.maketrans(ascii_lowercase + ascii_lowercase.upper(), letters + letters.upper())
    for document in stdlib("definition"):
        whole = isinstance(document, Document)
        yield replace(document, text=document.text.translate(table)) if whole else document


def with_factors(layers: tuple[int, ...] = ()) -> Config:
    """A run that trains LoRA's factors alone, in these layers, or in all."""
    edit = partial(add_lora, layers=layers, alone=True)
    return replace(full, phases=(replace(full.phases[0], edits=(edit,)),), optimizer=unfrozen,
                   reparam=partial(adapted, layers=layers))


sources = {"old": Source(partial(stdlib, unit="definition")),
           "new": Source(enciphered)}
full = Config(
    model=base.shape(6, 64, 0), init_from="needs:old",
    data=DataConfig(sources=sources, tokenizer="bytes", dev=0.02, test=0.02),
    phases=(Phase(steps=150, batch=16, seq=128, mixture={"new": 1.0}),),
    schedule=Schedule(shape="wsd", peak=8e-3, decay=0.4, final=0.05),
    eval_every=150, eval_tokens=16_384, overlap=16, keep=1,
)
first = replace(full.phases[0], steps=300, mixture={"old": 1.0})
old = replace(full, init_from="", phases=(first,))
lora = with_factors()
claim = partial(Claim, measure="eval/old.test/bpb")
study = Study(
    question="Does LoRA in the first and last layers alone forget less of what a model knew?",
    paper=Paper(title="Continually Adding New Languages to Multilingual Language Models",
                authors="Owodunni & Kumar", year=2025, seeds=("002:27",)),
    needs={"old": old},
    arms={"full": full, "lora": lora, "layra": with_factors((0, -1))},
    peak_lrs=(2e-3, 8e-3), tuned_by="new on dev",
    measures={"new on dev": "eval/new/bpb", "old": "eval/old.test/bpb", "new": "eval/new.test/bpb",
              "trained": "model/trained"},
    quick=base.quick({"model.layers": 3}, keep=("model.vocab", "data.tokenizer")),
    claims=(
        claim(says="LoRA forgets less than full training", arm="lora", below=0.0),
        claim(says="LayRA forgets less than LoRA", arm="layra", control="lora", below=0.0),
        claim(says="LoRA is behind full training in the new alphabet", arm="lora",
              measure="eval/new.test/bpb", above=0.0),
        claim(says="LayRA is behind LoRA there", arm="layra", control="lora",
              measure="eval/new.test/bpb", above=0.0),
        claim(says="but by less than a tenth of a bit", arm="layra", control="lora",
              measure="eval/new.test/bpb", below=0.1),
    ),
    seeds=3,
)
