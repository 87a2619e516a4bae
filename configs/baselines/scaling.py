"""Scaling: do small rungs of the ladder foretell a larger one, and which size is best for a budget?

Paper: Training Compute-Optimal Large Language Models, Hoffmann et al. 2022
Method: approach 3. The law L = E + A / N^a + B / D^b of N parameters and D tokens is fitted to runs
    by the Huber loss of log L, of width 1e-3, from several starts. Of F = 6 N D FLOPs the best size
    is then G (F / 6)^(b / (a + b)), G = (a A / (b B))^(1 / (a + b)).
Here: the ladder of configs/base.py, d2 at three lengths, d3 and d4 at two, d5 and d6 at one; d8,
    more than twice as large as any of them, is foretold. Bits per byte of Python's library, one
    vocabulary of 512 for all. The ready configs have a hundred thousand times these FLOPs and more,
    and other text: what is said of them is the law drawn far beyond its runs, and its interval is
    of the seeds alone. Against: a straight line of log L over log F. Intervals are by resampling
    seeds. No run has the ladder's 20 tokens a parameter: three seeds of short runs do not fix the
    law, as its intervals say.
Cost: 30 runs of 6.5e13 FLOPs together, twelve minutes on two CPU cores that do nothing else, an
    estimate.
Run:
    python train.py study configs/baselines/scaling.py --jobs 2
"""
import numpy as np

from configs import base
from configs.baselines.llama_1_3b import config as large
from configs.baselines.llama_350m import config as medium
from lib.laws import fit_law
from lib.study import Chart, Claim, Paper, Study
from model import count

LENGTHS = {2: (720, 1440, 2880), 3: (720, 1440), 4: (720, 1440), 5: (720,), 6: (720,),
           8: (720,)}  # 1,000 tokens
RUNS = {f"d{depth}_{length}k": (depth, 1e3 * length)  # the last one is foretold
        for depth, lengths in LENGTHS.items() for length in lengths}
FITTED, NEXT = [*RUNS][:-1], [*RUNS][-1]
READY = {"124M": base.llama, "350M": medium, "1.3B": large}


def points(figures: dict, arms: list[str]) -> list[np.ndarray]:
    """Sizes, tokens, bits per byte and FLOPs [arms seeds] of arms' runs, one after the other."""
    names = "model/params", "tokens", "bpb", "flops"
    return [np.concatenate([figures[arm][name] for arm in arms]) for name in names]


def foretold(figures: dict) -> dict[str, float]:
    """The law's constants, how far it misses d8 and the runs it is of, and the best sizes."""
    size, tokens, loss, flops = points(figures, FITTED)
    law = fit_law(size, tokens, loss)
    line = np.polyfit(np.log(flops), np.log(loss), 1)
    n, d, true, f = (x.mean() for x in points(figures, [NEXT]))
    told = law.loss(n, d), np.exp(np.polyval(line, np.log(f)))
    missed = [abs(one / true - 1) for one in told]
    means = [x.reshape(len(FITTED), -1).mean(1) for x in (size, tokens, loss)]
    best = law.best_size(f)
    found = law._asdict() | {
        "exponent of the best size": law.exponent, "best size at d8's FLOPs": best,
        "tokens a parameter there": f / 6 / best**2, "missed": missed[0],
        "less a line's": missed[0] - missed[1],
        "worst of those fitted": np.abs(law.loss(*means[:2]) / means[2] - 1).max()}
    for name, ready in READY.items():
        n, d = count(ready.model), base.budget(ready)
        found[f"{name} over the best size, log10"] = np.log10(n / law.best_size(6 * n * d))
    return found


def curves(figures: dict) -> dict:
    """Losses over FLOPs of each rung, and the law's, of d8 and at the best size of each budget."""
    found = {}
    for depth in LENGTHS:
        own = [arm for arm, (of, _) in RUNS.items() if of == depth]
        found[f"d{depth}"] = ([figures[arm]["flops"].mean() for arm in own],
                              [figures[arm]["bpb"] for arm in own])
    law = fit_law(*points(figures, FITTED)[:3])
    n, d, _, f = (x.mean() for x in points(figures, [NEXT]))
    flops = np.geomspace(min(x[0] for x, _ in found.values()), f, 50)
    best = law.best_size(flops)
    return found | {"d8, foretold": ([f], [law.loss(n, d)]),
                    "best size, foretold": (flops, law.loss(best, flops / 6 / best))}


study = Study(
    question="Do small rungs of the ladder foretell a larger one, and which size is best?",
    paper=Paper(title="Training Compute-Optimal Large Language Models", authors="Hoffmann et al.",
                year=2022),
    arms={arm: base.ladder(depth, tokens, 512) for arm, (depth, tokens) in RUNS.items()},
    control="d4_720k", seeds=3,
    quick=base.quick(),
    conclusions={"law": foretold},
    charts=[Chart(title="loss over the ladder", curves=curves, across="FLOPs of training")],
    claims=(
        Claim(says="the law misses d8 by less than 2 %", measure="law: missed", below=0.02),
        Claim(says="by less than a line over FLOPs", measure="law: less a line's", below=0.0),
        Claim(says="and the runs it is of by less than 1 %", below=0.01,
              measure="law: worst of those fitted"),
        Claim(says="the best size grows at least as FLOPs^0.3", above=0.3,
              measure="law: exponent of the best size"),
        Claim(says="and at most as FLOPs^0.7", measure="law: exponent of the best size", below=0.7),
        Claim(says="the ready 124M is within ten times the best size", below=1.0,
              measure="law: 124M over the best size, log10"),
    ),
)
