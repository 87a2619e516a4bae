"""Functions of a config are bound to the call of their extension point, and their settings to annotations."""
from functools import partial
from typing import Literal

import pytest

import data
import model
import train
from lib import seams
from lib.errors import InputError
from lib.fields import Count, Share, check_value, setting_types
from lib.study import Study


def no_row():
    """An objective that takes nothing."""


def one_more(row, rng, what):
    """An objective that is told less than it wants."""


def four_arguments(a, b, c, d):
    """Called with two."""


def bounded(row, rng, times: Count = 2, share: "Share" = 0.5, how: Literal["a", "b"] = "a",
            unknown: "Nowhere" = 1, tokenizer=None):  # noqa: F821
    return row, data.causal(row, rng)[1]


def told(row, rng, tokenizer, progress, log, document):
    return data.causal(row, rng)


def score_all(documents, tokens):
    return [1.0] * len(documents)


def config(**more) -> train.Config:
    """A config with a phase of these fields."""
    return train.Config(name="a", phases=(train.Phase(**more),))


def refused(made: train.Config) -> str:
    """What a config is refused by."""
    with pytest.raises(InputError) as caught:
        train.check(made)
    return str(caught.value)


@pytest.mark.parametrize("function, said", [
    (no_row, "phases.0.objective is no_row, which cannot be called as it is: too many positional arguments; "
             "it is called with (row, rng), and may ask for tokenizer, progress, log, document"),
    (one_more, "phases.0.objective is one_more, which is not told its what; allowed is a value for "
               "it: --phases.0.objective.what VALUE"),
    (partial(one_more, rng=3), "phases.0.objective is one_more, which is not told its what; allowed is"),
    (partial(told, rng=3), "phases.0.objective is told, which cannot be called as it is: "),
    (partial(bounded, times=2.5), "phases.0.objective.times is 2.5 (float); allowed is an integer"),
    (partial(bounded, times=0), "phases.0.objective.times is 0; allowed is an integer, 1 or more"),
    (partial(bounded, share=1.5), "phases.0.objective.share is 1.5; allowed is a finite number, 0 or more"),
    (partial(bounded, how="c"), "phases.0.objective.how is 'c' (str); allowed is 'a' or 'b'"),
])
def test_what_cannot_be_called_is_refused_with_its_config(function, said):
    assert refused(config(objective=function)).startswith(said)
    assert refused(config(objective={"stdlib": function})).startswith(
        said.replace("objective", "objective.stdlib"))


def test_what_can_be_called_is_allowed():
    for function in told, bounded, partial(bounded, times=3, share=1, unknown="?"):
        train.check(config(objective=function))


def test_an_annotation_that_nobody_can_read_hides_no_other():
    assert setting_types(bounded)["times"] == Count and setting_types(bounded)["share"] == Share


BOUND = {
    "optimizer": dict(optimizer=no_row),
    "reparam": dict(reparam=no_row),
    "token_loss": dict(token_loss=no_row),
    "reduce": dict(reduce=no_row),
    "gradient": dict(gradient=no_row),
    "evals.0": dict(evals=(no_row,)),
    "schedule.shape": dict(schedule=train.Schedule(shape=no_row)),
    "model.rows": dict(model=model.ModelConfig(rows=no_row)),
    "model.forward": dict(model=model.ModelConfig(forward=no_row)),
    "model.outputs": dict(model=model.ModelConfig(outputs=no_row)),
    "model.flops": dict(model=model.ModelConfig(flops=no_row)),
    "data.tokenizer": dict(data=data.DataConfig(tokenizer=four_arguments)),
    "data.sources.x.documents": dict(data=data.DataConfig(sources={"x": data.Source(four_arguments)})),
    "data.sources.x.prepare": dict(data=data.DataConfig(sources={"x": data.Source(data.stdlib, no_row)})),
    "data.sources.x.score": dict(data=data.DataConfig(sources={"x": data.Source(data.stdlib, score=no_row)})),
}
OF_PHASE = {
    "packing": dict(packing=no_row),
    "order": dict(order=no_row),
    "mixture": dict(mixture=no_row),
    "lengths": dict(lengths=four_arguments),
    "edits.0": dict(edits=(no_row,)),
    "repeat.0.apply": dict(repeat=(train.Edit(no_row),)),
    "token_loss": dict(token_loss=no_row),
    "reduce": dict(reduce=no_row),
}


@pytest.mark.parametrize("field", BOUND)
def test_each_field_knows_its_call(field):
    said = refused(train.Config(name="a", **BOUND[field]))
    assert said.startswith(f"{field} is ") and ("cannot be called" in said or "is not told" in said)


@pytest.mark.parametrize("field", OF_PHASE)
def test_each_field_of_a_phase_knows_its_call(field):
    said = refused(config(**OF_PHASE[field]))
    assert said.startswith(f"phases.0.{field} is ") and ("cannot be called" in said or "is not told" in said)


def test_a_conclusion_knows_its_call():
    with pytest.raises(InputError, match="^conclusions.law is no_row, which cannot be called as it is"):
        Study(question="?", arms={"a": train.Config()}, conclusions={"law": no_row})


def test_scores_of_many_are_called_with_two():
    check_value(data.Source(data.stdlib, score=score_all), data.Source, "x")


def test_every_extension_point_that_a_config_holds_is_one_of_the_list():
    """No field holds a function whose call is not known."""
    found = set()

    def look(hint):
        found.update(part for part in getattr(hint, "__metadata__", ()) if isinstance(part, seams.Seam))
        for part in getattr(hint, "__args__", ()) if not isinstance(hint, type) else ():
            look(part)

    configs = train.Config, train.Phase, train.Edit, train.Schedule
    for made in *configs, data.DataConfig, data.Source, model.ModelConfig:
        for hint in made.__annotations__.values():
            look(hint)
    every = {value for value in vars(seams).values() if isinstance(value, seams.Seam)}
    assert every - found == {seams.INIT, seams.MEASURE, seams.CONCLUSION, seams.CURVES}


@pytest.mark.parametrize("flags, said", [
    ("--phases.1.edits.0.times 2.5", "phases.1.edits.0.times is 2.5 (float); allowed is an integer"),
    ("--phases.1.edits.0.times 0", "phases.1.edits.0.times is 0; allowed"),
    ("--optimizer.eps -1", "optimizer.eps is -1.0; allowed is a finite number, more than 0"),
    ("--optimizer.b1 1", "optimizer.b1 is 1.0; allowed is a finite number, 0 or more, less than 1"),
    (f"--seed {2**64}", f"seed is {2**64}; allowed are integers of 64 bits"),
    (f"--seed {2**40}", f"seed is {2**40}; allowed is an integer, 0 or more, at most 4,294,967,295"),
    ("--model.layers 1000000000", "model.layers is 1000000000; allowed is an integer, 1 or more, at most"),
    (f"--schedule.peak {10**400}", "schedule.peak is 1000"),
    (f"--seed {10**4000}", "seed is 1000"),
    ("--prompts \udc80", "prompts.0 is '\\udc80'; allowed are integers of 64 bits, and texts of whole"),
])
def test_the_command_line_says_so_in_one_sentence(flags, said, capsys):
    assert train.main(["configs/quickstart.py:plain", *flags.split(" ")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}") and err.count("\n") == 1
