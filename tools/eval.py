"""Held-out bits per byte of a checkpoint, beside gzip and xz; minimal pairs, tasks; writes RUN/eval.json.

    python train.py eval RUN --blimp DIR --tasks quiz.jsonl more/

The evaluations during a run use `measure` from here as well, and a config can have its `evals` do the rest:
`evals=(partial(tasks, path="quiz.jsonl"), partial(blimp, path="blimp/"))`.

A task is a file of lines {"context": text, "choices": [texts], "answer": index or text} or {"context": text,
"completion": text}; "query" and "prompt" are other names of the context, "gold" of the answer. Metrics are
`task/<file>/<metric>`, each with its standard error `_se`:

    acc         the likeliest choice is the answer
    acc_norm    so too, of log-likelihoods divided by the choice's characters; acc_bytes: by its UTF-8 bytes
    exact       the completion is what one gets by taking the likeliest piece each time
    loglikelihood, perplexity, bpb    of the completion, in nats, exp of their mean's negative, bits per byte

All of that is as lm-evaluation-harness 0.4.13 has it, so that an exported model gets the same scores there: a
choice comes after its context and a `--delimiter` (a space there too), which is none of its characters; a
completion comes as it is; neither is followed by the document's end; bos comes first. The context and all of
it are encoded, without the context's last spaces, and of the latter the pieces beyond the number of the
former are the continuation. Contexts are cut on the left to what a row of the last phase holds. Minimal
pairs are sentences alone after bos (the harness puts its delimiter in front, a space that was not there).
"""
import json
import math
from functools import partial
from pathlib import Path

import jax

from lib.arguments import Arguments
from lib.checkpoint import find_checkpoint
from lib.disk import write
from lib.evaluate import evaluators, mesh_here, own_evals, sharded_apply, test_split
from lib.processes import is_main_process
from lib.sharding import shardings
from lib.tasks import json_lines, minimal_pairs, tasks
from model import table
from train import load


def show(found: dict[str, float]):
    """Print figures, a line each, with their intervals or standard errors."""
    for name, value in found.items():
        if f"{name}_low" in found:
            print(f"{name}: {value:.3f} [{found[f'{name}_low']:.3f}, {found[f'{name}_high']:.3f}]")
        elif not name.endswith(("_se", "_low", "_high")):
            error = f" +- {found[f'{name}_se']:.2g}" if f"{name}_se" in found else ""
            print(f"{name}: {value:.4g}{error}")


def main(arguments: list[str]) -> dict:
    """Command line; gives what eval.json holds."""
    parser = Arguments("eval", __doc__)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--blimp", help="directory of BLiMP paradigms, a .jsonl file each")
    parser.add_argument("--tasks", nargs="+", action="extend", default=[], help=".jsonl files, directories")
    parser.add_argument("--delimiter", default=" ", help="between a context and a choice; a space by default")
    parser.add_argument("--step", type=int, help="checkpoint; the newest by default")
    a = parser.parse_args(arguments)
    found = [json_lines(path) for path in [*a.tasks, a.blimp] if path]  # what is wrong there is said at once
    names = [name for files in found[:len(a.tasks)] for name in files]
    if len(set(names)) < len(names):
        parser.error(f"--tasks has files {', '.join(names)}; allowed are names that differ")
    step = find_checkpoint(a.run, a.step)[1]
    params, config, tokenizer, _ = load(a.run, step)
    mesh = params["embed"].sharding.mesh if jax.process_count() > 1 else mesh_here(config)
    params = jax.device_put(params, shardings(table(config.model), mesh))
    losses, scores = evaluators(config, config.model, mesh)
    result = test_split(config, tokenizer, partial(losses, params, step), mesh) if config.data.test else {}
    apply = sharded_apply(scores, step, mesh)
    found = own_evals(config, tokenizer, params, apply)
    found |= minimal_pairs(params, apply, tokenizer, a.blimp) if a.blimp else {}
    for path in a.tasks:
        found |= tasks(params, apply, tokenizer, config, path, a.delimiter)
    show(found)
    result |= found
    if is_main_process():
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        write(Path(a.run) / "eval.json", json.dumps(finite, indent=1))
    return result
