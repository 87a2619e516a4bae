"""MiniLM: are the relations of a teacher's last attention a better lesson than its logits?

Paper: MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
    Transformers, Wang et al. 2020 (000:45)
Method: a small model learns by nothing but two divergences from a large one: of the attention of
    each head of the last block, and of the relations there of values to values, which are softmax
    of v.v/sqrt(head_dim). So widths and depths may differ, the number of heads may not.
Here: a teacher of 4 layers 192 wide, students of 2 layers 96 wide, all with 6 heads. For 200 steps
    a student learns by relations (minilm), the teacher's logits (logits) or the text (plain), then
    for 100 steps by the text alone. The rate falls by tokens, so it is the same in all arms. Head,
    last MLP and last output of attention learn nothing by relations, so only in these 100 steps.
    Arms have equal steps, and the teacher's FLOPs come on top: eight times plain's in all. Left
    out: an assistant between teacher and student, and tasks.
Cost: 12 runs, of which 3 of a minute are made first, 5 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/minilm.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from configs import base
from lib.kernels import Mask, allowed
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from lib.teacher import adopt, divergence, release
from model import embedded, plain_attend, rms_norm, stream


def relation(a, b, mask: Mask, segments):
    """Log softmax [b t k g s] of the products of a [b t k g h] and b [b s k h] that are seen."""
    place = jnp.arange(a.shape[1])
    seen = allowed(mask, place, place, segments, segments)[:, :, None, None]
    scores = jnp.einsum("btkgh,bskh->btkgs", a, b) * a.shape[-1]**-0.5
    return jax.nn.log_softmax(jnp.where(seen, scores.astype(jnp.float32), -1e9))


def with_relations(params, batch, mask, config):
    """The plain states, and log relations [b t 2 heads s] of the last block: q to k, and v to v."""
    plain, last = plain_attend(batch, mask, config), config.layers - 1
    x, _ = stream(params, embedded(params, batch, config), batch, mask, config, last=last)
    x, (kept, _) = stream(params, x, batch, mask, config, first=last,
                          attend=lambda q, k, v: (plain(q, k, v)[0], (q, k, v)))
    q, k, v = (each[0] for each in kept)
    both = [relation(q, k, mask, batch["segments"]),
            relation(v[:, :, :, None], v, mask, batch["segments"])]
    heads = [jnp.broadcast_to(each, both[0].shape) for each in both]
    found = jnp.stack(heads, 2).reshape(*x.shape[:2], 2, config.heads, -1)
    return rms_norm(x, params["norm"], config.norm_eps), {"relations": found}


def minilm(logits, batch, extras):
    """A `token_loss`: KL(teacher || student) of both relations, the mean over heads."""
    theirs, ours = extras["teacher/relations"], extras["relations"]
    nats = jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)
    return jnp.sum(jnp.mean(nats, -1), -1)


def shape(layers: int, embed: int):
    """A model with 6 heads, which gives the relations of its last block."""
    plain = base.shape(layers, embed)
    return replace(plain, heads=6, kv_heads=6, head_dim=embed // 6, forward=with_relations)


(phase,) = base.small.phases
teacher = replace(base.small, model=shape(4, 192), eval_every=300, prompts=())
frozen = partial(adamw, frozen=("teacher",))
plain = replace(teacher, model=shape(2, 96), optimizer=frozen,
                schedule=replace(teacher.schedule, budget="tokens"),
                phases=(replace(phase, steps=200), replace(phase, steps=100)))


def taught(token_loss):
    """A run that learns from the teacher by this loss, then without it."""
    edit = partial(adopt, run="needs:teacher")
    first, second = plain.phases
    return replace(plain, data=replace(plain.data, tokenizer="needs:teacher/tokenizer.model"),
                   phases=(replace(first, edits=(edit,), token_loss=token_loss),
                           replace(second, edits=(release,))))


study = Study(
    question="Are the relations of a teacher's last attention a better lesson than its logits?",
    paper=Paper(title="MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of "
                "Pre-Trained Transformers", authors="Wang et al.", year=2020, seeds=("000:45",)),
    needs={"teacher": teacher},
    arms={"plain": plain, "logits": taught(divergence), "minilm": taught(minilm)},
    quick=base.quick({"model.embed": 48}),
    claims=(
        Claim(says="a lesson of logits is better than the text alone", arm="logits", below=0.0),
        Claim(says="so is one of relations", arm="minilm", below=0.0),
        Claim(says="and better than one of logits", arm="minilm", control="logits", below=0.0),
    ), seeds=3)
