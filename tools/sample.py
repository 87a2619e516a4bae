"""Text from a run's checkpoint: continuations of prompts, all of them as one batch.

    python train.py sample RUN --prompt "def main(" --temperature 0.7 --top-p 0.9 --n 3
    python train.py sample RUN --prompts FILE --stop "\\n\\n" --json      a prompt a line, or JSON Lines

Row i of the batch, counted over prompts and --n, draws by the seed --seed + i and each token's number: alone,
with that seed, it gives the same text. On a terminal one continuation appears as it is made. For a model that
does not fit a device: --mesh.data, --mesh.fsdp and --mesh.tensor, of which those not given are the run's own.
"""
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import get_abstract_mesh

import model
import train

CHUNK = 16  # tokens that the devices make between two looks of the host at them
ROOM = 256  # places of a cache that begins to grow


class How(NamedTuple):
    """How a token is drawn; infinity (of top_k, top_p) leaves out none."""

    temperature: float = 1.0  # 0 takes the likeliest
    top_k: float = math.inf  # of so many likeliest tokens
    top_p: float = math.inf  # of the fewest that have this share of what is left (Holtzman et al. 2020)


def prepare(params, config: model.ModelConfig):
    """Parameters as generation reads them, placed by the table's rules: (others, [of each block]).

    In the dtype of the computation, once; each block's apart, as XLA on CPU would copy a slice of the stack
    for each token; and a matrix in parts of its outputs, as there one core alone multiplies a row with a
    matrix, but several cores several of them. The head is [v d], as a tied one is: no need to transpose.
    """
    mesh = get_abstract_mesh()
    cores = min(8, os.cpu_count()) if jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1) else 1

    def placed(x, axes):
        return model.pin(x.astype(config.dtype), *(model.RULES[a] for a in axes))

    def parts(x, axis):
        return jnp.split(x, max(n for n in range(1, cores + 1) if x.shape[axis] % n == 0), axis)

    def parted(x, axes):
        return parts(placed(x, axes), 1 if axes[0] == "embed" else -1) if len(axes) > 1 else placed(x, axes)

    rows = model.table(config)
    others = {n: placed(params[n], rows[n].axes) for n in ("embed", "norm")}
    if not config.tied or cores > 1:  # else the table itself is the head
        head = others["embed"] if config.tied else placed(params["head"].T, ("vocab", "embed"))
        others["head"] = parts(head, 0)
    return others, [{n: parted(x[i], rows[n].axes[1:]) for n, x in model.blocks(params, config).items()}
                    for i in range(config.layers)]


def dense(x, w: list, axes: tuple[str, ...]):
    """`model.dense` by a matrix in parts."""
    return jnp.concatenate([model.dense(x, part, axes) for part in w], 2)


def forward(weights, tokens, positions, attends, config: model.ModelConfig):
    """(final states [b t d] of tokens [b t], [what each block's `attend(q, k, v)` gives besides])."""
    others, layers = weights
    angles, kept = model.rope(positions, config), []
    x = model.pin(model.pin(others["embed"], model.RULES["vocab"], None)[tokens], model.ROWS)
    for w, attend in zip(layers, attends, strict=True):
        x, aux = model.block(x, w, angles, attend, config, dense)
        kept.append(aux)
    return model.rms_norm(x, others["norm"], config.norm_eps), kept


def score(others, states, config: model.ModelConfig):
    """Logits [b v] in float32 or wider, from final states [b d]."""
    wide = jnp.promote_types(config.dtype, jnp.float32)
    heads = [model.pin(part, model.RULES["vocab"]) for part in others.get("head", [others["embed"]])]
    return jnp.concatenate([jnp.einsum("bd,vd->bv", states, part, preferred_element_type=wide)
                            for part in heads], -1)


def place(x):
    """Keys or values [n s h] where rows and heads live; n = b k, if all devices divide that, or heads alone.

    One axis, as XLA on CPU makes one of b and k for its products, and a cache of two shapes would be copied.
    """
    mesh, heads = get_abstract_mesh(), model.RULES["kv_heads"]
    return model.pin(x, heads if mesh.empty or x.shape[0] % mesh.size else (*model.ROWS, heads))


@partial(jax.jit, static_argnames=("size", "config"))
def prefill(weights, tokens, pad, size: int, config: model.ModelConfig):
    """Keys and values [n size h] of each block for tokens [b p], the first `pad` [b] of them padding."""
    (b, p), kv = tokens.shape, config.kv_heads
    index = jnp.arange(p) - pad[:, None]

    def attend(q, k, v):
        out = model.attention(q, k, v, model.Mask("causal", 0), (index >= 0).astype(jnp.int32))
        flat = [x.transpose(0, 2, 1, 3).reshape(b * kv, p, -1) for x in (k, v)]
        return out, [place(jnp.pad(x, ((0, 0), (0, size - p), (0, 0)))) for x in flat]

    return forward(weights, tokens, jnp.maximum(index, 0), [attend] * config.layers, config)[1]


def decode(weights, cache, last, slot, pad, config: model.ModelConfig):
    """(logits [b v] after the ids `last` [b], the cache with these in its place `slot`, one for all rows)."""
    index, wide = jnp.arange(cache[0][0].shape[1]), jnp.promote_types(config.dtype, jnp.float32)
    see = jnp.repeat((index >= pad[:, None]) & (index <= slot), config.kv_heads, 0)[:, None]  # [n 1 s]

    def attend(held, q, k, v):
        keys, values = held = [place(lax.dynamic_update_slice_in_dim(x, new.reshape(len(x), 1, -1), slot, 1))
                               for x, new in zip(held, (k, v), strict=True)]
        own = q.reshape(len(keys), -1, q.shape[-1]) * q.shape[-1]**-0.5  # [n g h]
        scores = jnp.einsum("ngh,nsh->ngs", own, keys, preferred_element_type=wide)
        share = jax.nn.softmax(jnp.where(see, scores, jnp.finfo(wide).min)).astype(values.dtype)
        return jnp.einsum("ngs,nsh->ngh", share, values).reshape(q.shape), held

    states, cache = forward(weights, last[:, None], (slot - pad)[:, None],
                            [partial(attend, held) for held in cache], config)
    return score(weights[0], states[:, 0], config), cache


def narrow(scores, top_k, top_p):
    """Scores [b v], -inf for all but the `top_k` largest, and of these for all but the fewest that have
    `top_p` of their probability; what is as likely as the last of them stays too.
    """
    def least(share, weight, enough):
        """[b 1], the largest x for which the weights where share >= x come to `enough`; 0 if they never do.

        By bisection over the bits of float32, ordered as the numbers are: XLA on CPU is slow to sort.
        """
        bits = lax.bitcast_convert_type(share, jnp.int32)

        def halve(_, ends):
            low, high = ends
            middle = (low + high + 1) // 2
            fits = jnp.sum(jnp.where(bits >= middle, weight, 0), -1, keepdims=True) >= enough
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

        ends = jnp.zeros_like(bits[:, :1]), jnp.full_like(bits[:, :1], 0x3F800000)  # the bits of 0 and 1
        return lax.bitcast_convert_type(lax.fori_loop(0, 30, halve, ends)[0], jnp.float32)

    share = jax.nn.softmax(scores).astype(jnp.float32)
    share = jnp.where(share >= least(share, jnp.ones_like(share), top_k), share, 0)
    share /= jnp.sum(share, -1, keepdims=True)
    return jnp.where((share > 0) & (share >= least(share, share, top_p)), scores, -jnp.inf)


def pick(scores, keys, number, how: How):
    """Ids [b] by logits [b v]; a row's draw is a function of its key (data [b 2]) and the token's number."""
    def draw(scores):
        scores = scores / jnp.maximum(how.temperature, 1e-6)
        few = (how.top_k < scores.shape[1]) | (how.top_p < 1)
        scores = lax.cond(few, partial(narrow, top_k=how.top_k, top_p=how.top_p), lambda x: x, scores)
        own = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys), number)
        return jax.vmap(jax.random.categorical)(own, scores)

    scores = model.pin(scores, model.ROWS, None)
    return lax.cond(how.temperature > 0, draw, lambda x: jnp.argmax(x, -1), scores).astype(jnp.int32)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def extend(weights, cache, last, done, pad, keys, width, made, n, how: How, eos, config: model.ModelConfig):
    """Up to n <= CHUNK more tokens after the ids `last` [b]: (ids [b CHUNK], cache), eos for rows [b] `done`.

    width: places of the cache that prompts take but for `last`; made: how many tokens there were before. The
    cache is carried by a while loop, where XLA writes one place of it; as a scan's output it would be copied.
    """
    def more(carry):
        i, done = carry[0], carry[-1]
        return (i < n) & ~jnp.all(done)

    def step(carry):
        i, out, cache, last, done = carry
        scores, cache = decode(weights, cache, last, width + made + i, pad, config)
        last = jnp.where(done, eos, pick(scores, keys, made + i, how))
        return i + 1, out.at[:, i].set(last), cache, last, done | (last == eos)

    out = jnp.full((len(last), CHUNK), eos, jnp.int32)
    _, out, cache, _, _ = lax.while_loop(more, step, (0, out, cache, last, done))
    return model.pin(out), cache


@partial(jax.jit, static_argnames="size")
def grow(cache, size: int):
    """The cache with room for `size` positions."""
    return jax.tree.map(lambda x: place(jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0)))), cache)


def padded(prompts: list, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [b width + 1] of prompts, as many `fill`s in front as it takes, of how many [b]); width: 2^n."""
    long = max(map(len, prompts))
    width = max(32, 1 << (long - 2).bit_length())
    pad = np.array([width + 1 - len(ids) for ids in prompts], np.int32)
    return np.stack([np.pad(ids, (n, 0), constant_values=fill) for ids, n in zip(prompts, pad, strict=True)]
                    ).astype(np.int32), pad


def generate(weights, prompts: list, tokens: int, seeds: list[int], how: How, eos: int,
             config: model.ModelConfig, heed: Callable | None = None, pace: int = CHUNK) -> np.ndarray:
    """At most `tokens` ids [b, n] after each of `prompts`, lists of one id and more; eos after a row's end.

    seeds: of each row's draws. heed: gets the ids [b, n] so far, each `pace` of them, and gives the rows [b]
    that shall end there. The cache grows by powers of two, since all of it is read for each token.
    """
    ids, pad = padded(prompts, eos)
    width, made, done = ids.shape[1] - 1, 0, np.zeros(len(ids), bool)
    keys = np.stack([jax.random.key_data(jax.random.key(seed)) for seed in seeds])
    size = 1 << (width + min(tokens, max(ROOM - width, CHUNK)) - 1).bit_length()
    cache = prefill(weights, ids[:, :-1], pad, size, config)
    while made < tokens and not done.all():
        n = min(pace, tokens - made)
        if width + made + n > size:
            cache = grow(cache, size := 2 * size)
        out, cache = extend(weights, cache, ids[:, -1], done, pad, keys, np.int32(width), np.int32(made),
                            np.int32(n), how, np.int32(eos), config)
        ids, made = np.concatenate([ids, np.asarray(out)[:, :n]], 1), made + n
        done = (ids[:, -1] == eos) | (heed(ids[:, width + 1:]) if heed else False)
    return ids[:, width + 1:]


def read(ids, tokenizer, stops: list[str]) -> tuple[str, str]:
    """The text of ids up to the first eos or stop string, and what ended it: "eos", "stop" or "length"."""
    ends = np.flatnonzero(ids == tokenizer.eos)
    text = tokenizer.decode(ids[:ends[0]] if len(ends) else ids)
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[:min(found)], "stop") if found else (text, "eos" if len(ends) else "length")


def settled(text: str, stops: list[str]) -> str:
    """What of a text stays, whatever follows: not a cut character or escape, nor what may begin a stop."""
    text = text.rstrip("\ufffd\x10")
    held = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
    return text[:len(text) - max(held, default=0)]


def read_prompts(path: str) -> list[str]:
    """A prompt a line, blank ones aside; of a .jsonl file strings, or objects whose `prompt` it is."""
    try:
        lines = [line for line in Path(path).read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise train.InputError(f"sample: --prompts is {path!r}, which cannot be read ({error})") from None
    if Path(path).suffix != ".jsonl":
        return lines
    prompts = []
    for line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        prompts.append(value.get("prompt") if isinstance(value, dict) else value)
        if not isinstance(prompts[-1], str):
            raise train.InputError(f"sample: --prompts has the line {line[:60]!r}; allowed in a .jsonl file "
                                   'are strings, and objects with a string "prompt"')
    return prompts


def arguments_of(arguments: list[str]):
    """The command line, judged as far as it can be without the run."""
    parser = train.Arguments("sample", __doc__)
    add = parser.add_argument
    add("run", help="run directory")
    add("--prompt", action="append", default=[], help="text to continue; may be repeated")
    add("--prompts", metavar="FILE", help="a prompt a line; .jsonl: strings, or objects with a `prompt`;\n"
        "without --prompt and --prompts the config's")
    add("--n", type=int, default=1, help="continuations of each prompt")
    add("--tokens", type=int, help="how many at most; the config's by default")
    add("--temperature", type=float, help="0: the likeliest token; the config's by default")
    add("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="from the fewest that have this share of the probability")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a continuation; may be repeated")
    add("--seed", type=int, default=0, help="of the first row's draws; of the next, one more")
    add("--step", type=int, help="checkpoint; the newest by default")
    add("--stream", action="store_true", help="show one continuation as it comes; on a terminal it does")
    add("--json", action="store_true", help="print a JSON object a continuation: prompt, text, seed, ended")
    for axis in ("data", "fsdp", "tensor"):
        add(f"--mesh.{axis}", dest=axis, type=int, help="devices on that axis; without these, one device")
    a = parser.parse_args(arguments)
    a.prompt += read_prompts(a.prompts) if a.prompts is not None else []
    heat = a.temperature
    limits = [("--n", a.n, a.n >= 1, "1 and more"), ("--top-k", a.top_k, a.top_k >= 0, "0 and more"),
              ("--tokens", a.tokens, a.tokens is None or a.tokens >= 1, "1 and more"),
              ("--temperature", heat, heat is None or 0 <= heat < math.inf, "0 and more"),
              ("--top-p", a.top_p, 0 < a.top_p <= 1, "above 0 and at most 1"),
              ("--stop", "empty", all(a.stop), "text"),
              ("--prompts", "without a prompt", a.prompts is None or a.prompt, "one and more")]
    for flag, given, fine, allowed in limits:
        if not fine:
            parser.error(f"{flag} is {given}; allowed is {allowed}")
    return a, parser


def main(arguments: list[str]) -> str:
    """Command line; gives the text that it prints (with --json, would print without)."""
    a, parser = arguments_of(arguments)
    step = train.find(a.run, a.step)[1]
    mesh = {axis: n for axis in ("data", "fsdp", "tensor") if (n := getattr(a, axis)) is not None}
    with train.blame():
        params, config, tokenizer, _ = train.load(a.run, step, mesh or None)
    tokens = config.sample_tokens if a.tokens is None else a.tokens
    temperature = config.sample_temperature if a.temperature is None else a.temperature
    how = How(*map(np.float32, (temperature, a.top_k or math.inf, a.top_p if a.top_p < 1 else math.inf)))
    texts = [prompt for prompt in (a.prompt or config.prompts) for _ in range(a.n)]
    if not texts:
        print(f"the config of {a.run} has no prompts")
        return ""
    alone = len(texts) == 1 and not a.json and jax.process_count() == 1  # processes must go at one pace
    stream = a.stream or (alone and sys.stdout.isatty())
    if stream and not alone:
        parser.error(f"--stream is given for {len(texts)} continuations{' and --json' * a.json} in "
                     f"{jax.process_count()} processes; allowed is one, as text, in one")
    if not a.json:
        print(f"sample of {a.run}, temperature {temperature}:", flush=True)
    prompts, shown = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts], ""

    def show(text):
        nonlocal shown
        print(text[len(shown):], end="", flush=True)
        shown = text

    def heed(made):
        found = [read(row, tokenizer, a.stop) for row in made]
        if stream:
            show(texts[0] + settled(found[0][0], a.stop))
        return np.array([why == "stop" for _, why in found])

    if stream:
        show(texts[0])
    with jax.set_mesh(params["embed"].sharding.mesh):
        used = jax.jit(lambda params, ids: prepare(
            model.effective(config.weights, params, step, dict(tokens=ids)), config.model))
        weights = used(params, padded(prompts, tokenizer.eos)[0])
        del params
        made = generate(weights, prompts, tokens, [a.seed + i for i in range(len(texts))], how, tokenizer.eos,
                        config.model, heed if stream or a.stop else None, 1 if stream else CHUNK)
    found = [read(row, tokenizer, a.stop) for row in made]
    text = "\n\n----\n\n".join(prompt + own for prompt, (own, _) in zip(texts, found, strict=True)) + "\n"
    if a.json:
        for i, (prompt, (own, why)) in enumerate(zip(texts, found, strict=True)):
            print(json.dumps(dict(prompt=prompt, text=own, seed=a.seed + i, ended=why)), flush=True)
    else:
        show(text)
        print(flush=True)
    return text
