"""Held-out bits per byte of a checkpoint, beside gzip and xz; other text, pairs, tasks, CORE.

    python train.py eval RUN --blimp DIR --tasks quiz.jsonl more/ --core DIR --most 500
    python train.py eval RUN --data FILE DIR ...

All figures are written to RUN/eval.json.

`--data` measures any text as held-out text is measured. What a path holds is read by the end of its
name, see lib/any_text.py. Figures are `text/<name>/<figure>`; those of gzip and xz are
of the same documents.

A config can have the same tasks measured while it trains, by functions of lib/tasks.py and
lib/core_tasks.py: `evals=(partial(tasks, path="quiz.jsonl"), partial(core, path="DIR", most=50))`.

A line of a task is {"context": text, "choices": [texts], "answer": index or text}, or {"context": text,
"completion": text}. "query" and "prompt" are other names of the context, "gold" of the answer. Metrics
are `task/<file>/<metric>`, each with its standard error under the same name and `_se`:

    acc             the likeliest choice is the answer
    acc_norm        the same, with log-likelihoods divided by the number of the choice's characters
    acc_bytes       the same, divided by the number of its UTF-8 bytes
    exact           taking the likeliest piece each time gives the completion
    loglikelihood   of the completion, in nats
    perplexity      exp of the mean of that, negated
    bpb             bits per byte of the completion

Scores are those that lm-evaluation-harness 0.4.13 gives the exported model:

- bos comes first. A choice follows its context and a `--delimiter`, a space by default, which is not one
  of its characters. A completion follows its context as it is. Neither is followed by the document's end.
- The context alone, without its last spaces, has n pieces. The pieces of the whole text after the first
  n are the continuation.
- Contexts are cut on the left to the length of a row of the last phase.
- Minimal pairs are sentences alone after bos. (The harness puts a space in front that was not there.)

--core takes the directory of DCLM's evaluation files (core.yaml, eval_meta_data.csv, eval_data/) and
scores its tasks as lib/core_tasks.py says: `core/<task>` is accuracy, `core/<task>/centred` has guessing
at 0, and `core` is the mean of these. With --most N, a task is the first N lines of its shuffled file.
"""
from functools import partial

import jax
from jax.sharding import Mesh

from data import Source
from lib.any_text import any_text, survey
from lib.arguments import Arguments
from lib.cache import build
from lib.checkpoint import find_checkpoint
from lib.core_tasks import Task, core_figures, read_core
from lib.corpus import open_caches, open_held_out
from lib.disk import user_path
from lib.evals import own_evals, sharded_apply
from lib.evaluate import (
    Setting,
    evaluators,
    open_source,
    test_figures,
    whole_batches,
    whole_figures,
    write_figures,
)
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.tables import HALF_95, columns, printable
from lib.tasks import json_lines, minimal_pairs, tasks
from model import table
from train import load


def show(found: dict[str, float]):
    """Print figures, a line each, with their intervals where these are known."""
    for key, value in found.items():
        name = printable(key)
        if name.endswith(("_se", "_low", "_high")):
            continue
        if f"{key}_low" in found:
            low, high = found[f"{key}_low"], found[f"{key}_high"]
            print(f"{name}: {value:.3f} [{low:.3f}, {high:.3f}], a 95 % interval")
        elif f"{key}_se" in found:
            half = HALF_95 * found[f"{key}_se"]
            print(f"{name}: {value:.4g} ± {half:.2g} (± is half a 95 % interval)")
        else:
            print(f"{name}: {value:.4g}")


def show_core(found: dict[str, float], tasks: list[Task]):
    """Print the accuracy of each task of CORE as a table, with its 95 % interval."""
    rows = [["CORE", "shots", "items", "accuracy", "baseline", "centred"]]
    for task in tasks:
        name = f"core/{task.label}"
        share, low, high = (found[name + end] for end in ("", "_low", "_high"))
        centred = found[f"{name}/centred"]
        rows.append([
            task.label,
            str(task.shots),
            str(len(task.questions)),
            f"{share:.3f} [{low:.3f}, {high:.3f}]",
            f"{task.baseline:.3f}",
            f"{centred:.3f}",
        ])
    print(columns(rows))
    low, high = found["core_low"], found["core_high"]
    print(f"core: {found['core']:.4f} [{low:.4f}, {high:.4f}], the mean of centred accuracies")


def arguments_of(arguments: list[str]):
    """The command line. Files are looked for at once, so that a mistake there ends it now."""
    parser = Arguments("eval", __doc__)
    add = parser.add_argument
    add("run", help="run directory")
    add("--blimp", help="directory of BLiMP paradigms, a .jsonl file each")
    add("--tasks", nargs="+", action="extend", default=[], help=".jsonl files, directories")
    add("--delimiter", default=" ", help="between a context and a choice; a space by default")
    add("--core", help="directory of DCLM's CORE tasks")
    add("--most", type=int, help="lines of each of these; all by default")
    add("--data", nargs="+", action="extend", default=[], metavar="FILE",
        help="text to measure: files, directories, patterns")
    add("--content", default="text", help="of --data: the key of a record's text, or a template")
    add("--separator", help="of --data: ends a document within a text")
    add("--step", type=int, help="checkpoint; the newest by default")
    a = parser.parse_args(arguments)
    names = []
    for path in a.tasks:
        names += json_lines(path)
    if len(set(names)) < len(names):
        parser.error(f"--tasks has files {', '.join(names)}; allowed are names that differ")
    if a.blimp:
        json_lines(a.blimp)
    if a.most is not None and not a.core:
        parser.error(f"--most is {a.most} without --core, whose tasks it is for")
    a.core = read_core(a.core, a.most) if a.core else []
    for path in a.data:
        survey(path)
    texts = [name_of(path) for path in a.data]
    if len(set(texts)) < len(texts):
        parser.error(f"--data has {', '.join(texts)}; allowed are names that differ")
    return a


def name_of(path: str) -> str:
    """What a path of --data is called: its last part up to its first dot."""
    last = path.rstrip("/").rpartition("/")[2]
    return last.partition(".")[0] or last


def text_figures(losses, path: str, a, setting: Setting) -> dict[str, float]:
    """`text/<name>/<figure>` of what a path of --data holds, printed as a table too."""
    name = name_of(path)
    read = partial(any_text, path=path, content=a.content, separator=a.separator)
    config, tokenizer = setting.config, setting.tokenizer
    data = config.data.alone(name, Source(read, split="test"))
    cache = build(name, data, tokenizer, config.seed)
    setting = whole_batches(setting._replace(held_out={name: cache}))
    held = {name: open_source(setting, name, "test")}
    found = whole_figures(losses, held, config, "text/{}")
    return {key if "/" in key else f"text/{name}/{key}": value for key, value in found.items()}


def fitting_mesh(config) -> Mesh:
    """The mesh of a run where it fits the devices here; otherwise all of these devices for rows."""
    try:
        mesh = make_mesh(config.mesh)
        shardings(table(config.model), mesh)
    except ValueError:
        return make_mesh(MeshConfig())
    return mesh


def main(arguments: list[str]) -> dict:
    """Command line; returns what eval.json holds."""
    a = arguments_of(arguments)
    step = find_checkpoint(a.run, a.step)[1]
    params, config, tokenizer, _ = load(a.run, step)
    mesh = fitting_mesh(config)
    if jax.process_count() > 1:
        mesh = next(iter(params.values())).sharding.mesh
    params = jax.device_put(params, shardings(table(config.model), mesh))
    losses, scores = evaluators(config.reparam, config.model, mesh)
    caches = open_caches(config, tokenizer)
    held_out = open_held_out(config, tokenizer, caches)
    measured = caches, config, tokenizer, mesh, held_out
    losses = partial(losses, params, step)
    result = test_figures(losses, *measured)
    setting = Setting(config, config.phases[-1], caches, tokenizer, mesh, held_out)
    found = own_evals(scores, params, step, setting)
    apply = sharded_apply(scores, step, mesh)
    if a.blimp:
        found |= minimal_pairs(params, apply, tokenizer, a.blimp)
    for path in a.tasks:
        found |= tasks(params, apply, tokenizer, config, path, a.delimiter)
    show(found)
    for path in a.data:
        result |= text_figures(losses, path, a, setting)
    result |= found
    if a.core:
        found = core_figures(params, apply, tokenizer, a.core, config.phases[-1].seq)
        show_core(found, a.core)
        result |= found
    write_figures(user_path(a.run), result)
    return result
