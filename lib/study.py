"""What a study is: arms, a control, and claims that are written down before it is run.

A file of the library defines one, `study = Study(...)`. Whatever is misspelt in it is refused when
the file is loaded, by an InputError that names the field, what was found and what is allowed.

The least of one is a question and arms. These then run with 5 paired seeds, each arm at its own
schedule.peak, and are compared to the first one in bits per byte. `seeds` is how many, at full
size; `peak_lrs` tunes each arm's rate over a grid first; `measures` are figures besides.

Runs to start from or to read, such as a teacher, are `needs`. A config says where it needs one by
the text "needs:NAME", "needs:NAME@STEP" for a checkpoint, or "needs:NAME/FILE": in `init_from`, or
wherever it takes a text. The study makes it first and puts its directory there. A needed run has
the seed of the run that needs it and its own peak learning rate, and may need others itself. Its
FLOPs are added to those of each arm that needs it, in full and once.

    Study(question="Does a teacher help?", needs={"teacher": large}, arms={
        "plain": small, "taught": replace(small, init_from="needs:teacher")})

A conclusion is drawn from all arms at once, such as a law fitted over sizes. It is a function

    figures -> number, or {name: number}      figures: {arm: {measure: float64 [seeds]}}

of the seeds that every arm ended with; the measures are those of a claim but the speed-ups. It is
called on resamples of the seeds, the same ones in each arm, for its 95 % interval.

A study with `charts` is drawn by these, in the place of a curve for each arm: what its figures are
plotted over is a function too.
"""
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from lib.config import parts, walk
from lib.errors import InputError
from lib.fields import (
    Bound,
    Count,
    NotNegative,
    Positive,
    Rules,
    allowed_names,
    check_value,
    field_types,
    require,
    strict,
)
from lib.keys import run_step
from lib.length import asked
from lib.seams import CONCLUSION, CURVES
from model import groups

# Measures that every study with held-out text has.
PAIRED = "bpb", "speed_up_flops", "speed_up_tokens"
# Figures of any run, those of what it needs added to its FLOPs.
OF_RUN = "tokens", "flops"
# How a config names a run of the study's `needs`.
NEED = "needs:"
Text = Annotated[str, Bound(str.strip, "not empty")]
# How a paper is named in the project's lists.
Number = Annotated[str, Bound(re.compile(r"\d{3}:\d+").fullmatch, 'such as "001:39"')]
# Fields by which a Config is known, since train.py may not be imported from here.
OF_CONFIG = "model", "data", "phases", "schedule"
# Fields whose values are checked by the rules below.
UNCHECKED = "arms", "needs", "measures"
# What the core writes into metrics.jsonl, after eval/SOURCE/, train/, perf/ and data/.
OF_EVAL = ("bpb", "bpb_se", "loss")
OF_STEP = ("loss", "grad_norm", "lr", "tokens", "flops", "skipped")
OF_SPEED = ("step_ms", "tokens_per_s", "host_stall", "mfu", "save_s")
OF_BATCH = ("waste", "truncated", "segments")
OF_MODEL = ("params", "trained", "opt_bytes")
OF_KIND = {"train": OF_STEP, "perf": OF_SPEED, "data": OF_BATCH, "model": OF_MODEL}


# ---------------------------------------------------------------------------------------- the types

@strict
@dataclass(frozen=True)
class Paper:
    """A paper that a study is about."""

    title: Text
    authors: Text  # as the field cites them: "Du et al."
    year: Count
    seeds: tuple[Number, ...] = ()  # its numbers in the project's lists of papers

    def __post_init__(self):
        check_value(self, Paper, "paper")


@strict
@dataclass(frozen=True)
class Claim:
    """What is expected: on which side of a bound a figure's whole 95 % interval lies.

    The figure is an arm's measure less its control's. With control=None it is the arm's alone:
    Claim(says="it reads", arm="large", control=None, measure="own/accuracy", above=0.9). Without
    an arm it is a conclusion: Claim(says="loss falls", measure="slope", below=0.0).
    """

    says: Text  # in words
    arm: str = ""  # empty: the claim is about a conclusion
    below: float | None = None  # the whole interval is below this
    above: float | None = None  # ... or above this
    control: str | None = ""  # arm compared to; empty: the study's control; None: nothing
    # one of PAIRED and OF_RUN, of the study's `measures`, a metric of its runs, or a conclusion,
    # NAME or "NAME: KEY" of those that give several numbers
    measure: str = "bpb"

    def __post_init__(self):
        check_value(self, Claim, "claim")
        if (self.below is None) == (self.above is None):
            raise InputError(f"the claim {self.says!r} has below={self.below} and "
                             f"above={self.above}; allowed is one of the two")

    @property
    def bound(self) -> dict[str, float]:
        """The bound by its side."""
        if self.above is None:
            return {"below": self.below}
        return {"above": self.above}


@strict
@dataclass(frozen=True)
class Chart:
    """A panel of study.png, drawn from the figures of all arms as a conclusion is.

    Each curve has places x and values y, or y of each seed, which are shown by their mean and its
    95 % interval. The horizontal axis is logarithmic.
    """

    title: Text
    curves: Annotated[Callable, CURVES]  # figures -> {name: (x [n], y [n] or y [n seeds])}
    across: Text  # what the horizontal axis has
    up: Text = "bits per byte"  # what the vertical one has

    def __post_init__(self):
        check_value(self, Chart, "chart")


@strict
@dataclass(frozen=True)
class Study:
    """Arms that are run at equal seeds and compared, each at its own best peak learning rate.

    A measure is a function of the rows of a run's metrics.jsonl, or the name of a metric whose last
    value it is, such as "model/trained". In `quick`, phases.*.steps means the steps of each phase;
    a needed run takes of it what it has fields for. `teacher_flops` is what was spent on a run that
    the study does not make.
    """

    question: Text  # what it is to find out
    arms: dict[str, Any]  # {name: train.Config}
    paper: tuple[Paper, ...] | Paper = ()
    control: str = ""  # the arm that the others are compared to; empty: the first
    default_arms: tuple[str, ...] = ()  # what runs without --arms, the control besides; empty: all
    peak_lrs: tuple[Positive, ...] = ()  # ascending, to tune each arm over; empty: each arm's own
    claims: Sequence[Claim] = ()
    # {name: rows -> float, or a metric}
    measures: dict[str, Callable | str] = field(default_factory=dict)
    tuned_by: str = ""  # the measure whose least value decides on a rate; empty: bpb on dev
    quick: dict[str, Any] = field(default_factory=dict)  # {field: value} to set with --quick
    teacher_flops: dict[str, NotNegative] = field(default_factory=dict)  # {arm: FLOPs elsewhere}
    seeds: Count = 5  # paired seeds without --seeds
    needs: dict[str, Any] = field(default_factory=dict)  # {name: train.Config}, made first
    # {what it says: function}
    conclusions: dict[str, Annotated[Callable, CONCLUSION]] = field(default_factory=dict)
    charts: Sequence[Chart] = ()  # what study.png shows in the place of a curve for each arm

    def __post_init__(self):
        for name, hint in field_types(Study).items():
            if name not in UNCHECKED:
                check_value(getattr(self, name), hint, name)
        for rules in arm_rules, need_rules, measure_rules, claim_rules, quick_rules:
            require(rules(self))

    @property
    def papers(self) -> tuple[Paper, ...]:
        """The papers, also where there is one."""
        return (self.paper,) if isinstance(self.paper, Paper) else self.paper

    @property
    def first(self) -> str:
        """The arm that the others are compared to."""
        return self.control or next(iter(self.arms))

    def control_of(self, claim: Claim) -> str | None:
        """The arm that a claim compares its arm to; None where it is compared to none."""
        if claim.control is None or not claim.arm:
            return None
        return claim.control or self.first

    def config_of(self, name: str) -> Any:
        """The config of an arm or of a needed run, which has another name than any arm."""
        return self.arms.get(name) or self.needs[name]

    def needed_by(self, name: str) -> list[str]:
        """The needed runs of an arm or of another one, those that they need among them."""
        found, todo = [], [name]
        while todo:
            for need in needs_of(self.config_of(todo.pop())).values():
                if need not in found:
                    found.append(need)
                    todo.append(need)
        return found


def need_named(text: Any) -> tuple[str, str] | None:
    """("base", "@100") of "needs:base@100"; None for what names no needed run."""
    if not isinstance(text, str) or not text.startswith(NEED):
        return None
    run, slash, file = text.removeprefix(NEED).partition("/")
    name, _ = run_step(run)
    return name, run.removeprefix(name) + slash + file


def needs_of(config: Any) -> dict[str, str]:
    """{field: the needed run that it names} of a config, those within its functions too."""
    found = {}
    for path, value, _ in walk(config):
        named = need_named(value)
        if named:
            found[path] = named[0]
    return found


# ---------------------------------------------------------------------------------------- the rules

def known(where: str, found: str, names) -> tuple[bool, str]:
    """The rule that a name is one of those known."""
    return found not in names, f"{where} is {found!r}; {allowed_names(found, names)}"


def arm_rules(study: Study) -> Rules:
    """Arms are configs, and arms that are named exist."""
    arms = study.arms
    yield (not isinstance(arms, dict) or not arms,
           f"arms is {arms!r}; allowed is one arm and more, a dictionary by name")
    for name, arm in arms.items():
        yield config_rule(f"arms.{name}", arm)
    if study.control:
        yield known("control", study.control, arms)
    for i, name in enumerate(study.default_arms):
        yield known(f"default_arms.{i}", name, arms)
    for name in study.teacher_flops:
        yield known("a name in teacher_flops", name, arms)


def config_rule(where: str, value: Any) -> tuple[bool, str]:
    """The rule that a value is a Config."""
    config = dataclasses.is_dataclass(value) and all(hasattr(value, part) for part in OF_CONFIG)
    return not config, f"{where} is {value!r}; allowed is a Config"


def need_rules(study: Study) -> Rules:
    """What is needed is there, and needs nothing that needs it."""
    needs = study.needs
    yield (not isinstance(needs, dict),
           f"needs is {needs!r}; allowed is a dictionary by name, each value a Config")
    for name, config in needs.items():
        yield config_rule(f"needs.{name}", config)
        yield (name in study.arms, f"a name in needs is {name!r}, which is an arm's; "
                                   "allowed is another name, also for an equal config")
    for kind, configs in {"arms": study.arms, "needs": needs}.items():
        for name, config in configs.items():
            yield (asked(config),
                   f"{kind}.{name} says how long it is by {', '.join(asked(config))}; allowed in a "
                   "study are steps, which are known before its runs (configs/base.py: steps_for)")
            for path, need in needs_of(config).items():
                yield known(f"the run needed by {kind}.{name}.{path}", need, needs)
    for name in needs:
        yield (name in study.needed_by(name),
               f"needs.{name} needs itself, by way of {', '.join(study.needed_by(name))}; "
               "allowed are runs that can be made one after the other")


def unmet_rules(config: Any, file: str) -> Rules:
    """A run made by hand needs none that its study makes first. file: FILE or FILE:ARM."""
    file = file.partition(":")[0]
    for path, need in needs_of(config).items():
        yield (True,
               f"{path} is '{NEED}{need}', a run that `python train.py study {file}` makes first; "
               f"by hand, `python train.py {file}:{need}` makes one, and --{path} RUN names it")


def measure_rules(study: Study) -> Rules:
    """Measures are functions, and rates rise and have something to be tuned by."""
    rates, measures = study.peak_lrs, study.measures
    yield (list(rates) != sorted(set(rates)),
           f"peak_lrs is {rates}; allowed is learning rates above 0, ascending")
    yield (not isinstance(measures, dict),
           f"measures is {measures!r}; allowed is a dictionary by name")
    for name, measure in measures.items():
        if isinstance(measure, str):
            for arm in study.arms:
                yield metric_rule(study.arms[arm], f"measures.{name}", measure, arm)
        else:
            yield (not callable(measure),
                   f"measures.{name} is {measure!r}; allowed is a function of rows, or a metric")
        taken = *PAIRED, *OF_RUN
        yield (name in taken, f"a name in measures is {name!r}; "
                              f"allowed is a name that is none of {', '.join(taken)}")
    if study.tuned_by:
        yield known("tuned_by", study.tuned_by, measures)
    elif len(rates) > 1:
        for name, arm in study.arms.items():
            yield (not arm.data.dev and not arm.data.held_out,
                   f"data.dev of the arm {name!r} is {arm.data.dev}; allowed is a share to tune "
                   "its rate on, or a study without peak_lrs")


def claim_rules(study: Study) -> Rules:
    """Claims are about arms that there are, by measures that these have."""
    for i, claim in enumerate(study.claims):
        at, control = f"claims.{i}", study.control_of(claim)
        if not claim.arm:
            yield (not concluded(claim.measure, study.conclusions),
                   f"{at} has no arm, and its measure {claim.measure!r} is no conclusion; "
                   f"{allowed_names(claim.measure, study.conclusions)}")
            continue
        yield known(f"{at}.arm", claim.arm, study.arms)
        yield measure_rule(study, f"{at}.measure", claim.measure, claim.arm)
        if control is None:
            yield (claim.measure.startswith("speed_up_"),
                   f"{at}.measure is {claim.measure!r}, which compares two arms; "
                   "allowed is a figure of one arm, or a control")
            continue
        yield known(f"{at}.control", control, study.arms)
        yield (claim.arm == control,
               f"{at}.arm is {claim.arm!r}; allowed is another arm than its control")
        yield measure_rule(study, f"{at}.measure", claim.measure, control)


def concluded(name: str, conclusions) -> bool:
    """Is this a conclusion, or one of the numbers that it may give?"""
    return any(name == known or name.startswith(f"{known}: ") for known in conclusions)


def measure_rule(study: Study, where: str, name: str, arm: str) -> tuple[bool, str]:
    """The rule that the runs of an arm have a measure.

    Functions of the arm's own (`evals`, `reduce`, `gradient`) may write metrics of any name but the
    core's. Whether they do is seen when the first run has ended.
    """
    return metric_rule(study.arms[arm], where, name, arm, (*study.measures, *OF_RUN))


def metric_rule(config: Any, where: str, name: str, arm: str, more=()) -> tuple[bool, str]:
    """The rule that the runs of an arm have a metric, or that its name is one of `more`."""
    own = [f"eval/{source}/own" for source in config.data.sources]  # of a loss of its own
    names = [*metrics_of(config), *own, *more]
    broken = name not in names and not may_be_its_own(config, name)
    return broken, (f"{where} is {name!r}, which a run of the arm {arm!r} does not have; "
                    f"{allowed_names(name, names)}")


def metrics_of(config: Any) -> list[str]:
    """What the core can say of a config's runs: the paired measures, and names in metrics.jsonl."""
    sources = list(config.data.sources)
    names = held_out_names(config.data)
    for kind, of_kind in OF_KIND.items():
        names += [f"{kind}/{of}" for of in of_kind]
    names += group_names(config)
    if len(sources) > 1:
        names += [f"data/{source}/rows" for source in sources]
    return names


def held_out_names(data: Any) -> list[str]:
    """What is measured on held-out text: the paired measures, and names in metrics.jsonl."""
    names, splits = [], []
    if data.test or data.held_out:
        names += PAIRED[:1]
        splits.append(".test")
    if data.dev or data.held_out:
        names += PAIRED[1:]
        splits.append("")
    for end in splits:
        for source in data.sources | data.held_out:
            names += [f"eval/{source}{end}/{of}" for of in OF_EVAL]
    return names


def group_names(config: Any) -> list[str]:
    """The names of what is written for each optimiser group."""
    known = groups(config.model)
    names = [f"{group}/grad_norm" for group in known]
    if any(phase.edits or phase.repeat for phase in config.phases):
        names += [f"{group}/update_ratio" for group in known]
    return names


def may_be_its_own(config: Any, name: str) -> bool:
    """May this metric be written by the config's own functions?"""
    default = {f.name: f.default for f in dataclasses.fields(config)}
    functions = [*config.evals, config.gradient, *(phase.reduce for phase in config.phases)]
    if not any(functions) and config.reduce is default["reduce"]:
        return False
    heads = ["train/", "data/", "perf/", "model/", "speed_up_"]  # the core's
    measured = config.data.sources | config.data.held_out
    heads += [f"eval/{source}{end}/" for source in measured for end in ("", ".test")]
    return not name.startswith(tuple(heads))


def quick_rules(study: Study) -> Rules:
    """Each arm has the fields of `quick`."""
    for path in study.quick:
        for arm, config in study.arms.items():
            for one in every_phase(path, len(config.phases)):
                yield path_rule(config, one, f"quick has {path!r}, but the arm {arm!r}")


def every_phase(path: str, phases: int) -> list[str]:
    """The fields that a path of `quick` means: phases.*.x is that of each phase."""
    head, star, rest = path.partition(".*.")
    if head != "phases" or not star:
        return [path]
    return [f"phases.{i}.{rest}" for i in range(phases)]


def path_rule(config: Any, path: str, subject: str) -> tuple[bool, str]:
    """The rule that a dotted path leads to a field of a config."""
    value = config
    for name in path.split("."):
        inside = parts(value)
        if name not in inside:
            return True, f"{subject} has no field {path!r}; {allowed_names(name, inside)}"
        value, _ = inside[name]
    return False, ""
