"""TensorBoard and Weights & Biases, by a config's `tracker`."""
import json
import os
import shutil
import time
from collections.abc import Callable

from lib.config import to_json
from lib.disk import digest, write
from lib.errors import user_errors
from lib.processes import is_main_process


def start_tracker(run, start: int) -> Callable[[dict], None] | None:
    """What takes the rows to come, in the process that leads; those up to step `start` it has by then."""
    if run.config.tracker == "none" or not is_main_process():
        return None
    send, first = {"tensorboard": tensorboard, "wandb": weights_and_biases}[run.config.tracker](run, start)
    with open(run.directory / "metrics.jsonl") as rows:
        for row in map(json.loads, rows):
            if row["step"] >= first:
                send(row)
    return send


def numbers(row: dict) -> dict[str, float]:
    """The finite numbers of a row but its step; of an evaluation's row, those that the step's own has not."""
    known = {"step"} if "train/loss" in row else {"step", "train/tokens", "train/flops", "phase"}
    return {name: value for name, value in row.items() if name not in known and value is not None}


def tensorboard(run, start: int) -> tuple[Callable, int]:
    """(row -> on disk, first step to send): one event file more, whose first event takes back that step and
    those after it. A run that has none gets its past too.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    folder = run.directory / "tensorboard"
    first = start if list(folder.glob("events.*")) else 0
    writer, again = EventFileWriter(str(folder)), SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=first, session_log=again))

    def send(row: dict):
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
        writer.add_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))
        writer.flush()  # whatever comes, a checkpoint's rows are there; raises what the writing met

    return send, first


def weights_and_biases(run, start: int) -> tuple[Callable, int]:
    """(row -> sent, first step to send): what W&B does not have, which is everything offline.

    A killed run leaves an offline track without its end, so each start replaces those not synced. Online, W&B
    says how far it came, and ignores rows before that: they come out the same, byte for byte.
    """
    import wandb
    wandb.finish()  # what this process tracked before; within a second, its directory would be this one's
    folder, environment = run.directory / "wandb", os.environ
    if not start or not (folder / "id").exists():  # a run that begins anew is another one
        write(folder / "id", digest([str(run.directory.resolve()), time.time_ns()]))
    for old in folder.glob("offline-run-*"):
        if not list(old.glob("*.synced")):
            shutil.rmtree(old, ignore_errors=True)
    with user_errors(wandb.errors.Error, sentence="tracker is 'wandb', but {reason}; allowed is an account "
                     "that `wandb login` has opened, or WANDB_MODE=offline"):
        track = wandb.init(project=environment.get("WANDB_PROJECT", "coppice"), name=run.config.name,
                           id=(folder / "id").read_text(), dir=run.directory, resume="allow",
                           config=to_json(run.config), settings=wandb.Settings(console="off"))
    return lambda row: track.log(numbers(row), step=row["step"]), track.starting_step
