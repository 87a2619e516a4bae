"""Headlines: do verdicts on the plain Llama hold on the strongest small model here?

Paper: Fewer Truncations Improve Language Modeling, Ding et al. 2024 (001:39);
    Metadata Conditioning Accelerates Language Model Pre-training, Gao et al. 2025 (000:15);
    Compact Language Models via Pruning and Knowledge Distillation, Muralidharan et al. 2024
    (002:26);
    Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models,
    Chen et al. 2023 (000:11, 001:37)
Method: arms of these four studies, with strong.py's model, optimiser and rates of groups in the
    place of the plain ones, at the peak rates that these studies have for the plain Llama.
Here: best_fit.py's packing under a mask, meco.py's run with a cooldown, minitron.py's cut with a
    teacher and skill_it.py's estimated graph. A strong model is cut by the size of its weights or
    blindly, since scoring by activations reads the plain forward pass. Its tables of values are cut
    with the heads, those of pairs with the stream. The strong model learns skill_it.py's process to
    the end, so that its two arms end equal. g_stack_beside.py and active_forgetting_beside.py do
    the same for growth and forgetting.
Cost: 42 runs, 16 minutes on two CPU cores beside other work.
Run:
    python train.py study configs/baselines/beside.py --jobs 2
"""
from dataclasses import replace
from functools import partial

from configs import base
from configs.baselines.strong import on as strong
from configs.context import best_fit, meco
from configs.growth import minitron
from configs.selection import skill_it
from lib.prune import prune
from lib.study import Claim, Study
from train import Config


def cut(config: Config, by: str) -> Config:
    """A run that cuts the wide strong model, as one of minitron.py's arms does."""
    phase = config.phases[0]
    sizes = {axis: getattr(small, axis) for axis in minitron.SIZES}
    edits = partial(prune, by=by, **sizes), *phase.edits[1:]
    made = strong(replace(config, phases=(replace(phase, edits=edits),)))
    return replace(made, optimizer=partial(made.optimizer, frozen=("teacher",)))


def test_loss(rows: list[dict]) -> float:
    """A measure: nats a token on the test split, the mean over sources."""
    losses = [loss for name, loss in rows[-1].items() if name.endswith(".test/loss")]
    return sum(losses) / len(losses)


small = strong(replace(minitron.wide, model=minitron.small)).model
cuts = minitron.study.arms
arms = {
    "no_mask": strong(best_fit.study.arms["concat_no_mask"]),
    "best_fit": strong(best_fit.study.arms["best_fit"]),
    "plain_text": strong(meco.study.arms["plain"]),
    "meco": strong(meco.study.arms["metadata_then_plain"]),
    "first": cut(cuts["first"], "first"),
    "magnitude": cut(cuts["magnitude"], "magnitude"),
    "taught": cut(cuts["first_kl"], "magnitude"),
    "uniform": strong(skill_it.study.arms["uniform"]),
    "graph": strong(skill_it.study.arms["estimated"]),
}
needs = {"wide": strong(minitron.wide)}
needs |= {name: strong(config) for name, config in skill_it.study.needs.items()}
papers = [study.paper for study in (best_fit.study, meco.study, minitron.study, skill_it.study)]
study = Study(
    question="Do verdicts on the plain Llama hold on the strongest small model here?",
    paper=tuple(papers),
    needs=needs,
    arms=arms,
    measures={"loss": test_loss},
    quick=base.quick({"phases.*.steps": 6}, keep=("phases.*.seq", "model.embed", "model.mlp")),
    claims=(
        Claim(says="whole documents under a mask beat what is cut and seen across",
              arm="best_fit", below=0.0),
        Claim(says="after the cooldown MeCo is ahead of plain training", arm="meco",
              control="plain_text", measure="eval/plain.test/bpb", below=0.0),
        Claim(says="what is cut by its weights is ahead of what is cut blindly", arm="magnitude",
              control="first", below=0.0),
        Claim(says="a teacher is better than text over as many tokens", arm="taught",
              control="magnitude", below=0.0),
        Claim(says="a graph of skills beats equal shares", arm="graph", control="uniform",
              measure="loss", below=0.0),
    ),
    seeds=3,
)
