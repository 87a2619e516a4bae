"""The value of pruning: does a cut model know more than its shape, drawn afresh?

Paper: Rethinking the Value of Network Pruning, Liu et al. 2019 (003:32)
Method: prune, fine-tune, and compare to the pruned shape from a new draw: trained for as many
    epochs as the large model (Scratch-E), or for as many FLOPs (Scratch-B). Fine-tuning is only as
    good or worse in their vision models, so a shape is what pruning finds, not weights. Nor does
    the first draw of the units that stay, a winning ticket, help at a good rate.
Here: half of heads, MLP units and stream of a trained model go, by their weights, which is the
    structured pruning of the paper. The wide model is minitron.py's, for a third of its steps, and
    `pruned` cuts it as an arm there does. scratch_e has the steps of the wide model and of the
    fine-tuning together, scratch_b their FLOPs. ticket is scratch_e from the draw of the wide
    model, in the units that the trained one keeps, scaled as a new draw is, as the norms of a
    masked model do; its mask costs the wide model's FLOPs. low_ticket, by the same mask, and low_e
    compare the two at an eighth of the rate, where the paper finds that tickets of single weights
    help, but not of units. At that rate both end half a bit behind. Fine-tuning has half the rate
    of all other arms but these; no rate is tuned.
Cost: six arms and the wide model, 21 runs of 10 to 60 seconds, five minutes on two CPU cores.
Run:
    python train.py study configs/growth/pruning_value.py --jobs 2
    python train.py configs/growth/pruning_value.py:scratch_e       one arm by hand, half a minute
"""
from dataclasses import replace
from functools import partial

from configs import base
from configs.growth.minitron import SIZES, large, plain, small, tuned, wide
from lib.keys import run_step
from lib.prune import cut_by, importance, kept_units, smaller
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, groups, table


def ticket(model: Model, context: Context, run: str, kv_heads: int, mlp: int, embed: int) -> Edited:
    """This model's own units, where another run, RUN or RUN@STEP, of its shape has its best ones.

    On entering the first phase that is a winning ticket (Frankle & Carbin 2019): the first draw
    under the mask of the trained model, whose seed is the same. Best is by `magnitude`. Under a
    mask norms are over the units that stay, so what reads the stream counts as a new draw does.
    """
    params, trained, *_ = context.load(*run_step(run))
    old = model.config
    config = smaller(old, dict(kv_heads=kv_heads, mlp=mlp, embed=embed))
    scores = importance(Model(trained.model, params), context, "magnitude", 1)
    index = kept_units(scores, old, config)
    wide = table(old)
    kept = cut_by(index, wide)(model.params)
    for name, row in table(config).items():
        if row.init:
            kept[name] = kept[name] * (row.init / wide[name].init)
    return Edited(Model(config, kept), dict.fromkeys(groups(old), "reset"), preserves=False)


def rate(config, factor: float):
    """A run at a multiple of its rate."""
    peak = config.schedule.peak * factor
    return replace(config, schedule=replace(config.schedule, peak=peak))


short = replace(wide, phases=(plain,))
pruned = tuned("magnitude")
spent = base.flops(large, plain) + base.flops(small, plain)
scratch_b = base.scaled(replace(short, model=small), base.steps_for(spent, small, plain))
scratch_e = base.scaled(scratch_b, 2 * plain.steps)
sizes = {axis: getattr(small, axis) for axis in SIZES}
draw = replace(scratch_e.phases[0], edits=(partial(ticket, run="needs:wide", **sizes),))
first_draw = replace(scratch_e, model=large, phases=(draw,))
study = Study(
    question="Does a cut model know more than its shape, drawn afresh?",
    paper=Paper(title="Rethinking the Value of Network Pruning", authors="Liu et al.", year=2019,
                seeds=("003:32",)),
    needs={"wide": short},
    arms={
        "scratch_e": scratch_e,
        "scratch_b": scratch_b,
        "pruned": pruned,
        "ticket": first_draw,
        "low_e": rate(scratch_e, 1 / 8),
        "low_ticket": rate(first_draw, 1 / 8),
    },
    quick=base.quick(keep=("model.embed", "model.mlp")),
    claims=(
        Claim(says="a new draw is as good as the cut model at equal FLOPs, to 0.02 bits",
              arm="scratch_b", control="pruned", below=0.02),
        Claim(says="but not at equal steps: there the cut model is ahead", arm="pruned",
              below=0.0),
        Claim(says="a ticket does not help at a good rate, to 0.02 bits", arm="ticket",
              above=-0.02),
        Claim(says="nor at a low one, as it is of units", arm="low_ticket", control="low_e",
              above=-0.02),
    ),
    seeds=3,
)
