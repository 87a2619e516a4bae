"""A study on its page: charts that a phone shows, units, names of marks, what lies above a chart."""
import json
import re

import numpy as np
import pytest

from lib.charts import HEIGHT, WIDTH, Line, chart, frame_of, short, ticks
from lib.config import ROOT, load_file
from lib.statistics import dev_curve, gap_curve

report = load_file(ROOT / "tools/report.py")
STYLE = (ROOT / "tools/report.html").read_text("utf-8").split("<style>")[1].split("</style>")[0]


def runs(*curves: list[float]) -> dict:
    """An arm's runs in a study's result, by seed, with evaluations at 100, 200 ... tokens."""
    found = {}
    for seed, dev in enumerate(curves, 1):
        tokens = [100.0 * (i + 1) for i in range(len(dev))]
        curve = {"dev": dev, "tokens": tokens, "flops": [1e6 * x for x in tokens]}
        found[str(seed)] = {"run": f"x-s{seed}", "curve": curve}
    return found


def test_differences_to_the_control_are_paired_by_seed():
    control, arm = runs([3.0, 2.0], [3.2, 2.4]), runs([2.5, 1.9], [2.9, 2.1])
    points, mean = dev_curve(arm, "tokens")
    assert points.tolist() == [100, 200]
    np.testing.assert_allclose(mean, [2.7, 2.0])
    _, mean, half = gap_curve(arm, control, ["1", "2"], "tokens")
    np.testing.assert_allclose(mean, [-0.4, -0.2])
    np.testing.assert_allclose(half, 12.7062 * np.array([0.1, 0.1]), rtol=1e-4)
    assert dev_curve({"1": {"run": "x"}}, "tokens") is None


def test_ticks_are_round_and_short():
    assert ticks(0.0, 10.0) == [0, 2.5, 5, 7.5, 10]
    np.testing.assert_allclose(ticks(1.83, 2.61), [2, 2.2, 2.4, 2.6])
    assert [short(x) for x in (0.0, 2.5, 748e3, 1.5e6, 2e12)] == ["0", "2.5", "748k", "1.5M", "2e12"]


STEEP = np.array([9.0, 2.4, 2.2, 2.1, 2.0, 1.9])
PLACES = np.array([1.0, 20.0, 40.0, 60.0, 80.0, 100.0])


def test_a_curve_that_begins_above_the_chart_says_so():
    line = Line("grown & <b>", 1, PLACES, STEEP)
    assert frame_of([line], zero=False).high < 3
    figure = chart("Dev (bits per byte)", "training tokens", [line])
    assert "grown &amp; &lt;b&gt;; starts above the chart, at 9.00" in figure
    flat = Line("flat", 0, PLACES, np.array([2.5, 2.4, 2.2, 2.1, 2.0, 1.9]))
    assert "above the chart" not in chart("Dev", "tokens", [flat])


def test_points_lie_where_their_values_are():
    line = Line("a", 0, np.array([50.0, 100.0]), np.array([-1.0, 1.0]), np.array([0.5, 0.5]),
                (100.0, 1.0, 0.5))
    frame = frame_of([line], zero=True)
    assert frame.low < -1.5 and frame.high > 1.5
    figure = chart("Less plain's", "tokens", [line], zero=True)
    (curve,) = re.findall('polyline class=curve .*?points="(.*?)"', figure)
    pairs = [tuple(map(float, pair.split(","))) for pair in curve.split()]
    for (x, y), value in zip(pairs, ((50.0, -1.0), (100.0, 1.0)), strict=True):
        assert x == pytest.approx(frame.x(value[0]), abs=0.06)
        assert y == pytest.approx(frame.y(value[1]), abs=0.06)
    assert 'class="zero"' in figure and "polygon class=band" in figure


def test_a_phone_shows_a_chart_s_text_as_large_as_it_says():
    """The box is no wider than a phone's page, and no text in it is smaller than 11 pixels."""
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in chart("a", "b", [Line("c", 0, PLACES, STEEP)])
    assert WIDTH <= 352  # of 400: without the margins of the page and the figure
    assert "@media (max-width: 600px)" in STYLE and "prefers-color-scheme: dark" in STYLE
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", STYLE)]
    assert min(sizes) >= 11
    assert "width=device-width" in (ROOT / "tools/report.html").read_text("utf-8")


def a_result() -> dict:
    """A study's study.json, as far as the page reads it."""
    less = {"bpb": {"mean": -0.3, "half": 0.1, "values": {"1": -0.2, "2": -0.4}}}
    less |= dict.fromkeys(["speed_up_flops", "speed_up_tokens"], {"mean": 0.2, "half": 0.1})
    common = dict(rate=0.01, bracketed=True, tokens=200.0, flops=2e8, bpb=(2.0, 0.1))
    arms = {
        "plain": common | dict(runs=runs([3.0, 2.0], [3.2, 2.4]), less_control={"bpb": {}}),
        "grown": common | dict(runs=runs([2.5, 1.9], [2.9, 2.1]), less_control=less),
    }
    of_claim = dict(says="it helps", arm="grown", control="plain", below=0.0, mean=-0.3, half=0.1)
    claims = []
    for measure in ("bpb", "train/loss", "eval/wiki.test/bpb", "own"):
        claims.append(of_claim | dict(measure=measure, verdict="confirmed"))
    cost = dict(flops=1.0, tokens=1, tuning_flops=1.0, tuning_tokens=1)
    return dict(study="tiny", control="plain", seeds=2, failed={}, quick=False, measures={},
                made_by=[{}], claims=claims, arms=arms, cost=cost)


def test_a_study_has_four_charts_and_its_claims_have_units():
    page = report.study(json.loads(json.dumps(a_result())))
    assert page.count("<svg class=still") == 4
    assert page.count("Less plain&#x27;s (bits per byte)") >= 2
    assert "<img" not in page
    for words in ("test, bits per byte, grown", "training loss, nats per token, grown",
                  "test of wiki, bits per byte, grown", "(own, grown less plain"):
        assert words in page, words
    heads = re.findall("<th scope=col>(.*?)<", page)
    assert heads[:3] == ["arm", "test", "less plain&#x27;s"]  # what a phone shows first


def test_the_marks_of_gzip_and_xz_are_named_on_their_outer_sides():
    marks = {"gzip": 2.2, "xz": 2.1}
    (image,) = report.pictures([report.Interval(1.9, 0.1, marks)])
    named = re.findall("<text .*?text-anchor=(\\w+)>(\\w+)</text>", image)
    assert named == [("start", "gzip"), ("end", "xz")]
    (plain,) = report.pictures([report.Interval(1.9, 0.1, {"zero": 0.0})])
    assert "<text" not in plain
