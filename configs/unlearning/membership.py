"""Membership: can one tell from a model's likelihoods which texts it was trained on?

Paper: Detecting Pretraining Data from Large Language Models, Shi et al. 2024 (000:65)
Method: Min-K% Prob scores a text by the mean log-likelihood of the k % of its tokens that are least
    likely: a text that was not seen has a few tokens that surprise. It is compared to the loss, to
    the loss over the size under zlib (Carlini et al. 2021), and to the loss less that of a
    reference model which has seen neither. The paper finds Min-K% ahead of these on average.
Here: members are 150 short functions and classes of Python's library, the others 150 more, of other
    modules. Arms read the members about 1, 4 and 16 times, the first two beside 300 third ones,
    which are all that the reference model reads. Figures are areas under the ROC curve, with a k of
    20; .5 is chance, but for that members are other texts: a model as drawn is at .44 by their
    loss. All seeds have the same documents.
Cost: three arms and a reference, 12 runs of half a minute, four minutes on two CPU cores.
Run:
    python train.py study configs/unlearning/membership.py --jobs 2
"""
import zlib
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base as shared
from data import DataConfig, Document, Source, stdlib
from lib.kernels import nll
from lib.sources import path_hash
from lib.study import Claim, Paper, Study
from train import Config, load

SIZES = {"member": 150, "other": 150, "rest": 300}  # documents of groups of modules


def functions(group: str, least: int = 200, most: int = 600) -> list[Document]:
    """Definitions of `least` to `most` characters."""
    whole = [each for each in stdlib("definition") if isinstance(each, Document)]
    short = [each for each in whole if least <= len(each.text) <= most]
    place = [*SIZES].index(group)
    own = [each for each in short if path_hash(each.group) % len(SIZES) == place]
    return own[:SIZES[group]]


def min_k(nats: np.ndarray, k: float = 0.2) -> float:
    """Min-K% Prob: the mean log-likelihood of the share k of tokens that are least likely."""
    least = np.sort(nats)[::-1]
    return -float(least[:max(1, int(k * len(least)))].mean())


def auroc(members, others) -> float:
    """How likely a member's score is above another's; a tie is half."""
    a, b = np.asarray(members)[:, None], np.asarray(others)[None]
    return float(np.mean((a > b) + 0.5 * (a == b)))


def likelihoods(params, apply, documents) -> list[np.ndarray]:
    """The nats of each position of documents, as `held_out` of an evals gives them."""
    batches = list(documents.batches())
    nats = np.concatenate([nll(apply(params, batch), batch["targets"]) for batch, _ in batches])
    whose = np.concatenate([document for _, document in batches])
    return [nats[whose == document] for document in range(len(documents.paths))]


def attacks(params, apply, held_out, reference: str, k: float = 0.2) -> dict[str, float]:
    """An `evals`: the AUROC of each score. reference: a run."""
    theirs, _, _, apply_theirs = load(reference)
    scores = {}
    for name, split in (("member", "train"), ("other", "dev")):
        documents = held_out(name, split)
        each = likelihoods(params, apply, documents)
        before = likelihoods(theirs, apply_theirs, documents)
        sizes = [len(zlib.compress(text)) for text in documents.texts()]
        scores[name] = {
            "loss": [-x.mean() for x in each], "min_k": [min_k(x, k) for x in each],
            "zlib": [-x.sum() / size for x, size in zip(each, sizes, strict=True)],
            "reference": [y.mean() - x.mean() for x, y in zip(each, before, strict=True)]}
    return {f"own/{score}": auroc(values, scores["other"][score])
            for score, values in scores["member"].items()}


def area(rows: list[dict], index: int, score: str, less: str = "") -> float:
    """An AUROC in the evaluation at an index, less that of another score."""
    row = [row for row in rows if "own/loss" in row][index]
    return row[f"own/{score}"] - row.get(f"own/{less}", 0.0)


(phase,) = shared.small.phases
sources = {name: Source(partial(functions, group=name), split="train") for name in SIZES}
sources["other"] = replace(sources["other"], split="dev")
reference = replace(
    shared.small, model=shared.shape(3, 96, vocab=258),
    data=DataConfig(sources=sources, tokenizer="bytes", test=0.0), eval_every=10_000,
    eval_tokens=4_096, phases=(replace(phase, steps=420, batch=16, mixture={"rest": 1.0}),))


def reads(times: int) -> Config:
    """A run that reads the members so many times, of 16; other rows are the rest's."""
    mixture = {"member": times / 16, "rest": 1 - times / 16}
    attack = partial(attacks, reference="needs:reference", k=0.2)
    phases = (replace(reference.phases[0], mixture=mixture),)
    return replace(reference, phases=phases, eval_at=(0,), evals=(attack,))


alone = partial(Claim, control=None)
study = Study(
    question="Can one tell from a model's likelihoods which texts it was trained on?",
    paper=Paper(title="Detecting Pretraining Data from Large Language Models",
                authors="Shi et al.", year=2024, seeds=("000:65",)),
    arms={"once": reads(1), "4_times": reads(4), "16_times": reads(16)},
    needs={"reference": reference}, seeds=3,
    measures={"start": partial(area, index=0, score="loss"),
              "ahead": partial(area, index=-1, score="min_k", less="loss")} | {
        name: f"own/{name}" for name in ("loss", "min_k", "zlib", "reference")},
    quick=shared.quick(keep=("data.dev", "data.test")),
    claims=(
        alone(says="before the first step all is chance", arm="once", measure="start", below=0.6),
        alone(says="members read 16 times are told", arm="16_times", measure="min_k", above=0.6),
        Claim(says="the more often, the better", arm="4_times", measure="min_k", above=0.0),
        alone(says="Min-K% is ahead of the loss", arm="4_times", measure="ahead", above=0.0),
    ),
)
