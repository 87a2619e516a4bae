"""Continuations: texts that a run's model makes of prompts, by lib/generate.py."""
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from lib.errors import InputError
from lib.generate import CHUNK, Sampling, generate, padded, prepare, sampling
from lib.plain import predicts_pieces
from lib.teacher import alone
from model import ModelConfig, reparametrised, whole


class Continuation(NamedTuple):
    """A prompt, and what the model made of it."""

    prompt: str
    text: str  # after the prompt
    ended: str  # by "eos", "stop" or "length"


def read_text(ids, tokenizer, stops: Sequence[str]) -> tuple[str, str]:
    """The text of ids up to the first eos or stop, and what ended it: "eos", "stop" or "length"."""
    ends = np.flatnonzero(ids == tokenizer.eos)
    ended = "length"
    if len(ends):
        ids = ids[:ends[0]]
        ended = "eos"
    text = tokenizer.decode(ids)
    places = [text.find(stop) for stop in stops]
    found = [place for place in places if place >= 0]
    if found:
        return text[:min(found)], "stop"
    return text, ended


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of a text that stays, whatever follows; a cut character or stop may change."""
    text = text.rstrip("\ufffd\x10")  # a cut character, a cut escape
    held = 0
    for stop in stops:
        for n in range(len(stop)):
            if text.endswith(stop[:n]):
                held = max(held, n)
    return text[:len(text) - held]


@partial(jax.jit, static_argnames=("reparam", "config"))
def prepare_for(params, step, tokens, reparam: Callable | None, config: ModelConfig):
    """`prepare` of what a config's own `reparam` makes of parameters, for tokens [b t]."""
    used = reparametrised(reparam, params, step, whole(tokens), config)
    return prepare(used, config)


def prompt_ids(prompt: str | Sequence[int], tokenizer) -> list[int]:
    """The ids that a prompt begins with: bos and a text's, or those that it says itself."""
    if isinstance(prompt, str):
        return [tokenizer.bos, *tokenizer.encode(prompt)]
    if not len(prompt):
        raise InputError("a prompt has no ids; allowed are one and more, such as tokenizer.bos")
    return [int(i) for i in prompt]


def continue_prompts(
    params,
    config,
    tokenizer,
    step: int,
    prompts: Sequence[str | Sequence[int]],
    how: Sampling,
    tokens: int,
    seed: int = 0,
    stops: Sequence[str] = (),
    watch: Callable[[str], None] | None = None,
) -> list[Continuation]:
    """What the model, without its teachers, makes of prompts, all of them as one batch.

    config: a `train.Config`. step: steps that made the parameters. prompts: texts, which bos is put
    in front of, or ids as they are. tokens: of a continuation at most. seed: of the first row's
    draws; each further row has one more. stops: texts before which a continuation ends. watch: told
    after each token what is certain of the first text. A caller that hands over its only reference
    to `params` has them freed early.
    """
    config = replace(config, model=alone(config.model))
    check_predicts_text(config)
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    eos = tokenizer.eos
    read = partial(read_text, tokenizer=tokenizer, stops=stops)

    def heed(made):
        if watch:
            watch(prompts[0] + settled(read(made[0])[0], stops))
        return np.array([read(row)[1] == "stop" for row in made])

    with jax.set_mesh(next(iter(params.values())).sharding.mesh):
        weights = prepare_for(params, step, padded(ids, eos)[0], config.reparam, config.model)
        del params
        looks = heed if watch or stops else None
        pace = 1 if watch else CHUNK
        seeds = range(seed, seed + len(ids))
        made = generate(weights, ids, tokens, seeds, how, eos, config.model, looks, pace)
    pairs = zip(prompts, made, strict=True)
    return [Continuation(prompt, *read(row)) for prompt, row in pairs]


def predicts_text(config) -> bool:
    """Whether a `train.Config`'s model predicts pieces, see `predicts_pieces`."""
    return predicts_pieces(config.reparam, config.model, config.phases[-1].seq)


def check_predicts_text(config):
    """Raise InputError for a model that cannot be sampled."""
    if not predicts_text(config):
        raise InputError(
            "model.outputs gives no logits over the tokenizer's pieces for rows of tokens alone, "
            "so that nothing can be sampled; allowed is a model that does"
        )


def as_text(found: list[Continuation]) -> str:
    """Continuations for people to read, as samples.txt holds them; empty for none."""
    if not found:
        return ""
    return "\n\n----\n\n".join(one.prompt + one.text for one in found) + "\n"


def continuations(params, config, tokenizer, step: int, prompts: Sequence[str]) -> str:
    """Prompts, each with what the model makes of it: what `python train.py sample RUN` prints.

    By the config's sample_tokens and sample_temperature; see `continue_prompts`. Empty for a model
    that predicts no pieces.
    """
    if not prompts or not predicts_text(config):
        return ""
    how = sampling(config.sample_temperature)
    tokens = config.sample_tokens
    found = continue_prompts(params, config, tokenizer, step, prompts, how, tokens)
    return as_text(found)
