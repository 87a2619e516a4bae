"""Model collapse: do models that learn from models grow worse, also where real text is kept?

Paper: Is Model Collapse Inevitable? Breaking the Curse of Recursion by Accumulating Real and
    Synthetic Data, Gerstgrasser et al. 2024 (003:69)
Method: train a model on real text; sample as much text from it; train the next model, from scratch,
    on that alone (replace) or on that and all text before it, the real one included (accumulate);
    and so on. The paper: with replacing, test loss rises from one generation to the next; with
    accumulating it stays bounded (for linear models, by a constant that no generation exceeds).
Here: 3,000 short speeches of Shakespeare, four generations of 2 layers of 64, at equal steps, so
    that what is accumulated is seen less often (the paper trains for equal epochs, and for equal
    steps as an ablation). Text is sampled at temperature 1, from the start of a document to its end
    or 127 tokens, which few reach; each generation has draws of its own. All have the first one's
    tokenizer. Bits per byte are those of real held-out speeches. Sampling is not charged. With
    accumulating, generations add 0.09, 0.05 and 0.04 bits.
Cost: 21 runs of 10 to 20 seconds, 15 of them sampled for half a minute, five minutes on two cores.
Run: in the directory of train.py,
    python train.py study configs/selection/model_collapse.py --jobs 2
"""
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from data import DataConfig, Document, Source, text
from lib.continuations import continue_prompts
from lib.generate import sampling
from lib.study import Claim, Paper, Study
from train import Config, load

GENERATIONS = 2, 3, 4  # those that learn from another one; the first is the real text's
LAST = GENERATIONS[-1]


def speeches(path: str, number: int = 3_000, longest: int = 200) -> Iterable[Document]:
    """The first documents of so many characters of a text with an empty line between two."""
    short = (one for one in text(path, "\n\n") if len(one.text) <= longest)
    return itertools.islice(short, number)


def sampled(run: str, number: int = 2_600, tokens: int = 127, seed: int = 0,
            batch: int = 520) -> Iterator[Document]:
    """Documents that a run's model makes up: other ones for each `seed` and seed of the run."""
    params, config, tokenizer, _ = load(run)
    for first in range(0, number, batch):
        prompts = [""] * min(batch, number - first)
        draws = number * (100 * config.seed + seed) + first  # the seed of the first document's
        made = continue_prompts(params, config, tokenizer, 0, prompts, sampling(1.0), tokens, draws)
        for i, one in enumerate(made, first):
            yield Document(f"sampled/{i}", one.text, split="train")


phase = replace(base.small.phases[0], steps=300, batch=8, seq=128)
first = replace(
    base.small,
    model=base.shape(2, 64, 512),
    data=DataConfig(sources={"real": Source(partial(
        speeches, path="../shared/data/tinyshakespeare.txt"))}, dev=0.03, test=0.1),
    phases=(phase,),
    prompts=("",),
)


def made_of(config: Config, made: dict[str, Source], real: float | None) -> Config:
    """A generation that also has what other ones have made, by source; real: 0, or by size."""
    mixture = None if real is None else dict.fromkeys(made, 1.0) | {"real": real}
    data = replace(config.data, sources=config.data.sources | made,
                   tokenizer="needs:first/tokenizer.model")
    return replace(config, data=data, phases=(replace(phase, mixture=mixture),))


def made_before(way: str, generation: int) -> dict[str, Source]:
    """What the generations before one have made, by source, with other draws for each."""
    earlier = ["needs:first", *(f"needs:{way}{n}_before" for n in GENERATIONS if n < generation)]
    return {f"made{n}": Source(partial(sampled, run=run, seed=n))
            for n, run in enumerate(earlier, 1)}


def generation(way: str, number: int) -> Config:
    """A generation under "replace" or "accumulate"."""
    made = made_before(way, number)
    if way == "accumulate":
        return made_of(first, made, None)
    newest = f"made{number - 1}"
    return made_of(first, {newest: made[newest]}, 0.0)


def slope(figures: dict) -> dict[str, float]:
    """Bits per byte that a generation adds, by a line through those of each way."""
    found = {}
    for way in "replace", "accumulate":
        arms = ["real", *(f"{way}{n}" for n in GENERATIONS)]
        bits = [figures[arm]["bpb"].mean() for arm in arms]
        found[way] = np.polyfit(np.arange(len(bits)), bits, 1)[0]
    return found


ways = [(way, n) for way in ("replace", "accumulate") for n in GENERATIONS]
study = Study(
    question="Do models that learn from models grow worse, also where real text is kept?",
    paper=Paper(title="Is Model Collapse Inevitable? Breaking the Curse of Recursion by "
                "Accumulating Real and Synthetic Data", authors="Gerstgrasser et al.", year=2024,
                seeds=("003:69",)),
    needs={"first": first} | {f"{way}{n}_before": generation(way, n)
                              for way, n in ways if n < LAST},
    arms={"real": first} | {f"{way}{n}": generation(way, n) for way, n in ways},
    quick=base.quick(keep=("data.dev", "data.test")),
    conclusions={"bits a generation": slope},
    claims=(
        Claim(says="replaced text makes each generation worse", above=0.0,
              measure="bits a generation: replace"),
        Claim(says="four generations of it cost 0.05 bits", arm="replace4", above=0.05),
        Claim(says="accumulated text is better", arm="accumulate4", control="replace4", below=0.0),
        Claim(says="it is at most 0.05 bits behind real text", arm="accumulate4", below=0.05),
    ),
    seeds=3,
)
