"""LoQT: can a model be trained whose matrices are stored in 4 bits throughout?

Paper: LoQT: Low Rank Adapters for Quantized Training, Loeschcke et al. 2024 (001:146)
Method: W = Q + alpha P B. Q is stored in 4 bits (NF4, blocks of 64), and so is P, the first r
    singular vectors of the gradient on the smaller side; B alone trains. After growing gaps, merge
    alpha P B into W, take P from the gradient there, and share W between Q and B: B takes what of
    the quantisation's error lies in P, Q what B leaves, in turn; the best pair stays.
Here: after one whole step, as most gradients are 0 before; merges 20, 40, 80 and 160 steps later; r
    24 of 96, five turns, alpha 0.5. P is of one batch's gradient and moments are kept, as in the
    paper's code. AdamW is not in 8 bits, W is whole while a step runs. no_feedback: B begins at
    zero, merges lose the error. once: no merge after the first. Embeddings, gains, head are whole.
Cost: twelve runs of 200 steps, twenty seconds each: four minutes on two CPU cores.
Run:
    python train.py study configs/parameters/loqt.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from configs import base
from configs.parameters.qlora import quantised, restored, stored, weight_bytes
from lib.edits import per_layer
from lib.kernels import Mask
from lib.lora import unfrozen
from lib.matrices import flat, matrices, sides, smaller_first
from lib.study import Claim, Paper, Study
from model import Edited, Model, Param, count, losses
from train import Edit


def loqt_rows(config, rows: dict[str, Param], rank: int) -> dict[str, Param]:
    """A `rows`: in place of each matrix 4 bits of Q and of P, and B, which trains."""
    made = {name: row for name, row in rows.items() if name not in matrices(config)}
    for name, row in matrices(config).items():
        small, large = sorted(sides(row))
        made |= stored(f"{name}/q", config.layers, small * large)
        made |= stored(f"{name}/p", config.layers, small * rank)
        made[f"{name}/b"] = Param(("layers", "rank", "out"), (config.layers, rank, large), 0.0)
    return made


def dequantised(params: dict, step, batch, config, alpha: float = 0.5) -> dict:
    """A `reparam`: W = Q + alpha P B; a model without codes stays as it is."""
    used = {name: x for name, x in params.items() if "/" not in name}
    for name, row in matrices(config).items():
        if f"{name}/q" in params:
            b, size = params[f"{name}/b"], (config.layers, min(sides(row)))
            q, p = (restored(params[f"{name}/{end}"], params[f"{name}/{end}_scale"], (*size, last))
                    for end, last in (("q", b.shape[2]), ("p", b.shape[1])))
            used[name] = smaller_first(q + alpha * p @ b, row).reshape(row.shape)
    return used


def share(w, p, alpha: float, turns: int):
    """(codes, scales, B) with Q + alpha P B near w [l small large]; no turns: B is zero."""
    left, best, inverse = w, None, jnp.linalg.pinv(p)
    for _ in range(max(1, turns)):
        codes, scales = quantised(left)
        b = inverse @ (w - restored(codes, scales, w.shape)) / alpha
        left = w - alpha * p @ b
        error = jnp.sum((left - restored(codes, scales, w.shape)) ** 2, (1, 2), keepdims=True)
        now = codes, scales, b if turns else jnp.zeros_like(b), error
        if best:
            better = (error < best[3])[:, 0, 0]
            now = [jnp.where(per_layer(better, x), x, y) for x, y in zip(now, best, strict=True)]
        best = now
    return best[:3]


def merge(model, context, rank: int = 24, alpha: float = 0.5, turns: int = 5, every: int = 1):
    """An edit: merge, P from the gradient, W shared; after `every` steps times 1, 2, 4, 8, ..."""
    first, intervals = model.config.rows is None, context.step // every
    if not first and intervals & (intervals - 1):
        return Edited(model, {}, preserves=True)
    plain = replace(model.config, rows=None)
    whole, (batch,) = dequantised(model.params, 0, {}, plain, alpha), context.batches(1)

    def loss(some):
        return jnp.sum(losses(whole | some, batch, Mask("causal", 0), plain) * batch["weights"])

    rows = matrices(plain)
    gradients = jax.jit(jax.grad(loss))({name: whole[name] for name in rows})
    params = {name: x for name, x in model.params.items() if "/" not in name and name not in rows}
    for name, row in rows.items():
        g, w = (smaller_first(flat(x[name], row), row) for x in (gradients, whole))
        p = jnp.linalg.svd(g, full_matrices=False)[0][..., :rank]
        params[f"{name}/p"], params[f"{name}/p_scale"] = held = quantised(p)
        made = share(w, restored(*held, p.shape), alpha, turns)
        params |= zip((f"{name}/q", f"{name}/q_scale", f"{name}/b"), made, strict=True)
    new = Model(replace(plain, rows=partial(loqt_rows, rank=rank)), params)
    return Edited(new, {"matrix": "reset"} if first else {}, preserves=False)


def arm(edit, again: bool = True):
    """A run of LoQT that quantises, and merges again after growing gaps."""
    repeat = (Edit(partial(edit, every=20), every=20, forgets=False),) if again else ()
    rest = replace(full.phases[0], steps=199, edits=(edit,), repeat=repeat)
    return replace(full, reparam=dequantised, optimizer=unfrozen, evals=(weight_bytes,),
                   phases=(replace(full.phases[0], steps=1), rest))


full = base.scaled(replace(base.small, model=base.shape(3, 96, 512), eval_every=50), 200)
study = Study(
    question="Can a model be trained whose matrices are stored in 4 bits throughout?",
    paper=Paper(title="LoQT: Low Rank Adapters for Quantized Training",
                authors="Loeschcke et al.", year=2024, seeds=("001:146",)),
    arms={"full": full, "loqt": arm(merge), "no_feedback": arm(partial(merge, turns=0)),
          "once": arm(merge, again=False)},
    peak_lrs=(8e-3, 1.6e-2), quick=base.quick(), measures={"bytes": "model/opt_bytes"}, seeds=3,
    claims=(
        Claim(says="LoQT is behind full training", arm="loqt", above=0.0),
        Claim(says="by less than a tenth of a bit", arm="loqt", below=0.1),
        Claim(says="and is stored in less than three fifths of its bytes", arm="loqt", control=None,
              measure="stored/bytes", below=0.6 * 4 * count(full.model)),
        Claim(says="merging in turn beats one merge", arm="loqt", control="once", below=0.0),
        Claim(says="feedback beats losing the error", arm="loqt", control="no_feedback", below=0.0),
    ),
)
