"""500 steps: what do the plain Llama, Muon and the strong model reach on the same rows?

Paper: Muon: An optimizer for hidden layers in neural networks, Jordan et al. 2024; nanochat,
    Karpathy 2025, whose recipe is in nanochat.py
Method: from the old defaults, AdamW and a tied table, one change after another: Muon, a head
    of its own drawn small, embeddings drawn large or learnt faster, both; then AdamW with these,
    and with outputs of blocks that begin as 0; the plain Llama as it is now; and strong.py.
Here: 4 layers of 128 over 1,024 pieces, 500 steps of 8 x 256, equal rows and seeds, equal FLOPs
    within 0.5 %. The peak rate is 8e-3, for the old defaults 4e-3, and for adamw_zero_4 and
    adamw_zero_2 what their names say, in thousandths. The plain Llama has rates by width besides.
    strong.py warms up for 40 steps, the others for 100.
Cost: 33 runs, some twenty minutes on two CPU cores that do nothing else, an estimate.
Run:
    python train.py study configs/baselines/steps_500.py --jobs 2
    python train.py study configs/baselines/steps_500.py --arms strong
"""
from dataclasses import replace
from functools import partial

from configs import base
from configs.baselines.muon import muon
from configs.baselines.recipe import as_before, old, redrawn
from configs.baselines.strong import config as strong
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from train import Config

phase = replace(strong.phases[0], lr={})
plain = replace(strong, model=base.shape(), phases=(phase,), optimizer=base.small.optimizer,
                schedule=replace(base.small.schedule, warmup=100))
read = plain.model.embed**-0.5


def rows(config, own: dict, **draws: float) -> dict:
    """`rows`: outputs of blocks as they were before, embeddings and head drawn otherwise."""
    return as_before(config, redrawn(config, own, **draws))


def by_muon(embed: float = read, **how) -> Config:
    """Muon, a head of its own drawn small, and embeddings of this deviation."""
    model = replace(plain.model, rows=partial(rows, embed=embed))
    return replace(plain, model=model, optimizer=partial(muon, base_width=0, **how))


def at(peak: float, **changes) -> Config:
    """The plain run with this peak rate."""
    return replace(plain, schedule=replace(plain.schedule, peak=peak), **changes)


by_adamw = partial(at, optimizer=partial(adamw, base_width=0))  # one rate for all matrices
arms = {
    "before": old(at(4e-3)),
    "muon": replace(old(plain), optimizer=partial(muon, base_width=0)),
    "small_head": by_muon(embed_lr=1.0), "fast_embeddings": by_muon(),
    "large_embeddings": by_muon(embed=0.8, embed_lr=1.0),
    "fast_and_large": by_muon(embed=0.8),
    "adamw": by_adamw(8e-3, model=by_muon(embed=0.8).model),
    "adamw_zero_4": by_adamw(4e-3), "adamw_zero_2": by_adamw(2e-3),
    "plain": plain, "strong": strong,
}
study = Study(
    question="What do the plain Llama, Muon and the strong model reach on the same rows?",
    paper=Paper(title="Muon: An optimizer for hidden layers in neural networks",
                authors="Jordan et al.", year=2024),
    arms=arms,
    quick=base.quick({"model.layers": 2}),
    claims=(
        Claim(says="Muon is ahead of AdamW with a tied table", arm="muon", below=0.0),
        Claim(says="a head of its own changes that by less than 0.02", arm="small_head",
              control="muon", above=-0.02),
        Claim(says="faster embeddings are worth 0.1 and more", arm="fast_embeddings",
              control="small_head", below=-0.1),
        Claim(says="so are larger ones", arm="large_embeddings", control="small_head", below=-0.1),
        Claim(says="both are better than either", arm="fast_and_large", control="fast_embeddings",
              below=0.0),
        Claim(says="AdamW with both is 0.1 and more behind Muon", arm="adamw",
              control="fast_and_large", above=0.1),
        Claim(says="outputs that begin as 0 bring it closer by as much", arm="adamw_zero_4",
              control="adamw", below=-0.1),
        Claim(says="the plain Llama is 0.1 and more ahead of what it was", arm="plain", below=-0.1),
        Claim(says="Muon adds to it", arm="fast_and_large", control="plain", below=0.0),
        Claim(says="the strong model is below 1.55", arm="strong", control=None, below=1.55),
    ),
    seeds=3,
)
