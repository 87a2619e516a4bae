"""Ladder: one dial, the depth, from which the size, the batch, the length and the warm-up follow.

Paper: none of its own; the length is by Training Compute-Optimal Large Language Models (Hoffmann et
    al. 2022), the batch by How Does Critical Batch Size Scale in Pre-training? (Zhang et al. 2024),
    one dial for all as in nanochat (Karpathy 2025)
Method: the plain Llama by default. `rung` and `ladder` of configs/base.py have the rules; the peak
    rate is the same at every depth. Up to d8 a rung is made for CPUs, from d9 on for GPUs.
Here: Python's standard library, 12 MB, which rungs from d6 on read more than four times over;
    `mine.py --path PATH --depth N` is the same on text of yours. scaling.py asks whether small
    rungs foretell larger ones.
Cost: on two CPU cores d2 takes half a minute, d4 five, d6 forty minutes, estimates; d12 is
    1.3e18 FLOPs, an hour of one H200 at 40 % MFU.
Run:
    python train.py configs/baselines/ladder.py --depth 4
    python train.py configs/baselines/ladder.py --depth 6 --tokens_per_param 5
    python train.py fit configs/baselines/ladder.py --depth 24 --topology h100:8
"""
from configs import base
from lib.errors import InputError
from lib.fields import NotNegative
from model import count
from train import Config


def config(
    depth: base.Depth = 4, tokens: NotNegative = 0.0, tokens_per_param: NotNegative = 0.0
) -> Config:
    """A run of so many layers.

    tokens, tokens_per_param: its length by one of them; 0 and 0 are 20 tokens a parameter.
    """
    if tokens and tokens_per_param:
        raise InputError(f"a run is given tokens {tokens:g} and tokens_per_param "
                         f"{tokens_per_param:g}; allowed is one of them")
    each = tokens_per_param or base.TOKENS_PER_PARAM
    found = base.ladder(depth, tokens or each * count(base.rung(depth)))
    print(f"ladder: depth {depth}: {base.says(found)} (--depth, --tokens, --tokens_per_param)",
          flush=True)
    return found
