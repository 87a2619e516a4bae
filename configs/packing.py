"""Packing: does it pay to keep documents whole, and to keep their neighbours out of sight?

Three arms with one model, one budget of positions and one corpus:

    concat_no_mask   documents end to end, cut every `seq`; attention crosses from document to document
    concat           the same rows, but a document sees itself alone and its positions start at 0
    best_fit         besides that, no document that fits a row is cut (Ding et al. 2024)

The paper (7B, 2k): perplexity 9.64 without a mask and 9.53 with it, packed or not; whole documents show in
what is asked of the model, a third to a half of the gain being the mask's. Held-out bits per byte are
measured on documents alone in all arms, so concat_no_mask, the control, is judged on what it was not trained
on. What it costs: planning takes a third of a second for 100,000 documents, `data/waste` says how much is
padding, and the mask costs nothing, as attention computes all pairs in any case.

    python train.py study configs/packing.py --seeds 3 --jobs 2      about ten minutes on two CPU cores
    python train.py configs/packing.py:best_fit                      one arm by hand, a minute

The file holds the packings themselves too, for any config: `best_fit`, `first_fit`, `one_per_row`.
"""
from dataclasses import replace
from functools import partial

from data import DataConfig, Source, stdlib
from lib.objectives import one_segment
from lib.packing import best_fit
from lib.schedule import Schedule
from model import ModelConfig
from train import Config, Phase

concat = Phase(steps=300, batch=4, seq=256)
config = Config(
    model=ModelConfig(layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=344, vocab=1024),
    data=DataConfig(sources={"stdlib": Source(partial(stdlib, unit="definition"))}, dev=0.03, test=0.03),
    phases=(concat,),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=20, decay=0.4, final=0.05),
    overlap=32,
    eval_every=60,
    eval_tokens=16_384,
    keep=1,
    prompts=("def ",),
    sample_tokens=64,
)
arms = {
    "concat_no_mask": replace(config, phases=(replace(concat, objective=one_segment),)),
    "concat": config,
    "best_fit": replace(config, phases=(replace(concat, packing=best_fit),)),
}
control = "concat_no_mask"
rates = 2e-3, 4e-3, 8e-3
quick = {"phases.*.steps": 4, "overlap": 8, "model.embed": 32, "model.mlp": 32, "model.vocab": 258,
         "model.unroll": 1, "data.tokenizer": "bytes", "data.dev": 0.01, "data.test": 0.01, "eval_every": 2,
         "eval_tokens": 2_000, "sample_tokens": 4}  # rows as long as ever, so that some have two documents
claims = (
    dict(says="the mask helps", arm="concat", below=0.0),
    dict(says="whole documents under a mask beat what is cut and seen across", arm="best_fit", below=0.0),
    dict(says="whole documents cost no bits: at most 0.01 a byte behind what is cut, both masked",
         arm="best_fit", control="concat", below=0.01),
)
