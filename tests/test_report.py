"""The report: what is in the page, that it needs nothing else, and that a real browser draws it."""
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import train
from lib import curves
from lib.config import ROOT, load_file, to_json
from train import Config, Phase

report = load_file(ROOT / "tools/report.py")
# What a file may say, a sample above all.
OWNED = "<script>document.documentElement.dataset.owned = 1</script><b>&amp;"
CONFIRMED = '<span class="confirmed">confirmed</span>'
USE = """<script>
const all = what => [...document.querySelectorAll(what)], html = document.documentElement;
const send = (target, type, x) => {
  target.dispatchEvent(new PointerEvent(type, {clientX: x, bubbles: true}));
};
for (const name of ["gzip", "xz"]) html.dataset[name] = all(`.compressor.${name}`).length;
const drawn = all("figure > svg").filter(svg => !svg.closest("details"));
all("#logx, #logy, [data-axis], .legend button, .legend button").forEach(button => {
  button.click();
  send(button, "pointerenter", 0);
  send(button, "pointerleave", 0);
});
all(".legend button").forEach(button => button.click());
const middle = svg => svg.getBoundingClientRect().left + svg.clientWidth / 2;
drawn.forEach(svg => send(svg, "pointermove", middle(svg)));
const says = tip => !tip.hidden && tip.textContent.includes("step");
html.dataset.pointed = all(".tip").filter(says).length;
["down", "move", "up"].forEach((way, i) => {
  send(drawn[0], "pointer" + way, middle(drawn[0]) + 60 * i);
});
if (!document.getElementById("whole").hidden) html.dataset.part = "shown";
</script>"""


def write_rows(run: Path, rows: list[dict]):
    """metrics.jsonl of a run."""
    lines = [json.dumps(row) + "\n" for row in rows]
    (run / "metrics.jsonl").write_text("".join(lines))


def metrics_rows(steps: int, last: int, sources, seed: int) -> list[dict]:
    """Rows of the steps up to `last` of a run of two phases, with a loss down from 5 to 2."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, last + 1):
        phase = int(step > steps // 2)
        spent = {"train/tokens": 4_096 * step, "train/flops": 1e9 * step, "phase": phase}
        loss = float(2 + 3 * np.exp(-4 * step / steps) + rng.normal(0, 0.1))
        row = {
            "step": step,
            "train/loss": loss,
            "train/grad_norm": 1.0,
            "train/lr": 1e-3 / step,
            "model/params": 10_000 * (1 + phase),
            "perf/tokens_per_s": 1e4,
        }
        rows.append(row | spent)
        if step % 20 == 0:
            dev = {}
            for source in sources:
                dev[f"eval/{source}/loss"] = loss / 2
                dev[f"eval/{source}/bpb"] = loss / 2
            rows.append({"step": step} | dev | spent)
    return rows


def make_run(
    path: Path, steps: int = 60, done: bool = True, sources=("code",), seed=0, summary=None, **more
) -> Path:
    """The files of a run of two phases, without the run; more: fields of its config."""
    path.mkdir(parents=True)
    half = Phase(steps=steps // 2)
    config = Config(name=path.name, phases=(half, half), **more)
    (path / "config.json").write_text(json.dumps(to_json(config)))
    last = steps if done else steps // 3
    rows = metrics_rows(steps, last, sources, seed)
    if done:
        test = {}
        for source in sources:
            test[f"eval/{source}.test/loss"] = 2.0
            test[f"eval/{source}.test/bpb"] = 1.234
            test[f"eval/{source}.test/bpb_se"] = 0.05
        end = dict(
            versions={"jax": "0.10.2"},
            host=path.name,
            commit="c0ffee",
            device="cpu",
            devices=1,
            gzip_bpb=2.2,
            xz_bpb=2.1,
            held_out_paths=["a.py", "b.py"],
        )
        last_step = next(row for row in reversed(rows) if "train/loss" in row)
        spent = {name: last_step[name] for name in ("train/tokens", "train/flops", "phase")}
        written = rows[-1] | test | end | (summary or {})
        rows.append({"step": steps} | test | spent)
        (path / "summary.json").write_text(json.dumps(written))
        (path / "samples.txt").write_text(OWNED)
    write_rows(path, rows)
    return path


def make_arm(path: Path, arm: str) -> dict:
    """An arm of a study with two seeds, and its runs."""
    runs = {}
    for seed in (1, 2):
        name = f"{arm}-0.01-s{seed}"
        runs[seed] = {"run": name}
        make_run(path / name, seed=seed)
    found = dict(mean=-0.1, half=0.01)
    measures = ("bpb", "speed_up_flops", "speed_up_tokens")
    return dict(
        rate=0.01,
        bracketed=arm == "plain",
        tuning={},
        tokens=1,
        flops=1.0,
        bpb=(1.2, 0.1),
        less_control=dict.fromkeys(measures, found),
        runs=runs,
    )


def make_study(path: Path, quick: bool = False, **more) -> Path:
    """A study of two arms and two seeds, as tools/study.py writes it down; more: of its claim."""
    arms = {arm: make_arm(path, arm) for arm in ("plain", "grown")}
    claim = dict(
        says="grown < plain & more",
        measure="bpb",
        arm="grown",
        control="plain",
        below=0.0,
        mean=-0.1,
        half=0.01,
        verdict="confirmed",
    )
    result = dict(
        study=path.name,
        control="plain",
        seeds=2,
        failed={"grown-0.01-s3": "exit code 1: boom"},
        quick=quick,
        measures={},
        made_by=[{}],
        claims=[claim | more],
        arms=arms,
        cost=dict(flops=1.0, tokens=1, tuning_flops=1.0, tuning_tokens=1),
    )
    (path / "study.json").write_text(json.dumps(result))
    (path / "study.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Runs in every state, and a study, each by name."""
    root = tmp_path_factory.mktemp("runs")
    compressed = dict(gzip_bpb=1.3, xz_bpb=1.2)
    ended = make_run(root / "ended & <i>done", sources=("code", "prose"), summary=compressed)
    going = make_run(root / "going", done=False, clip=0.5)
    torn = make_run(root / "torn", done=False)
    tear(torn)
    new = make_run(root / "new")
    for name in ("metrics.jsonl", "summary.json", "samples.txt"):
        (new / name).unlink()
    (new / "config.json").write_text('{"name": ')
    study = make_study(root / "depth")
    return dict(ended=ended, going=going, torn=torn, new=new, study=study)


def tear(run: Path):
    """Add to a run's metrics what is no row, a row, and a line that is cut."""
    row = {"step": 20, "train/loss": None, "train/tokens": 1, "train/flops": 1.0, "phase": 0}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f'[1]\n{json.dumps(row)}\n{{"step": 2')


@pytest.fixture(scope="module")
def page(made, tmp_path_factory) -> Path:
    """Their report."""
    out = tmp_path_factory.mktemp("report") / "all.html"
    assert train.main(["report", *map(str, made.values()), "--out", str(out)]) == 0
    return out


def data_of(page: Path) -> dict:
    """What the page's script draws."""
    script = re.search('id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return json.loads(script[1])


def test_the_page_holds_all_that_it_needs_and_nothing_that_runs_by_mistake(page):
    """No address but in namespaces; what runs and studies say is text."""
    content = page.read_text("utf-8")
    addresses = {*re.findall(r"\w+://[^\s\"'<)]+", content)}
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(?:src|href)=(?![\"']?data:)", content)
    assert "@import" not in content
    assert "{{" not in content
    assert OWNED not in content
    assert content.count("<script") == 2
    assert "<i>" not in content
    assert "ended &amp; &lt;i&gt;done" in content
    assert "grown &lt; plain &amp; more" in content


def test_every_state_of_a_run_is_said(page, made):
    """Ended, going on, torn, not begun; a study's verdict, failure, rate that is not bracketed."""
    content = page.read_text("utf-8")
    for words in (
        "complete",
        "at step 20 of 60",
        "2 damaged lines left out",
        "no metrics yet",
        "1.234",
        "config.json cannot be read",
        CONFIRMED,
        "exit code 1: boom",
        "not bracketed",
        "c0ffee",
    ):
        assert words in content, words
    assert len(data_of(page)["runs"]) == 8  # four, and four of the study


def test_the_table_of_configs_has_the_fields_that_differ(page):
    content = page.read_text("utf-8")
    table = content.split("<h2>Config</h2>")[1].split("<details>")[0]
    assert "clip" in table
    assert "phases.0.seq" not in table


def rising_row(step: int) -> dict:
    """A row whose loss is its step."""
    return {
        "step": step,
        "train/tokens": 2 * step,
        "train/flops": 3.0 * step,
        "train/loss": float(step),
        "train/lr": 1.0,
    }


def test_curves_keep_their_ends_extremes_and_gaps():
    """Of 10,000 rows with one spike, in 100 points: trailing means in closed form, and None."""
    rows = [rising_row(step) for step in range(1, 10_001)]
    rows[4_321]["train/lr"] = 9.0
    rows[-1]["train/loss"] = None

    thinned = report.thin(rows, ["train/loss", "train/lr", "absent"], 100)

    assert thinned["step"] == list(range(100, 10_001, 100))
    assert thinned["tokens"][-1] == 20_000
    mean, least, most = thinned["y"]["train/loss"]
    assert (least[1], most[1]) == (101, 200)
    assert (least[-1], most[-1]) == (9_901, 9_999)
    assert mean[9] == np.mean(range(801, 1_001))  # a 50th of the rows
    _, _, highest_rate = thinned["y"]["train/lr"]
    assert max(highest_rate) == 9.0
    absent, *_ = thinned["y"]["absent"]
    assert {*absent} == {None}


def curves_of(*paths: Path) -> dict:
    """What the page's script draws of runs."""
    return report.curves(report.collect([*paths])[0])


def test_the_first_chart_is_of_the_mean_bits_per_byte(made):
    drawn = curves_of(made["ended"])
    titles = [section["title"] for section in drawn["sections"]]
    assert titles == ["Curves", "Dev, by source", "More figures"]
    first_chart = drawn["sections"][0]["charts"][0]
    assert first_chart["key"] == "eval/mean/bpb"


def test_curves_say_where_a_phase_begins_and_how_large_its_model_is(made):
    (run,) = curves_of(made["ended"])["runs"]
    phases = [(phase["step"], phase["size"]) for phase in run["phases"]]
    assert phases == [(30, 20_000)]


def test_the_mean_over_one_source_is_its_own(made):
    drawn = curves_of(made["ended"], made["going"])
    y = drawn["runs"][1]["evals"]["y"]
    assert y["eval/mean/bpb"] == y["eval/code/bpb"]
    assert y["eval/mean/bpb"][0] != [None]


def report_of(tmp_path: Path, *paths: Path) -> str:
    """The page of runs or studies."""
    out = tmp_path / "report.html"
    assert train.main(["report", *map(str, paths), "--out", str(out)]) == 0
    return out.read_text("utf-8")


def overview_of(content: str) -> str:
    """The part of a page that has the runs at a glance."""
    return content.split("<h2>Runs</h2>")[1].split('<div id="curves">')[0]


def rows_of(content: str) -> dict[str, str]:
    """{name of a run: its row of the overview}."""
    rows = re.findall("<tr><th scope=row>.*?</tr>", overview_of(content))
    return {re.search("</svg>(.*?)</span>", row)[1]: row for row in rows}


def test_each_row_has_the_marks_of_its_own_run(tmp_path):
    """gzip's and xz's marks and columns, in the table and in the chart, are not the last run's."""
    one = make_run(tmp_path / "one", summary=dict(gzip_bpb=2.5, xz_bpb=2.4))
    two = make_run(tmp_path / "two", summary=dict(gzip_bpb=1.5, xz_bpb=1.4))
    content = report_of(tmp_path, one, two, make_run(tmp_path / "going", done=False))
    rows = rows_of(content)
    marks = {name: re.findall("<title>(.*?)</title>", row) for name, row in rows.items()}
    assert marks["one"] == ["gzip 2.500", "xz 2.400"]
    assert marks["two"] == ["gzip 1.500", "xz 1.400"]
    assert marks["going"] == []
    assert "<td>2.500</td><td>2.400</td>" in rows["one"]
    assert "<td>1.500</td>" in rows["two"]

    drawn = data_of(tmp_path / "report.html")
    assert [run["marks"] for run in drawn["runs"]] == [
        {"gzip": 2.5, "xz": 2.4},
        {"gzip": 1.5, "xz": 1.4},
        {},
    ]
    marked = []
    for section in drawn["sections"]:
        marked += [chart["key"] for chart in section["charts"] if chart["compressed"]]
    assert marked == ["eval/code/bpb"]


def test_runs_tested_on_other_documents_are_kept_apart(tmp_path):
    """They are in another table, and beside it that is said; equal ones need no such word."""
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two")
    content = report_of(tmp_path, one, two)
    assert "not comparable" not in content
    assert overview_of(content).count("<table>") == 1

    paths = ["b.py", "c.py", "d.py"]
    other = make_run(tmp_path / "other", summary=dict(held_out_paths=paths))
    going = make_run(tmp_path / "going", done=False)
    overview = overview_of(report_of(tmp_path, one, other, two, going))
    tables = overview.split("</table>")
    told = [re.sub("<.*?>", "", table.split("<table>")[0]).strip() for table in tables]
    assert told[0] == "one, two: tested on 2 documents."
    assert told[1] == (
        "other: tested on other documents than one, two; not comparable with them. "
        "(3 documents, 1 of them in common.)"
    )
    assert told[2] == "going: no list of test documents (yet)."
    shown = [[*rows_of(f"<h2>Runs</h2>{table}")] for table in tables[:3]]
    assert shown == [["one", "two"], ["other"], ["going"]]
    assert "compare curves of bits per byte only within one table" in overview


def test_an_interval_is_the_same_thing_everywhere(tmp_path):
    """± is half of a 95 % interval: of the mean of two sources, of each, of own figures."""
    quiz = dict(quiz=0.5, quiz_se=0.1)
    share = dict(share=0.9, share_se=0.0, share_low=0.7, share_high=0.97)
    one = make_run(tmp_path / "one", sources=("code", "prose"), summary=quiz | share)
    content = report_of(tmp_path, one)
    assert "s.e." not in content
    assert content.count("± is half of a 95 % interval") == 1
    half = 'class="half">± '
    assert f"1.234 <span {half}0.069<" in rows_of(content)["one"]  # 1.96 * 0.05 / sqrt(2)

    final = content.split("<h2>Test figures</h2>")[1]
    assert final.count(f"1.234 <span {half}0.098<") == 2
    assert f"0.500 <span {half}0.196<" in final
    assert '0.900 <span class="half">(0.700 to 0.970)<' in final
    assert "share_low" not in content


def test_columns_name_their_units(tmp_path):
    one = make_run(tmp_path / "one", sources=("code", "prose"))
    heads = re.findall("<th scope=col>(.*?)</th>", report_of(tmp_path, one))
    for head in (
        "test<small>bits per byte</small>",
        "training loss<small>nats per token</small>",
        "code<small>bits per byte</small>",
        "speed<small>tokens per second</small>",
    ):
        assert head in heads, head


def test_gzip_of_all_documents_at_once_is_shown_where_it_is_known(tmp_path):
    """Two more columns, which say what they are; none where no run has these figures."""
    together = "gzip -9<small>bits per byte,\nall documents\nat once</small>"
    figures = dict(gzip_together_bpb=1.91, xz_together_bpb=1.71)
    known = make_run(tmp_path / "known", summary=figures)
    old = make_run(tmp_path / "old")
    content = report_of(tmp_path, known, old)
    assert together in content
    assert "<td>1.910</td><td>1.710</td>" in rows_of(content)["known"]
    assert together not in report_of(tmp_path, old)


def test_a_quick_study_is_not_judged(tmp_path):
    """Whatever verdict its file has; a whole study's verdict is shown as it is."""
    not_judged = '<span class="unjudged">not judged</span>'
    quick = report_of(tmp_path, make_study(tmp_path / "quick", quick=True))
    assert CONFIRMED not in quick
    assert not_judged in quick

    whole = report_of(tmp_path, make_study(tmp_path / "whole"))
    assert CONFIRMED in whole

    said = report_of(tmp_path, make_study(tmp_path / "said", verdict="not judged"))
    assert not_judged in said


def test_what_a_study_says_is_text(tmp_path):
    """Its verdict, its bound, its words; a figure that is none is a dash."""
    evil = make_study(tmp_path / "evil", verdict=OWNED, below=OWNED, says=OWNED, mean=OWNED)
    content = report_of(tmp_path, evil)
    assert OWNED not in content
    assert content.count("<script") == 2
    assert content.count("&lt;script&gt;") >= 3


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are saved."""
    found = []
    save = Figure.savefig

    def noted(figure, *arguments, **options):
        found.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", noted)
    return found


def texts_of(panel) -> list[str]:
    """What is written within a panel, and in its legend."""
    found = [*panel.texts]
    if panel.get_legend():
        found += panel.get_legend().get_texts()
    return [text.get_text() for text in found]


def levels_of(panel, axis: str, style: str) -> list[float]:
    """Where a panel's straight lines of a style stand on an axis, "x" or "y"."""
    lines = [line for line in panel.get_lines() if line.get_linestyle() == style]
    return [getattr(line, f"get_{axis}data")()[0] for line in lines]


def test_curves_png_has_a_panel_for_each_unit(tmp_path, drawn):
    """Bits per byte with what gzip and xz need, nats, and the rate; no loss's scale begins at 0."""
    run = make_run(tmp_path / "run", steps=200)
    curves.draw(run)
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    bits, nats, rate = drawn[0].axes
    assert "bits per byte" in bits.get_ylabel()
    assert nats.get_ylabel() == "nats per token"
    assert rate.get_ylabel() == "learning\nrate"
    assert rate.get_xlabel() == "training FLOPs"
    assert bits.get_ylim()[0] > 0.5
    assert nats.get_ylim()[0] > 1.5

    words = texts_of(bits)
    for text in (
        "gzip -9, each test document alone: 2.200",
        "xz -9, each test document alone: 2.100",
        "test, code: 1.234 ± 0.098 (95 %)",
        "dev, code",
        "phase 0: 10K parameters",
        "phase 1: 20K parameters",
    ):
        assert text in words, text
    assert levels_of(bits, "y", "--") == [2.2, 2.1]  # gzip and xz
    assert levels_of(nats, "x", ":") == [0.0, 100e9]  # the FLOPs before a phase


def test_a_steep_beginning_does_not_press_the_rest_together(tmp_path, drawn):
    """It leaves the chart, which says so. A run without bits per byte is drawn, too."""
    run = make_run(tmp_path / "run", steps=200)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[:5]:
        row["train/loss"] = 50.0
    first = rows[0] | {"eval/code/bpb": 8.0}
    del first["train/loss"]
    write_rows(run, [first, *rows])
    curves.draw(run)
    bits, nats, _ = drawn[0].axes
    assert bits.get_ylim()[1] < 3
    assert nats.get_ylim()[1] < 6
    assert "dev, code; starts above the chart, at 8.00" in texts_of(bits)
    assert "training loss, mean of 4 steps; starts above the chart, at 50.00" in texts_of(nats)
    going = make_run(tmp_path / "going", done=False, sources=())
    curves.draw(going)
    assert "no bits per byte were measured" in texts_of(drawn[1].axes[0])


def test_many_sources_have_a_legend_below_the_panels(tmp_path, drawn):
    """One that would hide the curves is outside, and names each source's dev curve and test."""
    curves.draw(make_run(tmp_path / "run", sources=tuple("abcdef")))
    (legend,) = drawn[0].legends
    assert len(legend.get_texts()) == 12
    assert drawn[0].axes[0].get_legend() is None


def test_drawing_takes_a_small_share_of_a_run(tmp_path, monkeypatch):
    """A run that goes on is drawn again once twenty times the last drawing's time have passed."""
    run = make_run(tmp_path / "run", done=False)
    flushed = []
    now = time.monotonic()
    monkeypatch.setattr(curves, "last_drawing", {"took": 2.0, "ended": now - 100.0})
    curves.follow(run, lambda: flushed.append(1))
    assert len(flushed) == 1
    assert (run / "curves.png").exists()
    curves.follow(run, lambda: flushed.append(2))
    assert len(flushed) == 1


def test_many_long_runs_make_a_page_of_moderate_size(tmp_path):
    """Twenty of 1,500 steps: below three megabytes, each told apart by colour and dashes."""
    runs = [make_run(tmp_path / f"run{i}", 1_500, seed=i) for i in range(20)]
    report_of(tmp_path, *runs)
    page = tmp_path / "report.html"
    assert page.stat().st_size < 3e6
    looks = {(run["color"], run["dash"]) for run in data_of(page)["runs"]}
    assert len(looks) == 20


def test_where_the_page_goes(made, tmp_path, monkeypatch, capsys):
    """Beside one run, here for several; what is neither run nor study is refused."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["report", str(made["going"])]) == 0
    assert train.main(["report", *map(str, made.values())]) == 0
    assert (made["going"] / "report.html").exists()
    assert (tmp_path / "report.html").exists()
    assert "report.html: 8 runs" in capsys.readouterr().out
    assert train.main(["report", str(tmp_path)]) == 2
    assert "is neither a run" in capsys.readouterr().err


FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--dump-dom",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
]


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_draws_it(page, tmp_path):
    """Without a network: every chart has curves, on each axis, and says what is under the pointer;
    a part of the axis is shown alone; nothing goes wrong or is refused.
    """
    used = tmp_path / "used.html"
    used.write_text(page.read_text("utf-8") + USE)
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    line = ["chromium", *FLAGS, profile, used.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180)

    charts = 0
    for section in data_of(page)["sections"]:
        if section["title"] != "More figures":
            charts += len(section["charts"])
    (tag,) = re.findall("<html[^>]*>", done.stdout)
    assert f'data-drawn="{charts}"' in tag
    assert f'data-pointed="{charts}"' in tag
    assert done.stdout.count('class="curve"') >= charts
    assert "data-part" in tag
    assert 'data-gzip="1"' in tag  # in the chart of the mean
    assert 'data-xz="1"' in tag
    assert "data-error" not in tag
    assert "data-owned" not in tag
    assert "CONSOLE" not in done.stderr
