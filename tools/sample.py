"""Text from a run's checkpoint: continuations of prompts, all of them as one batch.

    python train.py sample RUN --prompt "def main(" --temperature 0.7 --top-p 0.9 --n 3
    python train.py sample RUN --prompts FILE --stop "\\n\\n" --json      a prompt a line, or JSON Lines

Row i of the batch, counted over prompts and --n, draws by the seed --seed + i and each token's number: alone,
with that seed, it gives the same text. On a terminal one continuation appears as it is made. For a model that
does not fit a device: --mesh.data, --mesh.fsdp and --mesh.tensor, of which those not given are the run's own.
"""
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np

from lib.arguments import Arguments
from lib.checkpoint import find_checkpoint
from lib.errors import InputError, user_errors
from lib.generate import CHUNK, Sampling, generate, padded, prepare, read_text, settled
from model import reparametrised
from train import load


def read_prompts(path: str) -> list[str]:
    """A prompt a line, blank ones aside; of a .jsonl file strings, or objects whose `prompt` it is."""
    try:
        lines = [line for line in Path(path).read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sample: --prompts is {path!r}, which cannot be read ({error})") from None
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
            raise InputError(f"sample: --prompts has the line {line[:60]!r}; allowed in a .jsonl file "
                                   'are strings, and objects with a string "prompt"')
    return prompts


def arguments_of(arguments: list[str]):
    """The command line, judged as far as it can be without the run."""
    parser = Arguments("sample", __doc__)
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
    step = find_checkpoint(a.run, a.step)[1]
    mesh = {axis: n for axis in ("data", "fsdp", "tensor") if (n := getattr(a, axis)) is not None}
    with user_errors():
        params, config, tokenizer, _ = load(a.run, step, mesh or None)
    tokens = config.sample_tokens if a.tokens is None else a.tokens
    temperature = config.sample_temperature if a.temperature is None else a.temperature
    how = Sampling(*map(np.float32, (temperature, a.top_k or math.inf, a.top_p if a.top_p < 1 else math.inf)))
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
        found = [read_text(row, tokenizer, a.stop) for row in made]
        if stream:
            show(texts[0] + settled(found[0][0], a.stop))
        return np.array([why == "stop" for _, why in found])

    if stream:
        show(texts[0])
    with jax.set_mesh(params["embed"].sharding.mesh):
        used = jax.jit(lambda params, ids: prepare(
            reparametrised(config.reparam, params, step, dict(tokens=ids)), config.model))
        weights = used(params, padded(prompts, tokenizer.eos)[0])
        del params
        made = generate(weights, prompts, tokens, [a.seed + i for i in range(len(texts))], how, tokenizer.eos,
                        config.model, heed if stream or a.stop else None, 1 if stream else CHUNK)
    found = [read_text(row, tokenizer, a.stop) for row in made]
    text = "\n\n----\n\n".join(prompt + own for prompt, (own, _) in zip(texts, found, strict=True)) + "\n"
    if a.json:
        for i, (prompt, (own, why)) in enumerate(zip(texts, found, strict=True)):
            print(json.dumps(dict(prompt=prompt, text=own, seed=a.seed + i, ended=why)), flush=True)
    else:
        show(text)
        print(flush=True)
    return text
