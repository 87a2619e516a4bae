"""Trackers: a config's `tracker` gets the rows of metrics.jsonl too.

A tracker is a function `run, start -> (row -> None)`. It is called in the main process before a run
goes on after `start` steps, and what it gives is called with each row to come. `run.directory`,
`run.config` and `run.file` say which run it is; metrics.jsonl there has the rows up to `start`.

A resumed run has cut metrics.jsonl back to its checkpoint. The trackers here bring their track into
line with it before they go on, so that each step is in it once, however the run was stopped.

    tensorboard --logdir runs       # with --tracker tensorboard: event files in RUN/tensorboard
    wandb sync RUN/wandb/offline*   # with --tracker wandb and WANDB_MODE=offline
    trackio show --project coppice  # with --tracker trackio
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator

from lib.config import to_json
from lib.disk import digest, metric_rows, write
from lib.errors import InputError, user_errors
from lib.fields import plain
from lib.processes import is_main_process

# What the row of an evaluation repeats of the row of its step.
KNOWN = {"step", "train/tokens", "train/flops", "phase", "final"}


def start_tracker(run, start: int) -> Callable[[dict], None] | None:
    """What takes the rows of a run to come, in the main process alone; it has those up to `start`.

    run: a `train.Run`. Raises InputError for a function of the config that gives nothing to call.
    """
    tracker = run.config.tracker
    if tracker == "none" or not is_main_process():
        return None
    named = {"tensorboard": tensorboard, "wandb": weights_and_biases, "trackio": trackio}
    begin = named.get(tracker, tracker)
    send = begin(run, start)
    if not callable(send):
        raise InputError(
            f"tracker is {plain(begin).__name__}, which gives {send!r}; allowed is a function that "
            "takes a row"
        )
    return send


def rows_from(run, first: int) -> Iterator[dict]:
    """The rows of a run's metrics.jsonl from step `first` on."""
    for row in metric_rows(run.directory / "metrics.jsonl")[0]:
        if row["step"] >= first:
            yield row


def numbers(row: dict) -> dict[str, float]:
    """The finite numbers of a row; of an evaluation's row, those that its step's row has not."""
    known = {"step"} if "train/loss" in row else KNOWN
    return {name: value for name, value in row.items() if name not in known and value is not None}


def tensorboard(run, start: int) -> Callable[[dict], None]:
    """row -> on disk.

    Each start writes one event file more, whose first event takes back that step and those after
    it. A run that has no event file yet gets its past too.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = run.directory / "tensorboard"
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

    for row in rows_from(run, first):
        send(row)
    return send


def weights_and_biases(run, start: int) -> Callable[[dict], None]:
    """row -> sent. First goes what W&B does not have, which is everything offline.

    A killed run leaves an offline track without its end, so each start replaces those not synced.
    Online, W&B says how far it came, and ignores rows before that: they come out the same, byte for
    byte.
    """
    import wandb

    wandb.finish()  # what this process tracked before: a run of the same second has its directory
    directory = run.directory
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
            name=run.config.name,
            id=(folder / "id").read_text(),
            dir=directory,
            resume="allow",
            config=to_json(run.config),
            settings=wandb.Settings(console="off"),
        )

    def send(row: dict):
        track.log(numbers(row), step=row["step"])

    for row in rows_from(run, track.starting_step):
        send(row)
    return send


def trackio(run, start: int, project: str = "coppice") -> Callable[[dict], None]:
    """row -> sent. What was sent of this run before is taken back, and all of it sent again.

    Trackio adds rows to a run and replaces none, so this is how each step is there once.
    """
    import trackio

    place = run.directory / "trackio"  # the identity of what was sent
    before = []
    if place.exists():
        with contextlib.suppress(ValueError):  # the project is gone
            before = [*trackio.Api().runs(project)]
    for old in before:
        if old.id == place.read_text():
            old.delete()
    with user_errors(sentence="tracker is 'trackio', but {reason}"):
        track = trackio.init(
            project=project,
            name=run.config.name,
            group=os.environ.get("WANDB_RUN_GROUP"),  # which `study` sets
            config=to_json(run.config),
            embed=False,
        )
    write(place, track.id)

    def send(row: dict):
        track.log(numbers(row), step=row["step"])

    for row in rows_from(run, 0):
        send(row)
    return send
