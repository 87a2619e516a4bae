"""How long a run is, where a config says it by tokens, passes or tokens a parameter."""

from dataclasses import replace

from data import Loader
from lib.errors import InputError
from lib.fields import Rules
from model import ModelConfig, count

WAYS = "tokens", "epochs", "tokens_per_param"


def asked(config) -> dict[str, float]:
    """{field: value} of what a `train.Config` says of its length; empty if its steps say it."""
    values = {name: getattr(config, name) for name in WAYS}
    return {name: value for name, value in values.items() if value}


def length_rules(config) -> Rules:
    """One thing alone says how long a run is, and can be known before it begins."""
    yield (len(asked(config)) > 1,
           f"a run is given {given(config)}; allowed is one of {', '.join(WAYS)}, or the steps of "
           "phases")
    yield (config.epochs and config.data.stream,
           f"epochs is {config.epochs:g}, but data.stream is true, so that the size of the sources "
           "is not known; allowed is tokens, or a cache that is built first")


def with_steps(config, loader: Loader, last: ModelConfig):
    """The config with its length as steps of its phases, each the same share of them as before.

    loader: of the config's phases. last: the model of the last one.
    """
    if not asked(config):
        return config
    sizes = [phase.batch * phase.seq for phase in config.phases]
    total = sum(phase.steps * size for phase, size in zip(config.phases, sizes, strict=True))
    # One of the three is not 0, see `length_rules`.
    wanted = config.tokens + config.tokens_per_param * count(last)
    if config.epochs:
        wanted = config.epochs * one_pass(loader)
    if wanted < min(sizes) / 2:
        raise InputError(
            f"{given(config)} comes to {wanted:,.0f} tokens; allowed is more than half a batch, "
            f"which has {min(sizes):,}"
        )
    phases = []
    for phase in config.phases:
        steps = round(phase.steps * wanted / total)
        phases.append(replace(phase, steps=max(1, steps)))
    none = dict.fromkeys(WAYS, 0.0)
    return replace(config, phases=tuple(phases), **none)


def given(config) -> str:
    """What a config says of its length, as "epochs 3"."""
    return " and ".join(f"{name} {value:g}" for name, value in asked(config).items())


def one_pass(loader: Loader) -> int:
    """The positions of one pass over the training documents, packed as in the first phase."""
    rows, lengths = loader.rows[0][0], loader.draws[0].lengths
    return sum(each.epoch for each in rows) * lengths[0]
