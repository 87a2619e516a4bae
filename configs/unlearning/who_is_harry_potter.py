"""Who's Harry Potter: can a book be forgotten by learning what a model would say without it?

Paper: Who's Harry Potter? Approximate Unlearning in LLMs, Eldan & Russinovich 2023 (002:10)
Method: train the model further on the book (reinforced). What that makes likelier is the book's:
    the generic prediction is the likeliest token of v - alpha relu(v_reinforced - v), v being the
    logits before. Then fine-tune the model on the book's text with these as targets. The paper
    forgets so the Harry Potter books in an hour, and keeps general benchmarks.
Here: the book is the package asyncio, a third of the rows beside Python's library without three
    packages. generic: 40 steps on the book with generic targets. plain: as many on the rest of the
    library, the control. ascent: as many up the gradient on the book, each token up to 6 nats.
    never: a model that has not read the book. "book" is nats a byte on text of the book that was
    read; bits per byte are those of the rest. Log-probabilities stand for logits, which have a
    free constant. Left out: names of the book replaced by others in what v reads. never is 0.1
    nats worse at the book than plain, and in one seed of three better: there is hardly anything to
    forget. generic is worse at it by 0.4 than never, which is damage. ascent ends worse than a
    uniform guess, 8 bits, on the rest.
Cost: four arms, a base and its reinforcement, 18 runs, two and a half minutes on two CPU cores.
Run:
    python train.py study configs/unlearning/who_is_harry_potter.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs import base as shared
from configs.continual.agem import package
from data import DataConfig, Source
from lib.kernels import nll
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from lib.teacher import adopt, adopt_self, teacher_logits
from model import cross_entropy
from train import Schedule

OWN, MORE = "before", "reinforced"  # models beside the one that forgets


def generic_targets(before, reinforced, alpha: float):
    """The likeliest token [b c] without what reinforcement made likelier, of logits [b c v]."""
    old, new = jax.nn.log_softmax(before), jax.nn.log_softmax(reinforced)
    return jnp.argmax(old - alpha * jax.nn.relu(new - old), -1)


def generic(logits, batch, extras, alpha: float = 5.0):
    """A `token_loss`: the nats of generic targets in place of the text's."""
    before, more = (teacher_logits(extras, batch, prefix) for prefix in (OWN, MORE))
    return nll(logits, generic_targets(before, more, alpha))


def ascent(logits, batch, extras, most: float = 6.0):
    """A `token_loss`: up, until a token has `most` nats."""
    return -jnp.minimum(cross_entropy(logits, batch, extras), most)


def read_before(params, apply, held_out, most: int = 16_384) -> dict[str, float]:
    """An `evals`: nats a token of the book's training documents."""
    total = count = 0
    for batch, document in held_out("book", "train", most).batches():
        counted = document >= 0
        total += float(np.sum(nll(apply(params, batch), batch["targets"]) * counted))
        count += int(counted.sum())
    return {"own/book": total / count}


sources = {"rest": Source(partial(package, name="")),
           "book": Source(partial(package, name="asyncio"), split="train")}
(phase,) = shared.small.phases
both = replace(phase, steps=250, mixture={"rest": 2 / 3, "book": 1 / 3})
base = replace(shared.small, model=shared.shape(3, 96, vocab=258), phases=(both,),
               data=DataConfig(sources=sources, tokenizer="bytes", dev=0.02, test=0.02),
               evals=(read_before,), eval_every=100, eval_tokens=4_096)
book = replace(both, steps=40, mixture={"book": 1.0},
               schedule=Schedule(shape="constant", peak=8e-4, warmup=0))


def on(**changes):
    """A run that goes on from the base; changes: of its phase."""
    return replace(base, init_from="needs:base", phases=(replace(book, **changes),))


beside = partial(adopt_self, prefix=OWN), partial(adopt, run="needs:reinforced", prefix=MORE)
forgets = on(edits=beside, token_loss=partial(generic, alpha=5.0))
study = Study(
    question="Can a book be forgotten by learning what a model would say without it?",
    paper=Paper(title="Who's Harry Potter? Approximate Unlearning in LLMs",
                authors="Eldan & Russinovich", year=2023, seeds=("002:10",)),
    arms={"plain": on(mixture={"rest": 1.0}),
          "generic": replace(forgets, optimizer=partial(adamw, frozen=(OWN, MORE))),
          "ascent": on(token_loss=ascent),
          "never": replace(base, phases=(replace(both, mixture={"rest": 1.0}),))},
    needs={"base": base, "reinforced": on(steps=80)}, seeds=3,
    measures={"book": "own/book"}, quick=shared.quick(keep=("data.dev", "data.test")),
    claims=(
        Claim(says="generic targets make the book less known", arm="generic", measure="book",
              above=0.05),
        Claim(says="no more known than if it had never been read", arm="generic", control="never",
              measure="book", above=-0.1),
        Claim(says="and no less", arm="generic", control="never", measure="book", below=0.1),
        Claim(says="the rest loses less than by ascent", arm="generic", control="ascent",
              below=0.0),
        Claim(says="and not much", arm="generic", below=0.1),
    ),
)
