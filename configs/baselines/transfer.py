"""Transfer: is one learning rate near the best at every width, depth and length of a run?

Paper: Tensor Programs V, Yang et al. 2022
Method: the plain Llama by default, over five rates: a quarter to the whole of a width of 128, two
    to eight layers, 150 to 600 steps. The best rate of a size is that of a parabola, by least
    squares, through the five losses over the logarithm of the rate.
Here: one length for all widths and depths, so larger models see fewer tokens a parameter. A best
    rate outside of the five is counted as the nearest of them. At first a run
    learns only how frequent pieces are; eight layers at a high rate stay there longest. short: a
    run that ends soon after that. study.png has the losses by rate.
Cost: 200 runs, 26 minutes on two CPU cores that do nothing else, by their CPU time.
Run:
    python train.py study configs/baselines/transfer.py --jobs 2
    python train.py study configs/baselines/transfer.py --seeds 1
"""
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from lib.study import Chart, Claim, Paper, Study
from train import Config

RATES = 4e-3, 5.7e-3, 8e-3, 1.13e-2, 1.6e-2
SIZES = {  # embed, layers, steps
    "width_32": (32, 4, 600),
    "width_64": (64, 4, 600),
    "width_128": (128, 4, 600),
    "layers_2": (64, 2, 600),
    "layers_8": (64, 8, 600),
    "steps_150": (64, 4, 150),
    "steps_300": (64, 4, 300),
    "short": (64, 8, 200),
}
GROUPS = {
    "width": ("width_32", "width_64", "width_128"),
    "depth": ("layers_2", "width_64", "layers_8"),
    "length": ("steps_150", "steps_300", "width_64"),
}


def run(embed: int, layers: int, steps: int, rate: float) -> Config:
    """The plain Llama of a size, for so many steps at a peak rate."""
    config = replace(base.scaled(base.small, steps), model=base.shape(layers, embed),
                     eval_every=steps)
    return replace(config, schedule=replace(config.schedule, peak=rate))


def arm(size: str, rate: float) -> str:
    """The name of an arm."""
    return f"{size}_at_{1e3 * rate:g}"


def losses(figures: dict, size: str) -> np.ndarray:
    """Bits per byte [rates] of a size, the mean over seeds."""
    found = [figures[arm(size, rate)]["bpb"] for rate in RATES]
    return np.mean(found, axis=1)


def best_rate(losses: np.ndarray) -> float:
    """The rate at which a parabola nearest to the losses over log(rate) is lowest."""
    at = np.log(RATES)
    curve, slope, _ = np.polyfit(at, losses, 2)
    if curve <= 0:
        return RATES[int(np.argmin(losses))]
    return float(np.exp(np.clip(-slope / (2 * curve), at[0], at[-1])))


def moves(figures: dict) -> dict[str, float]:
    """How far the best rate moves: the largest over the smallest, by width, depth and length."""
    found = {}
    for name, sizes in GROUPS.items():
        rates = [best_rate(losses(figures, size)) for size in sizes]
        found[name] = max(rates) / min(rates)
    return found


def lost(figures: dict) -> dict[str, float]:
    """Bits per byte that 8e-3 loses to the best of the five rates: the most, and in a short run."""
    bits = {size: losses(figures, size) for size in SIZES}
    by_size = {size: found[RATES.index(8e-3)] - found.min() for size, found in bits.items()}
    short = by_size.pop("short")
    return {"most": max(by_size.values()), "short": short}


def above_best(figures: dict, sizes: tuple[str, ...]) -> dict:
    """A chart's curves: losses less the least of each size, without what a seed adds to all."""
    found = {}
    for size in sizes:
        bits = np.array([figures[arm(size, rate)]["bpb"] for rate in RATES])
        least = losses(figures, size).min()
        found[f"{size}, best {least:.3f}"] = RATES, bits - bits.mean(0) + bits.mean() - least
    return found


study = Study(
    question="Is one learning rate near the best at every width, depth and length?",
    paper=Paper(title="Tensor Programs V: Tuning Large Neural Networks via Zero-Shot "
                      "Hyperparameter Transfer", authors="Yang et al.", year=2022),
    arms={arm(size, rate): run(*SIZES[size], rate) for size in SIZES for rate in RATES},
    control=arm("width_64", 8e-3),
    quick=base.quick({"phases.*.steps": 2}),
    conclusions={"moves": moves, "lost": lost},
    charts=[Chart(title=f"by {name}", curves=partial(above_best, sizes=sizes), across="peak rate",
                  up="bits per byte above the best rate's") for name, sizes in GROUPS.items()],
    claims=(
        Claim(says="over four times the width the best rate moves by less than 2",
              measure="moves: width", below=2.0),
        Claim(says="over four times the depth it moves by less than 2",
              measure="moves: depth", below=2.0),
        Claim(says="over four times the length it moves by less than 2",
              measure="moves: length", below=2.0),
        Claim(says="8e-3 costs at most 0.02 bits per byte at any of these sizes",
              measure="lost: most", below=0.02),
        Claim(says="in a short run of eight layers it costs 0.1 and more",
              measure="lost: short", above=0.1),
    ),
    seeds=5,
)
