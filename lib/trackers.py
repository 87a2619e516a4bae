"""TensorBoard and Weights & Biases: a config's `tracker` gets the rows of metrics.jsonl too.

A resumed run has cut metrics.jsonl back to its checkpoint. Its track is brought into line with it
before it goes on, so that each step is in it once, however the run was stopped.

    tensorboard --logdir runs       # with --tracker tensorboard: event files in RUN/tensorboard
    wandb sync RUN/wandb/offline*   # with --tracker wandb and WANDB_MODE=offline
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from lib.config import to_json
from lib.disk import digest, metric_rows, write
from lib.errors import user_errors
from lib.processes import is_main_process

# What the row of an evaluation repeats of the row of its step.
KNOWN = {"step", "train/tokens", "train/flops", "phase", "final"}


def start_tracker(config, directory: Path, start: int) -> Callable[[dict], None] | None:
    """What takes the rows to come, in the main process alone; it has the rows up to `start`."""
    if config.tracker == "none" or not is_main_process():
        return None
    begin = {"tensorboard": tensorboard, "wandb": weights_and_biases}[config.tracker]
    send, first = begin(config, directory, start)
    for row in metric_rows(directory / "metrics.jsonl")[0]:
        if row["step"] >= first:
            send(row)
    return send


def numbers(row: dict) -> dict[str, float]:
    """The finite numbers of a row; of an evaluation's row, those that its step's row has not."""
    known = {"step"} if "train/loss" in row else KNOWN
    return {name: value for name, value in row.items() if name not in known and value is not None}


def tensorboard(config, directory: Path, start: int) -> tuple[Callable, int]:
    """(row -> on disk, first step to send).

    Each start writes one event file more, whose first event takes back that step and those after
    it. A run that has no event file yet gets its past too.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = directory / "tensorboard"
    first = start if list(folder.glob("events.*")) else 0
    writer = EventFileWriter(str(folder))
    again = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=first, session_log=again))

    def send(row: dict):
        found = numbers(row).items()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in found]
        event = Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        writer.add_event(event)
        writer.flush()  # whatever comes, a checkpoint's rows are there; raises what the writing met

    return send, first


def weights_and_biases(config, directory: Path, start: int) -> tuple[Callable, int]:
    """(row -> sent, first step to send): what W&B does not have, which is everything offline.

    A killed run leaves an offline track without its end, so each start replaces those not synced.
    Online, W&B says how far it came, and ignores rows before that: they come out the same, byte for
    byte.
    """
    import wandb

    wandb.finish()  # what this process tracked before: a run of the same second has its directory
    folder = directory / "wandb"
    if not start or not (folder / "id").exists():  # a run that begins anew is another one
        write(folder / "id", digest([str(directory.resolve()), time.time_ns()]))
    for old in folder.glob("offline-run-*"):
        if not list(old.glob("*.synced")):
            shutil.rmtree(old, ignore_errors=True)
    sentence = (
        "tracker is 'wandb', but {reason}; allowed is an account that `wandb login` has opened, "
        "or WANDB_MODE=offline"
    )
    with user_errors(wandb.errors.Error, sentence=sentence):
        track = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "coppice"),
            name=config.name,
            id=(folder / "id").read_text(),
            dir=directory,
            resume="allow",
            config=to_json(config),
            settings=wandb.Settings(console="off"),
        )

    def send(row: dict):
        track.log(numbers(row), step=row["step"])

    return send, track.starting_step
