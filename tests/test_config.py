"""lib/config.py, lib/fields.py and lib/command.py: fields, JSON, files, the command line."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from train_cases import (
    TINY,
    answer,
    bad_policy,
    counted,
    first_then_second,
    in_front,
    odd_only,
    one_each,
    plain_descent,
    same_weights,
    second_half,
    silence,
    tiny_config,
    undefined,
    verses,
)

import model
import train
from data import DataConfig, InputError, Source, stdlib
from lib import command
from lib.config import ROOT, from_json, load_file, to_json, verbs
from lib.edits import reset_embeddings, stack
from lib.fields import plain, settings
from lib.keys import function_key
from lib.optim import adamw
from lib.schedule import Schedule
from lib.sharding import MeshConfig
from train import Config, Edit, Phase, load_config, parse


class Thing:
    """Callable, but no function."""

    def __call__(self, *_):
        """Nothing."""


# ------------------------------------------------------------------- bad configs, before any work


def phases_with(**changes) -> tuple[Phase, ...]:
    """Two phases, the second changed."""
    return (Phase(batch=8, seq=128), replace(Phase(batch=8, seq=128), **changes))


def model_with(**changes) -> dict:
    """A changed model."""
    return dict(model=replace(TINY, **changes))


def data_with(**changes) -> dict:
    """Changed data."""
    return dict(data=replace(tiny_config().data, **changes))


def inner():
    """A function that is not at the top level of a file."""

    def hidden(table):
        return plain_descent(table)

    return hidden


BAD = {  # case: (changes of the config, what the sentence must hold)
    "heads": (model_with(heads=5), ["model.heads", "5", "model.kv_heads", "2"]),
    "odd head_dim": (model_with(head_dim=7), ["model.head_dim", "7", "even"]),
    "no layers": (model_with(layers=0), ["model.layers", "0", "1 or more"]),
    "negative mlp": (model_with(mlp=-3), ["model.mlp", "-3", "1 or more"]),
    "no kv heads": (model_with(kv_heads=0), ["model.kv_heads", "0", "1 or more"]),
    "negative vocab": (model_with(vocab=-1), ["model.vocab", "-1", "0 or more"]),
    "float for int": (model_with(embed=32.0), ["model.embed", "32.0", "int"]),
    "bool for int": (model_with(layers=True), ["model.layers", "True", "int"]),
    "word for bool": (model_with(tied="yes"), ["model.tied", "'yes'", "bool"]),
    "unknown dtype": (
        model_with(dtype="float16"),
        ["model.dtype", "float16", "bfloat16", "float32"],
    ),
    "unroll": (model_with(unroll=3), ["model.unroll", "3", "model.layers", "2"]),
    "no phases": (dict(phases=()), ["phases", "empty"]),
    "list of phases": (dict(phases=[Phase()]), ["phases", "list", "tuple"]),
    "no steps": (dict(phases=phases_with(steps=0)), ["phases.1.steps", "0", "1 or more"]),
    "no batch": (dict(phases=phases_with(batch=0)), ["phases.1.batch", "0", "1 or more"]),
    "negative seq": (dict(phases=phases_with(seq=-128)), ["phases.1.seq", "-128", "1 or more"]),
    "overlap": (dict(overlap=128), ["overlap", "128", "phases.0.seq", "less than"]),
    "mixture of a stranger": (
        dict(phases=phases_with(mixture={"vers": 1.0})),
        ["phases.1.mixture", "vers", "verse"],
    ),
    "mixture of nothing": (
        dict(phases=phases_with(mixture={"verse": 0.0})),
        ["phases.1.mixture", "0.0", "verse"],
    ),
    "negative mixture": (
        dict(phases=phases_with(mixture={"verse": -1.0})),
        ["phases.1.mixture", "-1.0", "0"],
    ),
    "word in a mixture": (
        dict(phases=phases_with(mixture={"verse": "much"})),
        ["phases.1.mixture", "much"],
    ),
    "lambda": (dict(optimizer=lambda table: {}), ["optimizer", "lambda", "top-level"]),
    "inner function": (dict(optimizer=inner()), ["optimizer", "inner", "top-level"]),
    "no function": (dict(token_loss=3), ["token_loss", "3"]),
    "callable object": (dict(reduce=Thing()), ["reduce", "Thing"]),
    "builtin": (dict(token_loss=abs), ["token_loss", "abs"]),
    "partial of an object": (
        dict(optimizer=partial(adamw, b1=np.zeros(2))),
        ["optimizer.b1", "JSON"],
    ),
    "partial of a lambda": (
        dict(phases=phases_with(edits=(partial(stack, times=lambda: 2),))),
        ["phases.1.edits.0.times", "JSON"],
    ),
    "partial by position": (dict(optimizer=partial(adamw, 0.9)), ["optimizer", "adamw", "keyword"]),
    "lambda as an edit": (
        dict(phases=phases_with(edits=(lambda m, c: m,))),
        ["phases.1.edits.0", "lambda", "top-level"],
    ),
    "no sources": (data_with(sources={}), ["data.sources", "empty"]),
    "splits of everything": (data_with(dev=0.5, test=0.5), ["data.dev", "data.test", "0.5"]),
    "negative split": (data_with(dev=-0.1), ["data.dev", "-0.1"]),
    "no shard": (data_with(shard_tokens=0), ["data.shard_tokens", "0", "1 or more"]),
    "negative clip": (dict(clip=-1.0), ["clip", "-1.0", "0 or more"]),
    "no peak": (dict(schedule=Schedule(peak=0.0)), ["schedule.peak", "0.0", "more than 0"]),
    "unknown shape": (dict(schedule=Schedule(shape="flat")), ["schedule.shape", "flat", "wsd"]),
    "no decay": (dict(schedule=Schedule(decay=0.0)), ["schedule.decay", "0.0", "more than 0"]),
    "a phase's peak": (
        dict(phases=phases_with(schedule=Schedule(peak=-1.0))),
        ["phases.1.schedule.peak", "-1.0"],
    ),
    "a phase's warm-up": (
        dict(phases=phases_with(schedule=Schedule(warmup=-1))),
        ["phases.1.schedule.warmup", "-1"],
    ),
    "a phase's decay": (
        dict(phases=phases_with(schedule=Schedule(decay=2.0))),
        ["phases.1.schedule.decay", "2.0"],
    ),
    "recurring never": (
        dict(phases=phases_with(repeat=(Edit(reset_embeddings, every=0),))),
        ["phases.1.repeat.0.every", "0"],
    ),
    "rate that is not a number": (dict(schedule=Schedule(peak=math.nan)), ["schedule.peak", "nan"]),
    "negative temperature": (dict(sample_temperature=-1.0), ["sample_temperature", "-1.0"]),
    "no checkpoints": (dict(keep=0), ["keep", "0", "1 or more"]),
}


@pytest.mark.parametrize("case", BAD)
def test_check_refuses_in_one_sentence(case):
    """Each bad config is an InputError of one line: the field, what was found, what is allowed."""
    changes, words = BAD[case]
    with pytest.raises(InputError) as caught:
        train.check(tiny_config(**changes))
    sentence = str(caught.value)
    assert all(word in sentence for word in [*words, "allowed"]) and "\n" not in sentence, sentence


def test_check_lets_good_configs_pass():
    """What is shipped, the defaults, and every kind of field filled in."""
    train.check(Config())
    train.check(tiny_config())
    train.check(everything())


# ----------------------------------------------------------------------------- configs in and out


def everything() -> Config:
    """A config with something in every field that can hold a function or a nested value."""
    return tiny_config(
        data=DataConfig(
            sources={"a": Source(partial(verses, count=9), in_front, odd_only), "b": Source(verses)}
        ),
        phases=(
            Phase(
                mixture={"a": 0.5, "b": 2.0},
                repeat=(Edit(partial(reset_embeddings, head=False), 7, 70),),
            ),
            Phase(
                mixture=first_then_second,
                packing=one_each,
                objective=second_half,
                edits=(silence, partial(stack, layers=[0, 1, 1])),
                schedule=Schedule(shape="cosine"),
                lr={"embed": 2.0},
            ),
        ),
        optimizer=partial(adamw, b2=0.99),
        reparam=same_weights,
        token_loss=partial(undefined, first=2),
        reduce=counted,
        evals=(answer,),
        prompts=("a", "b"),
        mesh=MeshConfig(tensor=2),
    )


def alike(a, b) -> bool:
    """Equality of config values, functions by their code and all their settings."""
    if callable(a):
        f, g = plain(a), plain(b)
        same = json.dumps(settings(a)) == json.dumps(settings(b))  # tuples come back as lists
        return (
            same and f.__qualname__ == g.__qualname__ and f.__code__.co_code == g.__code__.co_code
        )
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(
            alike(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return type(b) is tuple and len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and a == b


ROWS = {ROOT / f"configs/{name}.py" for name in ("bursty", "parts_of_speech", "points")}  # no configs
SHIPPED = sorted(str(path.relative_to(ROOT)) for path in {*(ROOT / "configs").rglob("*.py")} - ROWS)


@pytest.mark.parametrize("file", [*SHIPPED, "everything"])
def test_configs_survive_json(file):
    """Through text and back: the same config, and the same JSON again."""
    given = {"path": "some.jsonl"} if file == "configs/mine.py" else {}
    config = everything() if file == "everything" else load_config(str(ROOT / file), **given)
    written = json.dumps(to_json(config))
    back = from_json(Config, json.loads(written))
    assert alike(config, back)
    assert json.dumps(to_json(back)) == written
    train.check(back)


def test_json_names_functions_by_file_and_arguments():
    """A function is its `file:name`, all its settings, and a hash of its source, which changes with it."""
    written = to_json(everything())
    assert written["optimizer"]["function"] == "lib/optim.py:adamw"
    assert written["optimizer"]["arguments"] == dict(
        b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, frozen=[], embed_lr=10.0,
        base_width=64)
    assert written["phases"][1]["edits"][0]["function"] == "tests/train_cases.py:silence"
    assert len({json.dumps(to_json(f)["source"]) for f in (silence, bad_policy, answer)}) == 3


def shipped(*arguments: str) -> Config:
    """The plain quickstart under some overrides."""
    config, file = parse([str(ROOT / "configs/quickstart.py:plain"), *arguments])
    assert file.endswith("quickstart.py:plain") and config.name
    return config


def test_overrides_reach_every_kind_of_field():
    """Tuples by number, dictionaries by key, arguments of partials, dashes for underscores, and `=`."""
    assert shipped("--phases.1.edits.0.times", "3").phases[1].edits[0].keywords["times"] == 3
    assert (
        shipped("--phases.1.edits.0.moments", "map").phases[1].edits[0].keywords["moments"] == "map"
    )
    changed = shipped("--phases.0.steps", "7", "--phases.1.batch=4")
    assert (changed.phases[0].steps, changed.phases[1].batch, changed.phases[1].steps) == (
        7,
        4,
        shipped().phases[1].steps,
    )
    assert shipped("--model.kv-heads", "3").model.kv_heads == 3
    assert shipped("--model.tied", "false").model.tied is False
    assert shipped("--clip", "0").clip == 0.0 and type(shipped("--clip", "0").clip) is float
    assert shipped("--schedule.peak", "1e-4").schedule.peak == 1e-4
    assert shipped("--mesh.data", "-1").mesh.data == -1
    assert shipped("--prompts.0=--x").prompts[0] == "--x"
    assert (
        shipped("--data.sources.stdlib.documents", "x").data.sources["stdlib"].documents == "x"
    )  # for check to refuse
    assert shipped("--name", "7").name == "7"
    assert shipped().name == "quickstart-plain"
    train.check(changed)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model.layrs", "3"], ["--model.layrs", "did you mean 'layers'"]),
        (["--modle.layers", "3"], ["--modle.layers", "did you mean 'model'"]),
        (["--phases.2.steps", "3"], ["--phases.2.steps", "'2'", "0, 1"]),
        (["--phases.1.edits.0.tims", "3"], ["tims", "did you mean 'times'"]),
        (["--data.sources.stdlb.prepare", "x"], ["stdlb", "did you mean 'stdlib'"]),
        (["--phases.0.schedule.peak", "1"], ["--phases.0.schedule.peak", "'peak'"]),
        (["--model.layers"], ["--model.layers", "needs a value"]),
        (["--model.layers.x", "3"], ["model.layers is 2, which has no 'x'"]),
        (["--seed.x.y", "3"], ["seed is 0, which has no 'x'"]),
        (["--model.layers", "--clip", "1"], ["--model.layers", "needs a value"]),
        (["stray"], ["'stray'", "--path.to.field VALUE"]),
    ],
)
def test_overrides_that_name_no_field(arguments, words):
    """One sentence that names the flag, and the nearest field where there is one."""
    with pytest.raises(InputError) as caught:
        shipped(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model.layers", "two"], ["model.layers", "'two'", "int"]),
        (["--model.layers", "2.5"], ["model.layers", "2.5", "int"]),
        (["--phases.0.steps", "(1,2)"], ["phases.0.steps", "(1, 2)", "int"]),
        (["--schedule.shape", "wds"], ["schedule.shape", "'wds'", "'wsd'"]),
        (["--optimizer", "adam"], ["optimizer", "'adam'"]),
        (["--reparam", "thin"], ["reparam", "'thin'"]),
        (["--model.heads", "4"], ["model.heads", "4", "model.kv_heads", "6"]),
    ],
)
def test_overrides_of_a_wrong_type_are_refused_by_check(arguments, words):
    """By the field's path, as if the config file had held it."""
    with pytest.raises(InputError) as caught:
        train.check(shipped(*arguments))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ------------------------------------------------------------------------ rules beside the fields


def refused(config: Config) -> str:
    """The sentence that `check` says of a config."""
    with pytest.raises(InputError) as caught:
        train.check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_group_named_like_a_field_is_not_judged_as_that_field():
    """0 freezes a group, also one that is called embed, as the width is, which may not be 0."""
    for group in ("embed", "layers", "peak"):
        train.check(tiny_config(phases=(Phase(batch=8, seq=128, lr={group: 0.0}),)))
    train.check(replace(shipped("--phases.0.lr.embed", "0"), name="x"))
    assert shipped("--phases.0.lr.embed", "0").phases[0].lr == {"embed": 0.0}
    assert shipped("--phases.0.mixture.stdlib", "1").phases[0].mixture == {"stdlib": 1.0}
    sentence = refused(tiny_config(phases=(Phase(lr={"embed": -1.0}),)))
    assert sentence == "phases.0.lr.embed is -1.0; allowed is a finite number, 0 or more"


@pytest.mark.parametrize(
    "path",
    [
        "clip",
        "save_minutes",
        "sample_temperature",
        "schedule.peak",
        "schedule.decay",
        "schedule.final",
        "data.dev",
        "data.sample_mib",
        "data.max_skipped",
        "model.rope_theta",
        "model.norm_eps",
        "data.sources.stdlib.epochs",
    ],
)
@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_what_is_not_finite_is_refused_where_a_number_is_meant(path, number):
    found = float(number)
    assert refused(shipped(f"--{path}={number}")).startswith(f"{path} is {found}; allowed")


def test_numbers_inside_tuples_and_dictionaries_are_judged_too():
    nan = refused(tiny_config(phases=phases_with(mixture={"verse": math.nan})))
    assert nan.startswith("phases.1.mixture is") or nan.startswith("phases.1.mixture.verse is nan")
    zero = refused(tiny_config(**model_with(rope_scaling=(0.0,))))
    assert zero.startswith("model.rope_scaling.0 is 0.0; allowed")
    assert "low below high" in refused(
        tiny_config(**model_with(rope_scaling=(2.0, 4.0, 4.0, 64.0)))
    )
    assert "(factor,)" in refused(tiny_config(**model_with(rope_scaling=(2.0, 4.0))))
    train.check(tiny_config(**model_with(rope_scaling=(2.0, 1.0, 4.0, 64.0))))
    assert "data.max_skipped is 1.5; allowed is a finite number, 0 or more, at most 1" == refused(
        tiny_config(**data_with(max_skipped=1.5))
    )


def test_eval_at_is_steps_of_the_run():
    """From 0 to the last step of all phases."""
    one = tiny_config(phases=phases_with(steps=7), eval_at=(0, 3, 107))
    train.check(one)
    assert refused(replace(one, eval_at=(108,))).startswith(
        "eval_at is (108,); allowed are steps from 0"
    )
    assert (
        refused(replace(one, eval_at=(3, -1)))
        == "eval_at.1 is -1; allowed is an integer, 0 or more"
    )
    assert shipped("--eval_at", "5").eval_at == (5,) and shipped("--eval_at", "0,5").eval_at == (
        0,
        5,
    )
    assert shipped("--eval_at", "[0, 5]").eval_at == (0, 5)


def broken_lengths(progress):
    """A `lengths` that fails."""
    return {128: 1.0 / progress}


def test_a_function_that_fails_in_a_check_is_one_sentence():
    said = "lengths ends in ZeroDivisionError: float division by zero; allowed is progress -> {row"
    assert said in refused(
        tiny_config(phases=phases_with(lengths=broken_lengths))
    )


# ---------------------------------------------------------------------------- names as they were


def test_old_names_are_refused_with_the_new_ones():
    for made, old, new in ((Config, "weights", "reparam"), (Phase, "rates", "lr")):
        with pytest.raises(
            InputError, match=f"{made.__name__} has no field '{old}'; it is now '{new}'"
        ):
            made(**{old: None})
    with pytest.raises(InputError, match="--weights: .*it is now 'reparam'"):
        shipped("--weights", "None")
    with pytest.raises(InputError, match="--phases.0.rates: .*it is now 'lr'"):
        shipped("--phases.0.rates", "{}")
    with pytest.raises(InputError, match="ModelConfig has no field 'hiden'"):
        replace(TINY, hiden=3)


def test_older_runs_are_read_by_their_names():
    """config.json of a run with the old names, and with the arguments that partials gave alone."""
    written = json.loads(json.dumps(to_json(everything())))
    old = json.loads(json.dumps(written))
    old["weights"] = old.pop("reparam")
    for phase in old["phases"]:
        phase["rates"] = phase.pop("lr")
    old["optimizer"]["arguments"] = {"b2": 0.99}
    old["phases"][1]["edits"][0]["arguments"] = {}
    assert json.loads(json.dumps(to_json(from_json(Config, old)))) == written


ELSEWHERE = {
    "lr": "--schedule.peak",
    "learning_rate": "--schedule.peak",
    "batch_size": "--phases.0.batch",
    "num_epochs": "--data.sources.NAME.epochs",
    "steps": "--phases.0.steps or --phases.1.steps",
    "seq_len": "--phases.0.seq",
    "context": "--phases.0.seq",
    "hidden_size": "--model.embed",
    "n_layer": "--model.layers",
    "num_layers": "--model.layers",
    "n_head": "--model.heads",
    "weight_decay": "--optimizer.weight_decay",
    "warmup": "--schedule.warmup",
    "max_steps": "--phases.0.steps",
    "device": "--mesh.data",
    "out_dir": "--runs DIR",
    "dataset": "--data.sources.NAME.documents",
    "wandb": "--tracker wandb",
    "heads": "--model.heads",
    "rates": "--phases.0.lr",
    "dtype": "--model.dtype",
    "model.n_embd": "--model.embed",
    "phases.0.batch-size": "--phases.0.batch",
    "dropout": "the model has none",
    "unit": "--data.sources.stdlib.documents.unit",
}


@pytest.mark.parametrize("flag", ELSEWHERE)
@pytest.mark.parametrize("value", [["3"], []])
def test_what_others_call_a_field_is_answered_with_the_field(flag, value):
    with pytest.raises(InputError, match=f"unknown field --{flag}: .*{ELSEWHERE[flag]}"):
        shipped(f"--{flag}", *value)


@pytest.mark.parametrize("config", [shipped(), parse([])[0]], ids=["plain", "quickstart"])
def test_every_field_that_another_name_is_answered_with_is_there(config):
    paths = [path for path, _, _ in command.walk(config)]
    for ending in command.OTHER_NAMES:
        assert any(f".{path}".endswith(f".{ending}") for path in paths), ending
    words = [*command.FIELD_OF, *command.ANSWER_OF]
    assert len(words) == len(set(words)) > 100
    assert not {*words} & {path for path in paths if "." not in path}


# ------------------------------------------------------------------------- settings of functions


def tuned(
    table, decay: float = 0.1, kind: str = "plain", sizes: tuple[int, ...] = (), every=3, odd=np
):
    """An `optimizer` with settings of every type."""
    return plain_descent(table)


def counted_texts(path: str, most: int = 3):
    """A `documents` that must be told a path."""
    yield from ()


def test_settings_of_plain_functions_can_be_set():
    unit = "--data.sources.stdlib.documents.unit"
    config = shipped("--optimizer.weight_decay", "0.05", unit, "definition")
    assert config.optimizer.func is adamw and config.optimizer.keywords == {"weight_decay": 0.05}
    assert config.data.sources["stdlib"].documents.keywords == {"unit": "definition"}
    assert to_json(config)["optimizer"]["arguments"] == dict(
        b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, frozen=[], embed_lr=10.0, base_width=64
    )
    assert to_json(shipped())["data"]["sources"]["stdlib"]["documents"]["arguments"] == {
        "unit": "module"
    }
    assert from_json(Config, to_json(shipped())).optimizer is adamw
    assert shipped("--optimizer.weight_decay", "0").optimizer.keywords == {"weight_decay": 0.0}
    train.check(config)


def test_a_setting_that_is_the_default_changes_no_key():
    """Neither that of a cache, nor what a run that is resumed must have in common."""
    explicit = partial(stdlib, unit="module")
    assert (
        function_key(explicit)
        == function_key(stdlib)
        != function_key(partial(stdlib, unit="definition"))
    )
    assert to_json(explicit) == to_json(stdlib)


@pytest.mark.parametrize(
    "function, sentence",
    [
        (
            partial(tuned, decya=1),
            "optimizer is tuned, which has no setting 'decya'; did you mean 'decay'?",
        ),
        (
            partial(tuned, decay="much"),
            "optimizer.decay is 'much' (str); allowed is a finite number",
        ),
        (partial(tuned, kind=3), "optimizer.kind is 3 (int); allowed is a text"),
        (partial(tuned, sizes=[1, "x"]), "optimizer.sizes.1 is 'x' (str); allowed is an integer"),
        (partial(tuned, decay=True), "optimizer.decay is True (bool); allowed is a finite number"),
    ],
)
def test_settings_are_judged_by_the_function_s_signature(function, sentence):
    assert refused(tiny_config(optimizer=function)) == sentence


def test_settings_without_a_type_may_be_anything_that_json_holds():
    train.check(tiny_config(optimizer=partial(tuned, sizes=[1, 2], every="day")))
    assert set(settings(tuned)) == {"decay", "kind", "sizes", "every"}


def test_a_source_that_is_not_told_its_path_is_one_sentence_and_can_be_told():
    config = tiny_config(**data_with(sources={"mine": Source(counted_texts)}))
    sentence = refused(config)
    assert sentence.startswith(
        "data.sources.mine.documents is counted_texts, which is not told its path"
    )
    told = command.set_field(config, "--data.sources.mine.documents.path", "2024")
    assert told.data.sources["mine"].documents.keywords == {"path": "2024"}
    train.check(told)


def test_what_a_function_is_called_with_is_no_setting():
    with pytest.raises(
        InputError, match="'table' is what adamw is called with; its settings are: b1, b2"
    ):
        shipped("--optimizer.table", "3")


# ------------------------------------------------------------------------------------- the files

TWO = """
from dataclasses import replace
from typing import Any, NamedTuple
from train import Config

class Study(NamedTuple):
    arms: dict
    first: str

short = Config(clip=0.5)
"""
STUDY = TWO + 'study = Study({"long": Config(clip=2.0), "short": short}, "short")\n'
ARMS = TWO + 'arms = {"long": Config(clip=2.0), "short": short}\n'


def written(tmp_path, content: str, name: str = "mine.py") -> str:
    """A config file."""
    (tmp_path / name).write_text(content)
    return str(tmp_path / name)


def test_arms_come_from_the_study_or_from_the_dictionary(tmp_path):
    for name, content in (("study", STUDY), ("arms", ARMS)):
        file = written(tmp_path, content, f"{name}.py")
        assert load_config(f"{file}:long").clip == 2.0
        config, found = parse([f"{file}:short", "--seed", "3"])
        assert (config.clip, config.seed, config.name, found) == (
            0.5,
            3,
            f"{name}-short",
            f"{file}:short",
        )
        with pytest.raises(InputError, match="defines no arm 'deep'; its arms: long, short"):
            load_config(f"{file}:deep")
    config, found = parse([str(tmp_path / "study.py")])  # the control
    assert (config.clip, config.name, found) == (
        0.5,
        "study-short",
        f"{tmp_path / 'study.py'}:short",
    )
    with pytest.raises(
        InputError, match=r"defines no `config = Config\(...\)`; its arms: long, short"
    ):
        parse([file])
    assert load_config(written(tmp_path, ARMS + "config = arms['long']", "both.py")).clip == 2.0


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("x = 1", r"defines no `config = Config\(...\)`"),
        ("config = 3", r"defines no `config = Config\(...\)`"),
        ("x = 1\n1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("x = 1\nconfig = = 3", "line 2: SyntaxError"),
        (
            "from train import Config\nconfig = Config(weights=None)",
            "line 2: Config has no field 'weights'; it is now",
        ),
        ("import nothing_like_it", "line 1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, content, sentence):
    with pytest.raises(InputError, match=sentence):
        parse([written(tmp_path, content)])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        '{"seed": {"x": 1}, "clip": [2]}',
        '{"strange": 1}',
        '{"optimizer": {"function": "lib/optim.py:gone", "arguments": {}}}',
        '{"optimizer": {"function": "gone.py:x", "arguments": {}}}',
        '{"optimizer": {"function": 3, "arguments": {}}}',
    ],
)
def test_json_that_is_no_config_is_one_sentence(tmp_path, content):
    with pytest.raises(InputError):
        train.check(parse([written(tmp_path, content, "config.json")])[0])


def test_a_directory_and_a_word_that_is_no_verb_are_one_helpful_sentence(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    said = {str(run): "is a directory; allowed is a config file"}
    for path, sentence in said.items():
        with pytest.raises(InputError, match=sentence):
            parse([path, "--help"])
    config = Config(name="run", seed=5)
    written(run, json.dumps(to_json(config)), "config.json")
    assert parse([str(run / "config.json")])[0] == config
    said = {str(run): "is the directory of a run; resume it by .*run/config.json"}
    said |= {
        "track": "neither a config file, .* nor a verb .*bench, corpus, .*eval.*--tracker tensorboard",
        "train": "neither a config file, .*; a run needs no verb: python train.py CONFIG",
        "configs/growth/g_stack.py/x": "neither",
        "configs/quikstart.py": r"did you mean configs/quickstart.py\?",
    }
    for path, sentence in said.items():
        with pytest.raises(InputError, match=sentence):
            parse([path, "--help"])
    assert train.main(["track", "--help"]) == 2 and "track" not in verbs()


def test_every_verb_has_a_line_and_a_main():
    assert {"sample", "eval", "bench", "fit", "study", "export", "report", "corpus"} <= {*verbs()}
    for name in verbs():
        assert callable(load_file(ROOT / "tools" / f"{name}.py").main)


FUNCTION = """
from dataclasses import replace
from train import Config, Schedule

def config(path: str, held_out: str = "", depth: int = 4, peak: float = 1e-3, tied: bool = True) -> Config:
    start = Config(init_from=path, schedule=Schedule(peak=peak))
    return replace(start, model=replace(start.model, layers=depth, tied=tied), prompts=(held_out,))
"""


def test_a_file_s_function_config_is_built_from_flags(tmp_path):
    file = written(tmp_path, FUNCTION)
    flags = "--path 7 --depth=8 --model.heads 8 --tied false --held-out x".split()
    config, found = parse([file, *flags])
    assert (config.init_from, config.model.layers, config.model.heads, config.prompts) == (
        "7",
        8,
        8,
        ("x",),
    )
    assert config.model.tied is False and config.name == "mine" and found == file
    assert parse([file, "--path", "a", "--peak", "1"])[0].schedule.peak == 1.0
    assert load_config(file, path="b").init_from == "b"
    assert from_json(Config, to_json(config)) == config
    for flags, sentence in (
        ([], "needs --path VALUE"),
        (["--path"], "--path needs a value"),
        (["--path", "a", "--depth", "deep"], "--depth of .*'deep'.*an integer"),
        (["--path", "a", "--dept", "2"], "unknown field --dept"),
        (["--path", "a", "--model.layrs", "2"], "did you mean 'layers'"),
    ):
        with pytest.raises(InputError, match=sentence):
            parse([file, *flags])
    broken = written(tmp_path, "def config(n: int = 0):\n    return 1 / n\n", "broken.py")
    for flags, sentence in (
        ([], "line 2: ZeroDivisionError"),
        (["--n", "2"], "gives 0.5; allowed is a Config"),
    ):
        with pytest.raises(InputError, match=sentence):
            parse([broken, *flags])


def test_a_file_in_a_chapter_is_loaded_once_by_its_dotted_name(tmp_path, monkeypatch):
    """An import and the command line see one module, so that functions are the same."""
    chapter = tmp_path / "configs/growth"
    chapter.mkdir(parents=True)
    monkeypatch.setattr("lib.config.ROOT", tmp_path.resolve())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("configs.__path__", [str(tmp_path / "configs")], raising=False)
    written(chapter, "from train import Config\nconfig = Config(clip=0.25)\n", "of_mine.py")
    module = load_file(chapter / "of_mine.py")
    assert module.__name__ == "configs.growth.of_mine" and module is load_file(
        chapter / "of_mine.py"
    )
    assert importlib.import_module("configs.growth.of_mine") is module
    written(chapter, "config = 3\n", "of_1.3b.py")  # no name that can be imported
    assert load_file(chapter / "of_1.3b.py").config == 3
    del sys.modules["configs.growth.of_mine"], sys.modules["configs.growth"]


# ------------------------------------------------------------------------------------------ help


def help_of(capsys, *arguments: str) -> str:
    """What --help prints."""
    with pytest.raises(SystemExit) as ended:
        parse([*arguments, "--help"])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


def test_without_a_file_it_is_the_quickstart(capsys):
    config, file = parse([])
    assert (config.name, file) == ("quickstart", str(ROOT / "configs/quickstart.py"))
    assert config.model.forward is not model.llama
    assert "configs/baselines/strong.py: strong(" in help_of(capsys)


def test_help_lists_verbs_fields_and_functions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    said = help_of(capsys, str(ROOT / "configs/quickstart.py:plain"))
    for verb in verbs():
        assert f"\n  {verb} " in said
    for words in (
        "--model.layers INT",
        "blocks (default:",
        "--optimizer FUNCTION",
        "--eval_at",
        "lib/optim.py: adamw(table, *, b1=0.9, b2=0.95, eps=1e-08, weight_decay=0.1, frozen=(),",
        "embed_lr=10.0, base_width=64)",
        "phases.0.packing, phases.1.packing",
        "lib/sources.py: stdlib(*, unit='module')",
        "phases.0.schedule",
    ):
        assert words in said, words
    assert (
        "<function" not in said and "fixed" not in said and max(map(len, said.splitlines())) <= 100
    )


@pytest.mark.parametrize("file", SHIPPED)
def test_help_of_every_config(capsys, file):
    said = help_of(capsys, str(ROOT / file))
    assert (
        "Functions of this config" in said and "<function" not in said and "functools" not in said
    )


def test_help_of_a_file_with_a_function_config(capsys, tmp_path):
    said = help_of(capsys, written(tmp_path, FUNCTION))
    assert "--path VALUE, str, needed" in said and "--depth VALUE, int, 4 without it" in said


UNGUARDED = '''
from dataclasses import replace

from configs import base
from data import DataConfig, Document, Source
from train import train


def letters():
    for i in range(100):
        yield Document(str(i), 99 * chr(97 + i % 26))


data = DataConfig(sources={"letters": Source(letters)}, tokenizer="bytes", dev=0.1, test=0.1)
train(replace(base.small, model=base.shape(1, 32, 258), data=data, runs="RUNS", name="own"))
'''


def test_a_script_that_trains_while_it_is_loaded_is_told_how_not_to(tmp_path):
    """Its run loads it for its objective: without the refusal it would train again, without an end."""
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED.replace("RUNS", str(tmp_path)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    said = f"config file {script}, line 15: train() is called while unguarded.py is loaded"
    assert said in done.stderr and 'if __name__ == "__main__"' in done.stderr
