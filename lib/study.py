"""What a study is: arms, a control, and claims that are written down before it is run.

A file of the library defines one, `study = Study(...)`. Whatever is misspelt in it is refused when
the file is loaded, by an InputError that names the field, what was found and what is allowed.
"""
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from lib.config import parts
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

# Measures that every study with held-out text has.
PAIRED = "bpb", "speed_up_flops", "speed_up_tokens"
Text = Annotated[str, Bound(str.strip, "not empty")]
# How a paper is named in the project's lists.
Number = Annotated[str, Bound(re.compile(r"\d{3}:\d+").fullmatch, 'such as "001:39"')]
# Fields by which a Config is known, since train.py may not be imported from here.
OF_CONFIG = "model", "data", "phases", "schedule"
# What the core writes into metrics.jsonl, after eval/SOURCE/, train/, perf/ and data/.
OF_EVAL = ("bpb", "bpb_se", "loss")
OF_STEP = ("loss", "grad_norm", "lr", "tokens", "flops", "skipped")
OF_SPEED = ("step_ms", "tokens_per_s", "host_stall", "mfu", "save_s")
OF_BATCH = ("waste", "truncated", "segments")


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
    """What is expected of an arm: on which side of a bound its difference to a control lies."""

    says: Text  # in words
    arm: str
    below: float | None = None  # the whole 95 % interval of arm less control is below this
    above: float | None = None  # ... or above this
    control: str = ""  # the arm it is compared to; empty: the study's control
    measure: str = "bpb"  # one of PAIRED, of the study's `measures`, or a metric of its runs

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
class Study:
    """Arms that are run at equal seeds and compared, each at its own best peak learning rate.

    A measure is a function of the rows of a run's metrics.jsonl. In `quick`, phases.*.steps means
    the steps of each phase. `teacher_flops` is what was spent on a teacher or a run to start from.
    """

    question: Text  # what it is to find out
    arms: dict[str, Any]  # {name: train.Config}
    paper: tuple[Paper, ...] | Paper = ()
    control: str = ""  # the arm that the others are compared to; empty: the first
    default_arms: tuple[str, ...] = ()  # what runs without --arms, the control besides; empty: all
    peak_lrs: tuple[Positive, ...] = ()  # ascending, to tune each arm over; empty: each arm's own
    claims: Sequence[Claim] = ()
    measures: dict[str, Callable] = field(default_factory=dict)  # {name: rows -> float}
    tuned_by: str = ""  # the measure whose least value decides on a rate; empty: bpb on dev
    quick: dict[str, Any] = field(default_factory=dict)  # {field: value} to set with --quick
    teacher_flops: dict[str, NotNegative] = field(default_factory=dict)  # {arm: FLOPs elsewhere}
    seeds: Count = 5  # paired seeds without --seeds

    def __post_init__(self):
        for name, hint in field_types(Study).items():
            if name not in ("arms", "measures"):  # what these hold is checked when they run
                check_value(getattr(self, name), hint, name)
        for rules in arm_rules, measure_rules, claim_rules, quick_rules:
            require(rules(self))

    @property
    def papers(self) -> tuple[Paper, ...]:
        """The papers, also where there is one."""
        return (self.paper,) if isinstance(self.paper, Paper) else self.paper

    @property
    def first(self) -> str:
        """The arm that the others are compared to."""
        return self.control or next(iter(self.arms))

    def control_of(self, claim: Claim) -> str:
        """The arm that a claim compares its arm to."""
        return claim.control or self.first


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
        config = dataclasses.is_dataclass(arm) and all(hasattr(arm, part) for part in OF_CONFIG)
        yield not config, f"arms.{name} is {arm!r}; allowed is a Config"
    if study.control:
        yield known("control", study.control, arms)
    for i, name in enumerate(study.default_arms):
        yield known(f"default_arms.{i}", name, arms)
    for name in study.teacher_flops:
        yield known("a name in teacher_flops", name, arms)


def measure_rules(study: Study) -> Rules:
    """Measures are functions, and rates rise and have something to be tuned by."""
    rates, measures = study.peak_lrs, study.measures
    yield (list(rates) != sorted(set(rates)),
           f"peak_lrs is {rates}; allowed is learning rates above 0, ascending")
    yield (not isinstance(measures, dict),
           f"measures is {measures!r}; allowed is a dictionary by name")
    for name, measure in measures.items():
        yield (not callable(measure),
               f"measures.{name} is {measure!r}; allowed is a function of rows")
        yield (name in PAIRED, f"a name in measures is {name!r}; "
                               f"allowed is a name that is none of {', '.join(PAIRED)}")
    if study.tuned_by:
        yield known("tuned_by", study.tuned_by, measures)
    elif len(rates) > 1:
        for name, arm in study.arms.items():
            yield (arm.data.dev <= 0,
                   f"data.dev of the arm {name!r} is {arm.data.dev}; allowed is a share to tune "
                   "its rate on, or a study without peak_lrs")


def claim_rules(study: Study) -> Rules:
    """Claims are about arms that there are, by measures that these have."""
    for i, claim in enumerate(study.claims):
        at, control = f"claims.{i}", study.control_of(claim)
        yield known(f"{at}.arm", claim.arm, study.arms)
        yield known(f"{at}.control", control, study.arms)
        yield (claim.arm == control,
               f"{at}.arm is {claim.arm!r}; allowed is another arm than its control")
        for arm in (claim.arm, control):
            yield measure_rule(study, f"{at}.measure", claim.measure, arm)


def measure_rule(study: Study, where: str, name: str, arm: str) -> tuple[bool, str]:
    """The rule that the runs of an arm have a measure.

    Functions of the arm's own (`evals`, `reduce`) may write metrics of any name but the core's.
    Whether they do is seen when the first run has ended.
    """
    config = study.arms[arm]
    names = [*study.measures, *metrics_of(config)]
    broken = name not in names and not may_be_its_own(config, name)
    return broken, (f"{where} is {name!r}, which a run of the arm {arm!r} does not have; "
                    f"{allowed_names(name, names)}")


def metrics_of(config: Any) -> list[str]:
    """What the core can say of a config's runs: the paired measures, and names in metrics.jsonl."""
    sources, names, splits = list(config.data.sources), [], []
    if config.data.test:
        names += PAIRED[:1]
        splits.append(".test")
    if config.data.dev:
        names += PAIRED[1:]
        splits.append("")
    names += [f"eval/{name}{end}/{of}" for end in splits for name in sources for of in OF_EVAL]
    for kind, of_kind in {"train": OF_STEP, "perf": OF_SPEED, "data": OF_BATCH}.items():
        names += [f"{kind}/{of}" for of in of_kind]
    names += ["model/params", *group_names(config)]
    if len(sources) > 1:
        names += [f"data/{source}/rows" for source in sources]
    return names


def group_names(config: Any) -> list[str]:
    """The names of what is written for each optimiser group."""
    groups = ["embed", "matrix", "vector"]
    if not config.model.tied:
        groups.append("head")
    names = [f"{group}/grad_norm" for group in groups]
    if any(phase.edits or phase.repeat for phase in config.phases):
        names += [f"{group}/update_ratio" for group in groups]
    return names


def may_be_its_own(config: Any, name: str) -> bool:
    """May this metric be written by the config's own `evals` or `reduce`?"""
    default = {f.name: f.default for f in dataclasses.fields(config)}
    if not config.evals and config.reduce is default["reduce"]:
        return False
    heads = ["train/", "data/", "perf/", "model/", "speed_up_"]  # the core's
    heads += [f"eval/{source}{end}/" for source in config.data.sources for end in ("", ".test")]
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
