"""Draw a run's curves.png from its metrics.jsonl."""
import json
import time
from pathlib import Path

import numpy as np

from lib.processes import is_main_process

SHARE = 0.05  # of the time that drawing may take while a run goes on
LAST = {"took": 2.0, "ended": time.monotonic()}  # seconds: this process's last drawing during a run, if any


def follow(directory: Path):
    """Draw a run at an evaluation, unless the last drawing took more than its share of the time since."""
    begun = time.monotonic()
    if not is_main_process() or LAST["took"] > SHARE * (begun - LAST["ended"]):
        return
    draw(directory)
    LAST.update(took=time.monotonic() - begun, ended=time.monotonic())


def draw(run: Path):
    """Loss and bits per byte over training FLOPs, the rate, and where each phase begins, at what size."""
    from matplotlib.figure import Figure  # which takes a second: a short run does so at its end alone
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if r.get("train/loss") is not None]
    evals = [r for r in rows if any(k.startswith("eval/") for k in r)]
    if not steps:  # nothing finite yet
        return
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    flops = [r["train/flops"] for r in steps]
    losses = np.array([r["train/loss"] for r in steps])
    width = max(1, len(losses) // 50)
    smooth = np.convolve(np.pad(losses, (width - 1, 0), "edge"), np.ones(width) / width, "valid")
    top.plot(flops, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    top.plot(flops, smooth, color="tab:blue", label=f"train loss, mean of {width} (nats per token)")
    for i, key in enumerate(sorted({k for r in evals for k in r if k.endswith("/bpb") and r[k] is not None})):
        points = [(r["train/flops"], r[key]) for r in evals if r.get(key) is not None]
        top.plot(*zip(*points, strict=True), "o-" if len(points) > 1 else "*", color=f"C{i + 1}",
                 markersize=5 if len(points) > 1 else 12,
                 label=f"{key.removeprefix('eval/').removesuffix('/bpb')} (bits per byte)")
    bottom.plot(flops, [r["train/lr"] for r in steps], color="tab:gray")
    bottom.set(xlabel="training FLOPs", ylabel="learning rate")
    for i in (i for i in range(len(steps)) if i == 0 or steps[i]["phase"] != steps[i - 1]["phase"]):
        for axis in (top, bottom):
            axis.axvline(flops[i], color="black", linestyle=":", linewidth=1)
        top.annotate(f" phase {steps[i]['phase']}: {steps[i]['model/params'] / 1e6:.2f}M parameters",
                     (flops[i], 0.02), xycoords=("data", "axes fraction"), fontsize=9)
    top.set_ylim(0, np.quantile(losses, 0.99) * 1.15)
    top.set_title(run.name)
    top.legend(loc="upper right")
    top.grid(alpha=0.3)
    figure.savefig(run / "curves.partial", format="png", dpi=110)
    (run / "curves.partial").rename(run / "curves.png")
