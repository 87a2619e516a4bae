"""DrBERT: does a decoder that is thrown away make a better encoder of masked states?

Paper: DrBERT: Unveiling the Potential of Masked Language Modeling Decoder in BERT pretraining,
    Liang & Liang 2024 (000:49)
Method: in pre-training alone, a few blocks stand on the encoder and predict what is masked; they
    are told once more where that is. For a task the encoder is kept without them, so that it costs
    what it did.
Here: masked language modelling of the bytes of eight packages of Python's library; then 200 steps
    of prose.py, whose nats on held-out modules are `nats`. plain: an encoder of 3 blocks. decoder:
    3 and one more, whose input at masked places is the encoder's state plus the embedding of the
    mask, and which is dropped for the task. kept: 4 blocks, kept: what the decoder's parameters
    would do as an encoder. Equal steps; `flops` say what the block cost. The seeds of an arm are
    0.13 to 0.19 nats apart, more than the arms are, so three do not tell the arms apart.
Cost: 9 runs of half a minute, 5 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/drbert.py --jobs 2
"""
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from configs import base
from configs.objectives.prose import MEASURES, config, fine
from configs.objectives.prose import pre as first
from lib.edits import stack
from lib.objectives import BIDIRECTIONAL, choose, hide
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, embedded, llama, rms_norm, stream


def masked_here(row: dict, rng, tokenizer, share: float = 0.15):
    """An objective: predict a share of the tokens.

    `mark` [seq] is the piece that stands for what is hidden where it is so, else -1.
    """
    chosen = choose(row["weights"] > 0, share, rng)
    row = hide(row, chosen, rng, tokenizer)
    mark = np.where(chosen, tokenizer.bos, -1).astype(np.int32)
    return row | {"mark": mark}, BIDIRECTIONAL


masked_here.masks = (BIDIRECTIONAL,)


def with_decoder(params, batch, mask, config, decoder: int = 1):
    """The states of an encoder, then of a decoder of the last so many blocks.

    Where `mark` [b t] is a piece, the decoder's input is the encoder's state plus its embedding. A
    batch without marks hides nothing.
    """
    first = config.layers - decoder
    x, _ = stream(params, embedded(params, batch, config), batch, mask, config, last=first)
    mark = batch.get("mark", jnp.full_like(batch["tokens"], -1))
    told = params["embed"][jnp.maximum(mark, 0)].astype(x.dtype)
    x, _ = stream(params, x + jnp.where(mark[..., None] >= 0, told, 0), batch, mask, config, first)
    return rms_norm(x, params["norm"], config.norm_eps)


def drop_decoder(model: Model, context: Context, decoder: int = 1) -> Edited:
    """Keep the encoder, and its optimiser's moments."""
    kept = tuple(range(model.config.layers - decoder))
    edited = stack(model, context, layers=kept, moments="map")
    config = replace(edited.model.config, forward=llama)
    return edited._replace(model=Model(config, edited.model.params), preserves=False)


pre = replace(first, objective=masked_here)
plain = replace(config, phases=(pre, fine))
deep = replace(config.model, layers=4)
decoder = replace(plain, model=replace(deep, forward=with_decoder),
                  phases=(pre, replace(fine, edits=(drop_decoder,))))
study = Study(
    question="Does a decoder that is thrown away make a better encoder?",
    paper=Paper(title="DrBERT: Unveiling the Potential of Masked Language Modeling Decoder in BERT "
                "pretraining", authors="Liang & Liang", year=2024, seeds=("000:49",)),
    arms={"plain": plain, "decoder": decoder, "kept": replace(plain, model=deep)},
    measures=MEASURES,
    quick=base.quick(keep=("data.dev", "data.test")),
    claims=(
        Claim(says="an encoder whose decoder was dropped is better", arm="decoder", measure="nats",
              below=0.0),
        Claim(says="and as good as a deeper one within 0.02 nats", arm="decoder", control="kept",
              measure="nats", below=0.02),
    ), seeds=3)
