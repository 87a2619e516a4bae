"""The studies of rates and of scaling: what they conclude and draw of figures that are made up."""
from dataclasses import replace

import numpy as np
import pytest

from configs import base
from configs.baselines import scaling, schedule_and_decay, transfer
from lib.laws import Law
from model import count

pytestmark = pytest.mark.library

LAW = Law(0.9, 60.0, 0.35, 150.0, 0.38)


def figures_of(law: Law, seeds: int = 3) -> dict:
    """Figures of all arms of scaling.py, each run as a law has it."""
    found = {}
    for arm, config in scaling.study.arms.items():
        size, tokens = count(config.model), base.budget(config)
        own = dict(tokens=tokens, bpb=law.loss(size, tokens))
        own |= {"model/params": size, "flops": base.flops(config.model, config.phases[0])}
        found[arm] = {name: np.full(seeds, float(value)) for name, value in own.items()}
    return found


# ----------------------------------------------------------------------------------------- scaling


def test_the_law_that_runs_follow_is_found_and_foretells_d8():
    found = scaling.foretold(figures_of(LAW))
    for name, value in LAW._asdict().items():
        assert found[name] == pytest.approx(value, rel=1e-5)
    assert found["exponent of the best size"] == pytest.approx(0.38 / 0.73)
    best, each = found["best size at d8's FLOPs"], found["tokens a parameter there"]
    flops = base.flops(scaling.study.arms["d8_720k"].model, scaling.study.arms["d8_720k"].phases[0])
    assert best == pytest.approx(LAW.best_size(flops), rel=1e-5)
    assert 6 * best * (each * best) == pytest.approx(flops)
    assert found["missed"] == pytest.approx(0, abs=1e-8)
    assert found["worst of those fitted"] == pytest.approx(0, abs=1e-8)
    assert found["less a line's"] < -0.005  # a line over FLOPs has no room for the size


def test_d8_is_not_fitted():
    figures = figures_of(LAW)
    figures["d8_720k"]["bpb"] *= 1.1
    found = scaling.foretold(figures)
    assert found["a"] == pytest.approx(LAW.a, rel=1e-5)
    assert found["missed"] == pytest.approx(1 - 1 / 1.1)


def test_a_ready_config_is_measured_by_the_best_size_of_its_flops():
    """6 N D of 134,105,856 parameters and 4,800 x 512 x 1,024 tokens."""
    size, tokens = 134_105_856, 4_800 * 512 * 1_024
    best = LAW.best_size(6 * size * tokens)
    found = scaling.foretold(figures_of(LAW))
    assert found["124M over the best size, log10"] == pytest.approx(np.log10(size / best), abs=1e-4)
    for name in ("350M", "1.3B"):
        assert np.isfinite(found[f"{name} over the best size, log10"])


def test_the_curve_of_the_best_size_is_below_every_run_and_is_the_law():
    figures = figures_of(LAW)
    found = scaling.curves(figures)
    assert [*found] == ["d2", "d3", "d4", "d5", "d6", "d8", "d8, foretold", "best size, foretold"]
    assert [len(x) for x, _ in found.values()] == [3, 2, 2, 1, 1, 1, 1, 50]
    (flops,), (loss,) = found["d8, foretold"]
    assert flops == figures["d8_720k"]["flops"][0]
    assert loss == pytest.approx(figures["d8_720k"]["bpb"][0])
    across, best = found["best size, foretold"]
    size = LAW.best_size(across)
    assert best == pytest.approx(LAW.loss(size, across / 6 / size), rel=1e-6)
    for name in ("d2", "d3", "d4", "d5", "d6", "d8"):
        x, y = found[name]
        lowest = np.interp(x, across, best)
        assert np.all(np.mean(y, 1) > lowest - 0.01)


def test_the_arms_are_rungs_of_one_vocabulary_and_d8_is_the_largest():
    arms = scaling.study.arms
    assert all(config.model.vocab == 512 for config in arms.values())
    for arm, (depth, tokens) in scaling.RUNS.items():
        assert arms[arm] == base.ladder(depth, tokens, 512)
    sizes = {arm: count(config.model) for arm, config in arms.items()}
    lengths = {base.budget(config) for arm, config in arms.items() if arm.endswith("_720k")}
    assert sizes["d8_720k"] > 2 * max(sizes[arm] for arm in scaling.FITTED)
    assert max(lengths) < 1.01 * min(lengths)
    spent = sum(base.flops(config.model, config.phases[0]) for config in arms.values())
    assert 3 * spent == pytest.approx(6.5e13, rel=0.03)


# ------------------------------------------------------------------------------------------- rates


def bits(size: str, rate: float, seed: int) -> float:
    """A parabola over log(rate) that is least at 8e-3, more by what its size and its seed add."""
    added = 0.1 * [*transfer.SIZES].index(size) + 0.02 * seed
    return 1.5 + added + 0.03 * np.log2(rate / 8e-3) ** 2


def test_rates_are_drawn_by_what_they_lose_to_the_best_one():
    """What a seed adds to every rate is no part of it."""
    figures = {}
    for size in transfer.SIZES:
        for rate in transfer.RATES:
            own = [bits(size, rate, seed) for seed in range(3)]
            figures[transfer.arm(size, rate)] = {"bpb": np.array(own)}
    charts = transfer.study.charts
    assert [chart.title for chart in charts] == ["by width", "by depth", "by length"]
    for chart, sizes in zip(charts, transfer.GROUPS.values(), strict=True):
        found = chart.curves(figures)
        assert [name.split(",")[0] for name in found] == [*sizes]
        for x, y in found.values():
            assert tuple(x) == transfer.RATES
            expected = 0.03 * np.log2(np.array(transfer.RATES) / 8e-3) ** 2
            assert y == pytest.approx(np.tile(expected[:, None], 3), abs=1e-9)
    assert transfer.moves(figures) == pytest.approx(dict(width=1, depth=1, length=1))
    assert transfer.lost(figures) == pytest.approx(dict(most=0, short=0), abs=1e-9)
    rate = transfer.RATES.index(8e-3)
    figures[transfer.arm("short", transfer.RATES[rate])]["bpb"] += 0.2
    figures[transfer.arm("layers_8", transfer.RATES[rate])]["bpb"] += 0.1
    least = 0.03 * np.log2(5.7 / 8) ** 2
    assert transfer.lost(figures) == pytest.approx(dict(most=0.1 - least, short=0.2 - least))


# ---------------------------------------------------------------------------- schedule, decay, clip


def test_each_run_has_less_or_more_of_one_thing():
    """As its name says; all else is its control's."""
    arms = schedule_and_decay.study.arms
    assert len(arms) == 3 * 9
    for name, config in arms.items():
        size, _, what = name.partition("_")
        given = dict(no_decay=dict(optimizer=config.optimizer), more_decay=dict(optimizer=config.optimizer),
                     short_warmup=dict(schedule=config.schedule), long_warmup=dict(schedule=config.schedule),
                     short_fall=dict(schedule=config.schedule), long_fall=dict(schedule=config.schedule),
                     low_clip=dict(clip=0.25), no_clip=dict(clip=0.0))
        assert config == replace(arms[size], **given.get(what, {}))
        assert not what or config != arms[size]
    keywords = [arms[f"wide_{name}_decay"].optimizer.keywords for name in ("no", "more")]
    assert keywords == [dict(weight_decay=0.0), dict(weight_decay=0.3)]
    warmups = [arms[f"deep_{name}_warmup"].schedule.warmup for name in ("short", "long")]
    assert warmups == [13, 80]
    falls = [arms[f"narrow_{name}_fall"].schedule.decay for name in ("short", "long")]
    assert falls == [0.2, 0.65]
