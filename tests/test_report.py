"""The report: what is in the page, that it needs nothing else, and that a real browser draws it."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import train
from lib.config import ROOT, load_file, to_json
from lib.statistics import compare, run_figures
from lib.study import PAIRED
from train import Config, Phase

report = load_file(ROOT / "tools/report.py")
OWNED = "<script>document.documentElement.dataset.owned = 1</script><b>&amp;"  # a sample may say anything
USE = """<script>
const all = what => [...document.querySelectorAll(what)], html = document.documentElement;
const send = (target, type, x) => target.dispatchEvent(new PointerEvent(type, {clientX: x, bubbles: true}));
const drawn = all("figure > svg").filter(svg => !svg.closest("details"));
all("#logx, #logy, [data-axis], .legend button, .legend button").forEach(button => {
  button.click();
  send(button, "pointerenter", 0);
  send(button, "pointerleave", 0);
});
all(".legend button").forEach(button => button.click());
const middle = svg => svg.getBoundingClientRect().left + svg.clientWidth / 2;
drawn.forEach(svg => send(svg, "pointermove", middle(svg)));
html.dataset.pointed = all(".tip").filter(tip => !tip.hidden && tip.textContent.includes("step")).length;
["down", "move", "up"].forEach((way, i) => send(drawn[0], "pointer" + way, middle(drawn[0]) + 60 * i));
if (!document.getElementById("whole").hidden) html.dataset.part = "shown";
</script>"""


def make_run(path: Path, steps: int = 60, done: bool = True, sources=("code",), seed=0, **more) -> Path:
    """The files of a run of two phases with a curve down from 5 to 2, without the run."""
    path.mkdir(parents=True)
    config = Config(name=path.name, phases=(Phase(steps=steps // 2), Phase(steps=steps // 2)), **more)
    (path / "config.json").write_text(json.dumps(to_json(config)))
    rng, rows = np.random.default_rng(seed), []
    for s in range(1, (steps if done else steps // 3) + 1):
        spent = {"train/tokens": 4_096 * s, "train/flops": 1e9 * s, "phase": int(s > steps // 2)}
        loss = float(2 + 3 * np.exp(-4 * s / steps) + rng.normal(0, 0.1))
        rows.append({"step": s, "train/loss": loss, "train/grad_norm": 1.0, "train/lr": 1e-3 / s, **spent,
                     "model/params": 10_000 * (1 + spent["phase"]), "perf/tokens_per_s": 1e4})
        if s % 20 == 0:
            dev = {f"eval/{n}/{k}": loss / 2 for n in sources for k in ("loss", "bpb")}
            rows.append({"step": s, **dev, **spent})
    figures = dict(loss=2.0, bpb=1.234, bpb_se=0.05).items()
    test = {f"eval/{n}.test/{k}": v for n in sources for k, v in figures}
    if done:
        rows.append({"step": steps, **test, **spent})
        end = dict(versions={"jax": "0.10.2"}, host=path.name, commit="c0ffee", device="cpu", devices=1,
                   gzip_bpb=2.2, xz_bpb=2.1)
        (path / "summary.json").write_text(json.dumps(rows[-2] | test | end))
        (path / "samples.txt").write_text(OWNED)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def make_study(path: Path) -> Path:
    """A study of two arms and two seeds, one claim, as tools/study.py writes it down."""
    arms = {arm: dict(rate=0.01, bracketed=arm == "plain", tuning={}) for arm in ("plain", "grown")}
    runs = {arm: {s: make_run(path / f"{arm}-0.01-s{s}", seed=s) for s in (1, 2)} for arm in arms}
    runs = {arm: {s: run_figures(run) for s, run in own.items()} for arm, own in runs.items()}
    for arm, own in runs.items():
        less = {m: compare(own, runs["plain"], m) for m in PAIRED}
        arms[arm] |= dict(tokens=1, flops=1.0, bpb=(1.2, 0.1), less_control=less, runs=own)
    claim = dict(says="grown < plain & more", measure="bpb", arm="grown", control="plain", below=0.0,
                 mean=-0.1, half=0.01, verdict="confirmed")
    result = dict(study=path.name, control="plain", seeds=2, failed={"grown-0.01-s3": "exit code 1: boom"},
                  quick=True, measures={}, made_by=[{}], claims=[claim], arms=arms,
                  cost=dict(flops=1.0, tokens=1, tuning_flops=1.0, tuning_tokens=1))
    (path / "study.json").write_text(json.dumps(result))
    (path / "study.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Runs in every state, and a study, each by name."""
    root = tmp_path_factory.mktemp("runs")
    made = {"ended": make_run(root / "ended & <i>done", sources=("code", "prose")),
            "going": make_run(root / "going", done=False, clip=0.5),
            "torn": make_run(root / "torn", done=False), "new": make_run(root / "new"),
            "study": make_study(root / "depth")}
    with open(made["torn"] / "metrics.jsonl", "a") as rows:  # a line that is no row, a row, a torn line
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
    """Ended, going on, torn, not begun; and the study's verdict, failure and rate that is not bracketed."""
    content = page.read_text("utf-8")
    for words in ("complete", "at step 20 of 60", "2 damaged lines left out", "no metrics yet", "1.234",
                  "config.json cannot be read", "confirmed", "exit code 1: boom", "not bracketed", "c0ffee"):
        assert words in content, words
    assert len(data_of(page)["runs"]) == 8  # four, and four of the study
    fields = content.split("<h2>Config</h2>")[1].split("<details>")[0]
    assert "clip" in fields and "phases.0.seq" not in fields  # which is the same in all that have one


def test_curves_keep_their_ends_extremes_and_gaps(made):
    """Of 10,000 rows with one spike, in 100 points: trailing means in closed form, None for what is not."""
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


def test_many_long_runs_make_a_page_of_moderate_size(tmp_path):
    """Twenty of 1,500 steps: below three megabytes, each told apart by colour and dashes."""
    runs = [make_run(tmp_path / f"run{i}", 1_500, seed=i) for i in range(20)]
    assert train.main(["report", *map(str, runs), "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").stat().st_size < 3e6
    assert len({(r["color"], r["dash"]) for r in data_of(tmp_path / "report.html")["runs"]}) == 20


def test_where_the_page_goes(made, tmp_path, monkeypatch, capsys):
    """Beside one run, here for several; what is neither run nor study is refused."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["report", str(made["going"])]) == train.main(["report", *map(str, made.values())]) == 0
    assert (made["going"] / "report.html").exists() and (tmp_path / "report.html").exists()
    assert "report.html: 8 runs" in capsys.readouterr().out
    assert train.main(["report", str(tmp_path)]) == 2
    assert "is neither a run" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_draws_it(page, tmp_path):
    """Without a network: every chart has curves, on each axis, and says what is under the pointer; a part of
    the axis is shown alone; nothing goes wrong or is refused.
    """
    (tmp_path / "used.html").write_text(page.read_text("utf-8") + USE)
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --dump-dom "
             "--disable-background-networking --disable-component-update --enable-logging=stderr").split()
    line = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "used.html").as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180)
    tag, = re.findall("<html[^>]*>", done.stdout)
    charts = sum(len(s["charts"]) for s in data_of(page)["sections"] if s["title"] != "More figures")
    assert f'data-drawn="{charts}"' in tag and f'data-pointed="{charts}"' in tag and "data-part" in tag
    assert "data-error" not in tag and "data-owned" not in tag and "CONSOLE" not in done.stderr
    assert done.stdout.count('class="curve"') >= charts
