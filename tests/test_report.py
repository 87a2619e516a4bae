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


def make_run(
    path: Path, steps: int = 60, done: bool = True, sources=("code",), seed=0, summary=None, **more
) -> Path:
    """The files of a run of two phases with a curve down from 5 to 2, without the run."""
    path.mkdir(parents=True)
    half = Phase(steps=steps // 2)
    config = Config(name=path.name, phases=(half, half), **more)
    (path / "config.json").write_text(json.dumps(to_json(config)))
    rng, rows = np.random.default_rng(seed), []
    for s in range(1, (steps if done else steps // 3) + 1):
        spent = {"train/tokens": 4_096 * s, "train/flops": 1e9 * s, "phase": int(s > steps // 2)}
        loss = float(2 + 3 * np.exp(-4 * s / steps) + rng.normal(0, 0.1))
        rows.append({"step": s, "train/loss": loss, "train/grad_norm": 1.0, "train/lr": 1e-3 / s,
                     "model/params": 10_000 * (1 + spent["phase"]), "perf/tokens_per_s": 1e4,
                     **spent})
        if s % 20 == 0:
            dev = {f"eval/{n}/{k}": loss / 2 for n in sources for k in ("loss", "bpb")}
            rows.append({"step": s, **dev, **spent})
    figures = dict(loss=2.0, bpb=1.234, bpb_se=0.05).items()
    test = {f"eval/{n}.test/{k}": v for n in sources for k, v in figures}
    if done:
        rows.append({"step": steps, **test, **spent})
        end = dict(versions={"jax": "0.10.2"}, host=path.name, commit="c0ffee", device="cpu",
                   devices=1, gzip_bpb=2.2, xz_bpb=2.1, held_out_paths=["a.py", "b.py"])
        (path / "summary.json").write_text(json.dumps(rows[-2] | test | end | (summary or {})))
        (path / "samples.txt").write_text(OWNED)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def make_study(path: Path, quick: bool = False, **more) -> Path:
    """A study of two arms and two seeds, as tools/study.py writes it down; more: of its claim."""
    arms = {}
    for arm in ("plain", "grown"):
        runs = {}
        for seed in (1, 2):
            runs[seed] = {"run": f"{arm}-0.01-s{seed}"}
            make_run(path / runs[seed]["run"], seed=seed)
        found = dict(mean=-0.1, half=0.01)
        less = {"bpb": found, "speed_up_flops": found, "speed_up_tokens": found}
        arms[arm] = dict(rate=0.01, bracketed=arm == "plain", tuning={}, tokens=1, flops=1.0,
                         bpb=(1.2, 0.1), less_control=less, runs=runs)
    claim = dict(says="grown < plain & more", measure="bpb", arm="grown", control="plain",
                 below=0.0, mean=-0.1, half=0.01, verdict="confirmed") | more
    failed = {"grown-0.01-s3": "exit code 1: boom"}
    cost = dict(flops=1.0, tokens=1, tuning_flops=1.0, tuning_tokens=1)
    result = dict(study=path.name, control="plain", seeds=2, failed=failed, quick=quick,
                  measures={}, made_by=[{}], claims=[claim], arms=arms, cost=cost)
    (path / "study.json").write_text(json.dumps(result))
    (path / "study.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Runs in every state, and a study, each by name."""
    root = tmp_path_factory.mktemp("runs")
    made = {"ended": make_run(root / "ended & <i>done", sources=("code", "prose"),
                               summary=dict(gzip_bpb=1.3, xz_bpb=1.2)),
            "going": make_run(root / "going", done=False, clip=0.5),
            "torn": make_run(root / "torn", done=False), "new": make_run(root / "new"),
            "study": make_study(root / "depth")}
    with open(made["torn"] / "metrics.jsonl", "a") as rows:  # no row, a row, a torn line
        row = {"step": 20, "train/loss": None, "train/tokens": 1, "train/flops": 1.0, "phase": 0}
        rows.write(f'[1]\n{json.dumps(row)}\n{{"step": 2')
    for name in ("metrics.jsonl", "summary.json", "samples.txt"):
        (made["new"] / name).unlink()
    (made["new"] / "config.json").write_text('{"name": ')
    return made


@pytest.fixture(scope="module")
def page(made, tmp_path_factory) -> Path:
    """Their report."""
    out = tmp_path_factory.mktemp("report") / "all.html"
    assert train.main(["report", *map(str, made.values()), "--out", str(out)]) == 0
    return out


def data_of(page: Path) -> dict:
    """What the page's script draws."""
    return json.loads(re.search('id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)[1])


def test_the_page_holds_all_that_it_needs_and_nothing_that_runs_by_mistake(page):
    """No address but in namespaces; what runs and studies say is text."""
    content = page.read_text("utf-8")
    assert {*re.findall(r"\w+://[^\s\"'<)]+", content)} == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(?:src|href)=(?![\"']?data:)", content) and "@import" not in content
    assert "{{" not in content and OWNED not in content and content.count("<script") == 2
    assert "ended &amp; &lt;i&gt;done" in content and "<i>" not in content
    assert "grown &lt; plain &amp; more" in content


def test_every_state_of_a_run_is_said(page, made):
    """Ended, going on, torn, not begun; a study's verdict, failure, rate that is not bracketed."""
    content = page.read_text("utf-8")
    for words in ("complete", "at step 20 of 60", "2 damaged lines left out", "no metrics yet",
                  "1.234", "config.json cannot be read", CONFIRMED, "exit code 1: boom",
                  "not bracketed", "c0ffee"):
        assert words in content, words
    assert len(data_of(page)["runs"]) == 8  # four, and four of the study
    fields = content.split("<h2>Config</h2>")[1].split("<details>")[0]
    assert "clip" in fields and "phases.0.seq" not in fields  # which is the same in all


def test_curves_keep_their_ends_extremes_and_gaps(made):
    """Of 10,000 rows with one spike, in 100 points: trailing means in closed form, and None."""
    rows = [{"step": s, "train/tokens": 2 * s, "train/flops": 3.0 * s, "train/loss": float(s),
             "train/lr": 1.0} for s in range(1, 10_001)]
    rows[4_321]["train/lr"], rows[-1]["train/loss"] = 9.0, None
    out = report.thin(rows, ["train/loss", "train/lr", "absent"], 100)
    assert out["step"] == list(range(100, 10_001, 100)) and out["tokens"][-1] == 20_000
    mean, least, most = out["y"]["train/loss"]
    assert (least[1], most[1], least[-1], most[-1]) == (101, 200, 9_901, 9_999)
    assert mean[9] == np.mean(range(801, 1_001))  # a 50th of the rows
    assert max(out["y"]["train/lr"][2]) == 9.0 and {*out["y"]["absent"][0]} == {None}
    drawn = report.curves(report.collect([made["ended"]])[0])
    assert [(p["step"], p["size"]) for p in drawn["runs"][0]["phases"]] == [(30, 20_000)]
    assert [s["title"] for s in drawn["sections"]] == ["Curves", "Dev, by source", "More figures"]
    assert drawn["sections"][0]["charts"][0]["key"] == "eval/mean/bpb"  # what to compare by
    both = report.curves(report.collect([made["ended"], made["going"]])[0])
    y = both["runs"][1]["evals"]["y"]  # of a run with one source
    assert y["eval/mean/bpb"] == y["eval/code/bpb"] and y["eval/mean/bpb"][0] != [None]


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
    assert marks["two"] == ["gzip 1.500", "xz 1.400"] and marks["going"] == []
    assert "<td>2.500</td><td>2.400</td>" in rows["one"] and "<td>1.500</td>" in rows["two"]
    drawn = data_of(tmp_path / "report.html")
    assert [run["marks"] for run in drawn["runs"]] == [
        {"gzip": 2.5, "xz": 2.4}, {"gzip": 1.5, "xz": 1.4}, {}]
    charts = [chart for section in drawn["sections"] for chart in section["charts"]]
    assert [chart["key"] for chart in charts if chart["compressed"]] == ["eval/code/bpb"]


def test_runs_tested_on_other_documents_are_kept_apart(tmp_path):
    """They are in another table, and beside it that is said; equal ones need no such word."""
    same = [make_run(tmp_path / name) for name in ("one", "two")]
    content = report_of(tmp_path, *same)
    assert "not comparable" not in content and overview_of(content).count("<table>") == 1
    other = make_run(tmp_path / "other", summary=dict(held_out_paths=["b.py", "c.py", "d.py"]))
    going = make_run(tmp_path / "going", done=False)
    content = report_of(tmp_path, same[0], other, same[1], going)
    part = overview_of(content)
    pieces = part.split("</table>")
    told = [re.sub("<.*?>", "", piece.split("<table>")[0]).strip() for piece in pieces]
    assert told[0] == "one, two: tested on 2 documents."
    assert told[1] == ("other: tested on other documents than one, two; not comparable with them. "
                       "(3 documents, 1 of them in common.)")
    assert told[2] == "going: no list of test documents (yet)."
    shown = [[*rows_of(f"<h2>Runs</h2>{piece}")] for piece in pieces[:3]]
    assert shown == [["one", "two"], ["other"], ["going"]]
    assert "compare curves of bits per byte only within one table" in part


def test_an_interval_is_the_same_thing_everywhere(tmp_path):
    """± is half of a 95 % interval: of the mean of two sources, of each, of own figures."""
    own = dict(quiz=0.5, quiz_se=0.1, share=0.9, share_se=0.0, share_low=0.7, share_high=0.97)
    one = make_run(tmp_path / "one", sources=("code", "prose"), summary=own)
    content = report_of(tmp_path, one)
    assert "s.e." not in content and content.count("± is half of a 95 % interval") == 1
    half = 'class="half">± '
    assert f"1.234 <span {half}0.069<" in rows_of(content)["one"]  # 1.96 * 0.05 / sqrt(2)
    final = content.split("<h2>Test figures</h2>")[1]
    assert final.count(f"1.234 <span {half}0.098<") == 2 and f"0.500 <span {half}0.196<" in final
    assert '0.900 <span class="half">(0.700 to 0.970)<' in final and "share_low" not in content
    heads = re.findall("<th scope=col>(.*?)</th>", content)
    for head in ("test<small>bits per byte</small>", "training loss<small>nats per token</small>",
                 "code<small>bits per byte</small>", "speed<small>tokens per second</small>"):
        assert head in heads, head


def test_gzip_of_all_documents_at_once_is_shown_where_it_is_known(tmp_path):
    """Two more columns, which say what they are; none where no run has these figures."""
    together = "gzip -9<small>bits per byte,\nall documents\nat once</small>"
    known = make_run(tmp_path / "known", summary=dict(gzip_together_bpb=1.91, xz_together_bpb=1.71))
    old = make_run(tmp_path / "old")
    content = report_of(tmp_path, known, old)
    assert together in content and "<td>1.910</td><td>1.710</td>" in rows_of(content)["known"]
    assert together not in report_of(tmp_path, old)


def test_a_quick_study_is_not_judged(tmp_path):
    """Whatever verdict its file has; a whole study's verdict is shown as it is."""
    quick = report_of(tmp_path, make_study(tmp_path / "quick", quick=True))
    assert CONFIRMED not in quick and '<span class="unjudged">not judged</span>' in quick
    assert CONFIRMED in report_of(tmp_path, make_study(tmp_path / "whole"))
    said = report_of(tmp_path, make_study(tmp_path / "said", verdict="not judged"))
    assert '<span class="unjudged">not judged</span>' in said


def test_what_a_study_says_is_text(tmp_path):
    """Its verdict, its bound, its words; a figure that is none is a dash."""
    evil = make_study(tmp_path / "evil", verdict=OWNED, below=OWNED, says=OWNED, mean=OWNED)
    content = report_of(tmp_path, evil)
    assert OWNED not in content and content.count("<script") == 2
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


def test_curves_png_has_a_panel_for_each_unit(tmp_path, drawn):
    """Bits per byte with what gzip and xz need, nats, and the rate; no loss's scale begins at 0."""
    run = make_run(tmp_path / "run", steps=200)
    curves.draw(run)
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    bits, nats, rate = drawn[0].axes
    assert "bits per byte" in bits.get_ylabel() and nats.get_ylabel() == "nats per token"
    assert rate.get_ylabel() == "learning\nrate" and rate.get_xlabel() == "training FLOPs"
    words = texts_of(bits)
    assert "gzip -9, each test document alone: 2.200" in words
    assert "xz -9, each test document alone: 2.100" in words
    assert "test, code: 1.234 ± 0.098 (95 %)" in words and "dev, code" in words
    levels = [line.get_ydata()[0] for line in bits.get_lines() if line.get_linestyle() == "--"]
    assert levels == [2.2, 2.1]
    assert "phase 0: 10K parameters" in words and "phase 1: 20K parameters" in words
    assert bits.get_ylim()[0] > 0.5 and nats.get_ylim()[0] > 1.5
    begin = [line.get_xdata()[0] for line in nats.get_lines() if line.get_linestyle() == ":"]
    assert begin == [0.0, 100e9]  # the FLOPs before a phase


def test_a_steep_beginning_does_not_press_the_rest_together(tmp_path, drawn):
    """It leaves the chart, which says so. A run without bits per byte is drawn, too."""
    run = make_run(tmp_path / "run", steps=200)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:5]:
        row["train/loss"] = 50.0
    first = dict(rows[0], **{"eval/code/bpb": 8.0})
    del first["train/loss"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [first, *rows]))
    curves.draw(run)
    bits, nats, _ = drawn[0].axes
    assert bits.get_ylim()[1] < 3 and nats.get_ylim()[1] < 6
    assert "dev, code; starts above the chart, at 8.00" in texts_of(bits)
    assert "training loss, mean of 4 steps; starts above the chart, at 50.00" in texts_of(nats)
    going = make_run(tmp_path / "going", done=False, sources=())
    curves.draw(going)
    assert "no bits per byte were measured" in texts_of(drawn[1].axes[0])


def test_many_sources_have_a_legend_below_the_panels(tmp_path, drawn):
    """One that would hide the curves is outside, and names each source's dev curve and test."""
    curves.draw(make_run(tmp_path / "run", sources=tuple("abcdef")))
    legend, = drawn[0].legends
    assert len(legend.get_texts()) == 12 and drawn[0].axes[0].get_legend() is None


def test_drawing_takes_a_small_share_of_a_run(tmp_path, monkeypatch):
    """A run that goes on is drawn again once twenty times the last drawing's time have passed."""
    run = make_run(tmp_path / "run", done=False)
    flushed = []
    now = time.monotonic()
    monkeypatch.setattr(curves, "last_drawing", {"took": 2.0, "ended": now - 100.0})
    curves.follow(run, lambda: flushed.append(1))
    assert len(flushed) == 1 and (run / "curves.png").exists()
    curves.follow(run, lambda: flushed.append(2))
    assert len(flushed) == 1


def test_many_long_runs_make_a_page_of_moderate_size(tmp_path):
    """Twenty of 1,500 steps: below three megabytes, each told apart by colour and dashes."""
    runs = [make_run(tmp_path / f"run{i}", 1_500, seed=i) for i in range(20)]
    assert train.main(["report", *map(str, runs), "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size < 3e6
    assert len({(r["color"], r["dash"]) for r in data_of(tmp_path / "report.html")["runs"]}) == 20


def test_where_the_page_goes(made, tmp_path, monkeypatch, capsys):
    """Beside one run, here for several; what is neither run nor study is refused."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["report", str(made["going"])]) == 0
    assert train.main(["report", *map(str, made.values())]) == 0
    assert (made["going"] / "report.html").exists() and (tmp_path / "report.html").exists()
    assert "report.html: 8 runs" in capsys.readouterr().out
    assert train.main(["report", str(tmp_path)]) == 2
    assert "is neither a run" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_draws_it(page, tmp_path):
    """Without a network: every chart has curves, on each axis, and says what is under the pointer;
    a part of the axis is shown alone; nothing goes wrong or is refused.
    """
    (tmp_path / "used.html").write_text(page.read_text("utf-8") + USE)
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
             "--dump-dom --disable-background-networking --disable-component-update "
             "--enable-logging=stderr").split()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    line = ["chromium", *flags, profile, (tmp_path / "used.html").as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180)
    tag, = re.findall("<html[^>]*>", done.stdout)
    shown = [s for s in data_of(page)["sections"] if s["title"] != "More figures"]
    charts = sum(len(section["charts"]) for section in shown)
    assert f'data-drawn="{charts}"' in tag and f'data-pointed="{charts}"' in tag
    assert "data-part" in tag
    assert "data-error" not in tag and "data-owned" not in tag and "CONSOLE" not in done.stderr
    assert done.stdout.count('class="curve"') >= charts
    assert 'data-gzip="1"' in tag and 'data-xz="1"' in tag  # in the chart of the mean
