"""Parts of strong: what is each part of the strong baseline worth?

Paper: Value Residual Learning For Alleviating Attention Concentration In Transformers, Zhou et al.
    2024 (arXiv 2410.17897), of the values; the others are nanochat's and modded-nanogpt's
Method: the strong baseline, and it without each of its parts.
Here: at equal rows, steps and rate, and FLOPs within 0.5 %; half as wide as strong.py. What is in
    it was chosen by looks at one seed or two, at its own width. all_parts is the plain Llama with
    AdamW. Without SwiGLU it has squared ReLU, and an MLP that is half as wide again. At seed 1
    strong.py itself has 1.361; the last three commands have 1.369, 1.370 and 1.365. nanochat.py has
    residual scalars and backout.
Cost: 45 runs of 150 steps, about six minutes on two CPU cores that do nothing else, an estimate.
Run:
    python train.py study configs/baselines/strong_parts.py --jobs 2
    python train.py study configs/baselines/strong_parts.py --arms values,pairs --seeds 1
    python train.py configs/baselines/strong_parts.py:values        the run without values
    python train.py configs/baselines/strong.py --seed 1 --name cap --model.outputs.cap 0
    python train.py configs/baselines/strong.py --seed 1 --name gates --model.rows.gates False
    python train.py configs/baselines/strong.py --seed 1 --name head --phases.0.lr.head 4
"""
from dataclasses import replace
from functools import partial

from configs import base
from configs.baselines.muon import muon
from configs.baselines.strong import capped, config, on, parts, strong
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from train import Config


def lacks(**off) -> Config:
    """The strong run with these arguments of its parts."""
    return replace(whole, model=replace(model, rows=partial(parts, **off)))


narrow = base.shape(embed=64)
whole = on(replace(base.scaled(config, 150), model=narrow))
model, phase = whole.model, whole.phases[0]
plain = replace(whole, model=narrow, optimizer=adamw, phases=(replace(phase, lr={}),))
arms = {  # by what is left out
    "all_parts": plain,
    "muon": replace(whole, optimizer=adamw),
    "polar_express": replace(whole, optimizer=partial(muon, outputs="equal")),
    "equal_outputs": replace(whole, optimizer=partial(muon, iteration="polar_express")),
    "qk_norm": replace(whole, model=replace(model, qk_norm=False)),
    "group_rates": replace(whole, phases=plain.phases),
    "gains": lacks(gains=False),
    "values": lacks(values=False),
    "pairs": lacks(pairs=0),
    "head_gates": lacks(gates=False),
    "smear": lacks(smear=False),
    "swiglu": replace(whole, model=replace(
        model, mlp=4 * narrow.embed, rows=partial(parts, gated=False))),
    "key_shift": replace(whole, model=replace(model, forward=partial(strong, shift=False))),
    "cap": replace(whole, model=replace(model, outputs=partial(capped, cap=0.0))),
}
study = Study(
    question="What is each part of the strong baseline worth?",
    paper=Paper(title="Value Residual Learning For Alleviating Attention Concentration In "
                      "Transformers", authors="Zhou et al.", year=2024),
    arms={"strong": whole} | arms,
    quick=base.quick({"model.layers": 2}),
    claims=[Claim(says=f"without {name.replace('_', ' ')} it is behind", arm=name, above=0.0)
            for name in arms],
    seeds=3,
)
