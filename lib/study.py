"""What a study is: arms, a control, and claims that are written down before it is run.

A file of the library defines one, `study = Study(...)`. Whatever is misspelt in it is refused when
the file is loaded, by an InputError that names the field, what was found and what is allowed.
"""
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.config import parts
from lib.errors import InputError

# Measures that every study with held-out text has.
PAIRED = "bpb", "speed_up_flops", "speed_up_tokens"
ID = re.compile(r"\d{3}:\d+")  # how a paper is named in the project's lists, 001:39
# Fields by which a Config is known, since train.py may not be imported from here.
OF_CONFIG = "model", "data", "phases", "schedule"
# What the core writes into metrics.jsonl, after eval/SOURCE/, train/, perf/ and data/.
OF_EVAL = ("bpb", "bpb_se", "loss")
OF_STEP = ("loss", "grad_norm", "lr", "tokens", "flops", "skipped")
OF_SPEED = ("step_ms", "tokens_per_s", "host_stall", "mfu", "save_s")
OF_BATCH = ("waste", "truncated", "segments")


# ----------------------------------------------------------------------------------------- refusals

def allowed_names(found: Any, known: Iterable[str]) -> str:
    """What is allowed in the place of a name: the nearest one where one is near, or all of them."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(found), names, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"allowed are: {', '.join(names) or 'none'}"


def refuse(where: str, found: Any, allowed: str):
    """Raise the InputError for a field that has something else than is allowed there."""
    raise InputError(f"{where} is {found!r} ({type(found).__name__}); {allowed}")


def require(holds: bool, where: str, found: Any, allowed: str):
    """Refuse what was found in a field unless the condition holds."""
    if not holds:
        refuse(where, found, f"allowed is {allowed}")


def require_known(where: str, found: Any, known: Iterable[str]):
    """Refuse a name that is not one of those known."""
    known = list(known)
    if found not in known:
        raise InputError(f"{where} is {found!r}; {allowed_names(found, known)}")


def strict(made: type) -> type:
    """Let a dataclass refuse unknown and missing fields by an InputError, not a TypeError."""
    plain = made.__init__
    names = [f.name for f in dataclasses.fields(made)]
    needed = [f.name for f in dataclasses.fields(made)
              if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]

    @functools.wraps(plain)
    def checked(self, *values, **given):
        if len(values) > len(names):
            raise InputError(f"{made.__name__} is given {len(values)} values; "
                             f"allowed are: {', '.join(names)}")
        given = dict(zip(names, values, strict=False)) | given
        for name in given:
            if name not in names:
                raise InputError(f"{made.__name__} has no field {name!r}; "
                                 f"{allowed_names(name, names)}")
        for name in needed:
            if name not in given:
                raise InputError(f"{made.__name__} lacks its field {name!r}; "
                                 f"it needs: {', '.join(needed)}")
        plain(self, **given)

    made.__init__ = checked
    return made


def is_number(value: Any) -> bool:
    """Is this a finite number, and no truth value?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Is this an integer of 1 and more?"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_text(value: Any) -> bool:
    """Is this a string with something in it?"""
    return isinstance(value, str) and bool(value.strip())


# ---------------------------------------------------------------------------------------- the types

@strict
@dataclass(frozen=True)
class Paper:
    """A paper that a study is about."""

    title: str
    authors: str  # as the field cites them: "Du et al."
    year: int
    seeds: tuple[str, ...] = ()  # its numbers in the project's lists of papers, such as "001:39"

    def __post_init__(self):
        require(is_text(self.title), "paper.title", self.title, "a text")
        require(is_text(self.authors), "paper.authors", self.authors, "a text")
        require(is_count(self.year), "paper.year", self.year, "a year")
        a_tuple = isinstance(self.seeds, tuple)
        require(a_tuple, "paper.seeds", self.seeds, 'a tuple such as ("001:39",)')
        for i, name in enumerate(self.seeds):
            good = isinstance(name, str) and ID.fullmatch(name) is not None
            require(good, f"paper.seeds.{i}", name, 'a number such as "001:39"')


@strict
@dataclass(frozen=True)
class Claim:
    """What is expected of an arm: on which side of a bound its difference to a control lies."""

    says: str  # in words
    arm: str
    below: float | None = None  # the whole 95 % interval of arm less control is below this
    above: float | None = None  # ... or above this
    control: str = ""  # the arm it is compared to; empty: the study's control
    measure: str = "bpb"  # one of PAIRED, of the study's `measures`, or a metric of its runs

    def __post_init__(self):
        require(is_text(self.says), "a claim's says", self.says, "a text")
        bounds = [bound for bound in (self.below, self.above) if bound is not None]
        if len(bounds) != 1:
            raise InputError(f"the claim {self.says!r} has below={self.below} and "
                             f"above={self.above}; allowed is one of the two")
        known = is_number(bounds[0])
        require(known, f"the bound of the claim {self.says!r}", bounds[0], "a number")

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

    question: str  # what it is to find out
    arms: dict[str, Any]  # {name: train.Config}
    paper: Paper | tuple[Paper, ...] = ()
    control: str = ""  # the arm that the others are compared to; empty: the first
    default_arms: tuple[str, ...] = ()  # what runs without --arms, the control besides; empty: all
    peak_lrs: tuple[float, ...] = ()  # ascending, to tune each arm over; empty: each arm's own
    claims: Sequence[Claim] = ()
    measures: dict[str, Callable] = field(default_factory=dict)  # {name: rows -> float}
    tuned_by: str = ""  # the measure whose least value decides on a rate; empty: bpb on dev
    quick: dict[str, Any] = field(default_factory=dict)  # {field: value} to set with --quick
    teacher_flops: dict[str, float] = field(default_factory=dict)  # {arm: FLOPs spent elsewhere}
    seeds: int = 5  # paired seeds without --seeds

    def __post_init__(self):
        for check in (check_kinds, check_arms, check_numbers, check_claims, check_quick):
            check(self)

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


# --------------------------------------------------------------------------------------- the checks

def check_kinds(study: Study):
    """Refuse fields of another type than declared."""
    require(is_text(study.question), "question", study.question, "a text")
    for name in ("arms", "measures", "quick", "teacher_flops"):
        value = getattr(study, name)
        text_keys = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        require(text_keys, name, value, "a dictionary by name")
    for name in ("paper", "default_arms", "peak_lrs", "claims"):
        value = getattr(study, name)
        require(isinstance(value, (tuple, list, Paper)), name, value, "a tuple")
    for i, paper in enumerate(study.papers):
        require(isinstance(paper, Paper), f"paper.{i}", paper, "a Paper")
    for i, claim in enumerate(study.claims):
        require(isinstance(claim, Claim), f"claims.{i}", claim, "a Claim")


def check_arms(study: Study):
    """Refuse arms that are no configs, and names of arms that there are not."""
    require(bool(study.arms), "arms", study.arms, "one arm and more")
    for name, arm in study.arms.items():
        config = dataclasses.is_dataclass(arm) and all(hasattr(arm, part) for part in OF_CONFIG)
        require(config, f"arms.{name}", arm, "a Config")
    if study.control:
        require_known("control", study.control, study.arms)
    for i, name in enumerate(study.default_arms):
        require_known(f"default_arms.{i}", name, study.arms)
    for name, spent in study.teacher_flops.items():
        require_known("a name in teacher_flops", name, study.arms)
        good = is_number(spent) and spent >= 0
        require(good, f"teacher_flops.{name}", spent, "a number, 0 or more")


def check_numbers(study: Study):
    """Refuse rates that do not rise, less than one seed, and measures that are no functions."""
    rates = list(study.peak_lrs)
    positive = all(is_number(rate) and rate > 0 for rate in rates)
    rising = positive and rates == sorted(set(rates))
    require(rising, "peak_lrs", study.peak_lrs, "learning rates above 0, ascending")
    require(is_count(study.seeds), "seeds", study.seeds, "1 or more, 2 or more for intervals")
    for name, measure in study.measures.items():
        require(callable(measure), f"measures.{name}", measure, "a function of rows")
        other = f"a name that is none of {', '.join(PAIRED)}"
        require(name not in PAIRED, "a name in measures", name, other)
    if study.tuned_by:
        require_known("tuned_by", study.tuned_by, study.measures)
    elif len(rates) > 1:
        for name, arm in study.arms.items():
            require(arm.data.dev > 0, f"data.dev of the arm {name!r}", arm.data.dev,
                    "a share to tune its rate on, or a study without peak_lrs")


def check_claims(study: Study):
    """Refuse claims about arms that there are not, or by measures that these do not have."""
    for i, claim in enumerate(study.claims):
        require_known(f"claims.{i}.arm", claim.arm, study.arms)
        if claim.control:
            require_known(f"claims.{i}.control", claim.control, study.arms)
        control = study.control_of(claim)
        require(claim.arm != control, f"claims.{i}.arm", claim.arm, "another arm than its control")
        for arm in (claim.arm, control):
            check_measure(study, f"claims.{i}.measure", claim.measure, arm)


def check_measure(study: Study, where: str, name: str, arm: str):
    """Refuse a measure that the runs of an arm cannot have.

    Functions of the arm's own (`evals`, `reduce`) may write metrics of any name but the core's.
    Whether they do is seen when the first run has ended.
    """
    config = study.arms[arm]
    known = [*study.measures, *metrics_of(config)]
    if name in known or (isinstance(name, str) and may_be_its_own(config, name)):
        return
    raise InputError(f"{where} is {name!r}, which a run of the arm {arm!r} does not have; "
                     f"{allowed_names(name, known)}")


def metrics_of(config: Any) -> list[str]:
    """What the core can say of a config's runs: the paired measures, and names in metrics.jsonl."""
    names = measured_names(config) + [f"train/{of}" for of in OF_STEP]
    names += [f"perf/{of}" for of in OF_SPEED]
    names += [f"data/{of}" for of in OF_BATCH]
    names += ["model/params", *group_names(config)]
    sources = list(config.data.sources)
    if len(sources) > 1:
        names += [f"data/{source}/rows" for source in sources]
    return names


def measured_names(config: Any) -> list[str]:
    """The names of what is measured on held-out documents, where a config holds any out."""
    sources, paired, names = list(config.data.sources), [], []
    if config.data.test:
        paired += PAIRED[:1]
        names += [f"eval/{source}.test/{of}" for source in sources for of in OF_EVAL]
    if config.data.dev:
        paired += PAIRED[1:]
        names += [f"eval/{source}/{of}" for source in sources for of in OF_EVAL]
    return paired + names


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


def check_quick(study: Study):
    """Refuse a field of `quick` that an arm does not have."""
    for path in study.quick:
        for arm, config in study.arms.items():
            for one in every_phase(path, len(config.phases)):
                check_path(config, one, f"quick has {path!r}, but the arm {arm!r}")


def every_phase(path: str, phases: int) -> list[str]:
    """The fields that a path of `quick` means: phases.*.x is that of each phase."""
    head, star, rest = path.partition(".*.")
    if head != "phases" or not star:
        return [path]
    return [f"phases.{i}.{rest}" for i in range(phases)]


def check_path(config: Any, path: str, sentence: str):
    """Refuse a dotted path that leads to no field of a config."""
    value = config
    for name in path.split("."):
        inside = parts(value)
        if name not in inside:
            raise InputError(f"{sentence} has no field {path!r}; {allowed_names(name, inside)}")
        value, _ = inside[name]
