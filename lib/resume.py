"""What a run starts from: its own checkpoint, another run's, or a Hugging Face directory."""
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import shuffled
from lib.checkpoint import find_checkpoint
from lib.config import flatten, from_json, to_json
from lib.disk import digest
from lib.errors import InputError
from lib.hf import read_params, read_shape
from lib.optim import state_like
from lib.schedule import Plan
from model import ModelConfig


def resume_key(config, course: Plan, step: int) -> dict[str, Any]:
    """What the first `step` steps depend on, flat: a run that goes on from there must have it in common."""
    fields = "seed model init_from init_with data phases optimizer clip max_skipped reparam token_loss reduce"
    out = {k: v for k, v in json.loads(json.dumps(to_json(config))).items() if k in fields.split()}
    out["phases"] = [p for p, end, now in zip(out["phases"], course.ends, config.phases, strict=True)
                     if end - now.steps < step]
    for phase, now, end in zip(out["phases"], config.phases, course.ends, strict=False):
        del phase["schedule"], phase["lr"]  # their effect, the rates, is compared below
        if end >= step and not (callable(now.mixture) or now.lengths or now.order is not shuffled):
            del phase["steps"]
    rates = {group: r[1:step + 1].tolist() for group, r in course.rates.items() if r[1:step + 1].any()}
    return flatten(out) | {"data.sources (their order)": list(config.data.sources),
                           "schedule (the rates of steps already taken)": digest(rates)}


def start_config(config, directory: Path) -> tuple[Any, Path | None]:
    """(config with the shape and, unless it names one, the tokenizer of what `init_from` names, file of the
    run's own tokenizer). Once the run in `directory` has a checkpoint, shape and tokenizer are read there:
    what it started from need not be any more.
    """
    name, begun = config.init_from, any(directory.glob("checkpoints/[0-9]*"))
    if begun:
        shape = json.loads((directory / "config.json").read_text())["model"]
    else:
        shape = read_shape(name) if name.startswith("hf:") else find_checkpoint(*run_step(name))[2]["model"]
    shape = from_json(ModelConfig, shape) if isinstance(shape, dict) else shape
    how = "dtype param_dtype attention unroll remat logits_mib".split()
    config = replace(config, model=replace(shape, **{field: getattr(config.model, field) for field in how}))
    if config.data.tokenizer == "bpe":
        tokenizer = name if name.startswith("hf:") else f"{run_step(name)[0]}/tokenizer.model"
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    return config, directory / "tokenizer.model" if begun else None


def run_step(name: str) -> tuple[str, int | None]:
    """RUN or RUN@STEP as (run, step)."""
    run, at, step = name.rpartition("@")
    return (run, int(step)) if at and step.isdigit() else (name, None)


def start_state(run):
    """Give a run, its state just drawn, what `init_from` names: parameters, or all of a checkpoint."""
    config, like = run.config, state_like(run.shape, run.config.optimizer, run.mesh)
    if config.init_from.startswith("hf:"):
        run.state = run.state.replace(params=read_params(config.init_from, run.shape, like.params))
        return
    checkpoints, step, meta = find_checkpoint(*run_step(config.init_from))
    run.since = meta["since_reset"]
    if config.init_with == "params":
        run.state = run.state.replace(params=checkpoints.params(step, like))
        return
    written = json.loads((checkpoints.root.parent / "config.json").read_text())["optimizer"]
    if written != json.loads(json.dumps(to_json(config.optimizer))):
        raise InputError(f'init_with is "all", but {config.init_from} has another optimizer')
    taken = checkpoints.state(step, like)
    run.state = run.state.replace(params=taken.params, opt=taken.opt)
    run.loader.start = [meta["positions"].get(name, 0) for name in run.caches]
