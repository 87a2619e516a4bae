"""Re-warming: how should the learning rate begin when a model goes on with other text?

Paper: Continual Pre-Training of Large Language Models: How to (re)warm your model?, Gupta et al.
    2023 (003:41); Simple and Scalable Strategies to Continually Pre-train Large Language Models,
    Ibrahim et al. 2024 (002:13)
Method: the rate that a decayed run ended with is warmed up again, linearly, and decays again along
    a cosine over the new text. A share of each batch is old text, read from its beginning
    (replay). The papers find: a higher peak adapts better and forgets more; how long the warm-up
    takes does not matter; a few per cent of replay keep much; all three together match training on
    both texts from scratch.
Here: from functions and classes of Python's library (old) to the same text in another alphabet
    (new), a strong shift, for as many steps again. Adam's moments begin at 0. low: the rate stays
    where the base ended, the control. rewarm: back to the base's peak. half, double: to half of it,
    and twice. cold: no warm-up. undecayed: from the base before its decay, after 120 of its 200
    steps. replay_5, replay_25: with 5 % or 25 % of old rows. union: both texts from scratch, for
    the steps of both runs. Rates are what the study is about, so they are not tuned. "old" and
    "new" are bits per byte on test. Frequencies of bytes alone cost 4.4, and a uniform guess 8.
    Without replay "old" ends between 6 and 10. So these arms keep nothing of the old text, and
    differ in how surely they are wrong.
Cost: nine arms and two bases, 33 runs of half a minute, 14 minutes on two CPU cores.
Run:
    python train.py study configs/continual/rewarm.py --jobs 2
    python train.py configs/continual/rewarm.py:base                the run that arms start from
"""
from dataclasses import replace
from functools import partial

from configs import base as shared
from configs.forgetting.active_forgetting import permuted
from data import DataConfig, Source, stdlib
from lib.study import Claim, Paper, Study
from train import Config, Phase, Schedule

PEAK, FINAL, STEPS = 8e-3, 0.1, 200
sources = {"old": Source(partial(stdlib, unit="definition")),
           "new": Source(partial(permuted, seed=0))}
first = Phase(steps=STEPS, batch=8, seq=128, mixture={"old": 1.0})
wsd = Schedule(shape="wsd", peak=PEAK, warmup=20, decay=0.4, final=FINAL)
cosine = replace(wsd, shape="cosine")
base = Config(model=shared.shape(3, 96, vocab=258), phases=(first,), schedule=wsd,
              data=DataConfig(sources=sources, tokenizer="bytes", dev=0.01, test=0.005),
              overlap=16, eval_every=50, eval_tokens=4_096, save_every=10_000, keep=1)
stable = replace(base, phases=(replace(first, steps=120),),
                 schedule=replace(wsd, shape="constant"))  # the base as it was before its decay


def continued(schedule: Schedule = cosine, replay: float = 0.0, start: str = "needs:base",
              **changes) -> Config:
    """A run that goes on from another one with new text, and a share of old text. changes: of its
    phase.
    """
    later = replace(first, mixture={"old": replay, "new": 1 - replay}, **changes)
    return replace(base, init_from=start, phases=(later,), schedule=schedule)


def starts() -> dict[str, Config]:
    """The arms."""
    both = replace(first, steps=2 * STEPS, mixture={"old": 0.5, "new": 0.5})
    return {
        "low": continued(replace(cosine, shape="constant", peak=FINAL * PEAK, warmup=0)),
        "rewarm": continued(),
        "half": continued(replace(cosine, peak=PEAK / 2)),
        "double": continued(replace(cosine, peak=2 * PEAK)),
        "cold": continued(replace(cosine, warmup=0)),
        "undecayed": continued(start="needs:stable"),
        "replay_5": continued(replay=0.05),
        "replay_25": continued(replay=0.25),
        "union": replace(base, phases=(both,), schedule=cosine),
    }


new, old = partial(Claim, measure="new"), partial(Claim, measure="old")
study = Study(
    question="How should the learning rate begin when a model goes on with other text?",
    paper=(Paper(title="Continual Pre-Training of Large Language Models: How to (re)warm your "
                 "model?", authors="Gupta et al.", year=2023, seeds=("003:41",)),
           Paper(title="Simple and Scalable Strategies to Continually Pre-train Large Language "
                 "Models", authors="Ibrahim et al.", year=2024, seeds=("002:13",))),
    arms=starts(), needs={"base": base, "stable": stable}, seeds=3,
    measures={name: f"eval/{name}.test/bpb" for name in sources},
    quick=shared.quick(keep=("data.test",)),
    claims=(
        new(says="re-warmed, the new text is learnt better", arm="rewarm", below=0.0),
        old(says="and more of the old text is forgotten", arm="rewarm", above=0.0),
        new(says="a higher peak adapts better than half of it", arm="rewarm", control="half",
            below=0.0),
        old(says="twice the peak forgets more", arm="double", control="rewarm", above=0.0),
        new(says="without a warm-up it is no better by 0.03", arm="cold", control="rewarm",
            above=-0.03),
        new(says="nor worse", arm="cold", control="rewarm", below=0.03),
        old(says="5 % of replay keep some of the old text", arm="replay_5", control="rewarm",
            below=0.0),
        old(says="25 % keep more", arm="replay_25", control="replay_5", below=0.0),
        new(says="and cost less than 0.1 of the new", arm="replay_25", control="rewarm",
            below=0.1),
        Claim(says="re-warming, re-decay and replay are at most 0.1 behind training on both",
              arm="replay_25", control="union", below=0.1),
    ),
)
