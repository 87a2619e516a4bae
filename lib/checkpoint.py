"""Checkpoints of a run, by Orbax: whole or absent, checked when they are read."""

import contextlib
import logging
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax

from lib.errors import InputError, user_errors
from lib.optim import State
from lib.processes import all_gather, is_main_process


class Damaged(InputError):
    """A checkpoint that cannot be read, or is not what was written."""


def reading() -> dict:
    """Orbax's options for who reads alone: nothing is cleaned up, deleted or made."""
    return dict(read_only=True, save_interval_steps=0, create=False)


def training(keep: int, keep_every: int) -> dict:
    """Orbax's options for a run that trains; a rename retires a checkpoint: it is whole or gone."""
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep)]
    if keep_every:
        kept.append(policies.EveryNSteps(keep_every))
    return dict(
        cleanup_tmp_directories=True,
        todelete_subdir="trash",
        preservation_policy=policies.AnyPreservationPolicy(kept),
    )


class Checkpoints:
    """Orbax checkpoints of a run: STEP/ with params, opt and meta, whole or absent.

    keep: how many of the newest are kept, keep_every: and of which steps. Only a run that trains,
    in each of its processes, opens them with these.
    """

    def __init__(self, root: Path, keep: int | None = None, keep_every: int = 0):
        for name in ("absl", "asyncio"):  # what goes wrong reaches us as exceptions
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self.root = root.resolve()
        self.trash = self.root / "trash"
        self.closed = False
        options = reading() if keep is None else training(keep, keep_every)
        self.manager = ocp.CheckpointManager(
            self.root, options=ocp.CheckpointManagerOptions(**options)
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Wait for the save in flight; after a user's error only where no process waits for us."""
        if kind is None:
            self.close()
        elif issubclass(kind, InputError) and jax.process_count() == 1:
            with contextlib.suppress(InputError):  # the first error is the one to report
                self.close()

    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return sorted(int(p.name) for p in self.root.glob("*") if p.name.isdigit())

    def save(self, step: int, state: State, meta: dict):
        """Begin to save; returns when the state may change again.

        Raises InputError for what the save before met.
        """
        self.wait()
        sums = {name: int(value) for name, value in jax.device_get(checksums(state)).items()}
        rest = dict(opt=state.opt, step=state.step, skipped=state.skipped)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave(meta | {"checksums": sums}),
        )
        with self.writing():
            self.manager.save(step, force=True, args=items)

    def wait(self):
        """Until the save in flight is on disk."""
        with self.writing():
            self.manager.wait_until_finished()
        if is_main_process():
            shutil.rmtree(self.trash, ignore_errors=True)

    def writing(self):
        """What writing meets, as one sentence; Orbax gives a full disk as any kind of exception."""
        last = [0, *self.steps()][-1]
        return user_errors(
            Exception,
            InputError,
            f"no checkpoint can be written to {self.root} ({{reason}}); "
            f"make room, and the same command resumes from step {last}",
        )

    def close(self):
        """Wait and stop; without this the last save is lost at exit."""
        if not self.closed:
            self.closed = True
            self.wait()
            self.manager.close()

    def restore(self, step: int, **items):
        """Some of a checkpoint's items; Damaged where Orbax raises any of its many exceptions."""
        sentence = (
            f"checkpoint {self.root / str(step)} is damaged ({{reason}}); there are {self.steps()}"
        )
        with user_errors(Exception, Damaged, sentence):
            return self.manager.restore(step, args=ocp.args.Composite(**items))

    def meta(self, step: int) -> dict:
        """What is known of a checkpoint before its arrays are read."""
        return self.restore(step, meta=ocp.args.JsonRestore())["meta"]

    def params(self, step: int, like: State) -> dict[str, jax.Array]:
        """Parameters alone, placed as `like` says."""
        return self.restore(step, params=ocp.args.StandardRestore(like.params))["params"]

    def state(self, step: int, like: State) -> State:
        """The whole state, onto any mesh; raises Damaged where it is not what was written."""
        written = self.meta(step).get("checksums")
        rest = dict(opt=like.opt, step=like.step, skipped=like.skipped)
        found = self.restore(
            step, params=ocp.args.StandardRestore(like.params), opt=ocp.args.StandardRestore(rest)
        )
        state = State(found["params"], **found["opt"])
        if written:
            sums = jax.device_get(checksums(state))
            changed = [name for name in sums if written[name] != sums[name]]
            if changed:
                raise Damaged(
                    f"checkpoint {self.root / str(step)} is damaged "
                    f"(not as written: {', '.join(changed)})"
                )
        return state

    def put_aside(self, step: int):
        """Rename a damaged checkpoint, so that all processes take the one before it."""
        if is_main_process():
            (self.root / str(step)).rename(self.root / f"{step}.damaged")
        all_gather(0)  # nobody reads the directory before it is renamed
        self.manager.reload()


def find_checkpoint(run: str, step: int | None = None) -> tuple[Checkpoints, int, dict]:
    """A run's checkpoints, the step of one of them, and what is known of it.

    Without a step it is the newest one. While an edit recurs (embeddings are being forgotten), it
    is the one longest after that edit.
    """
    directory = Path(run).expanduser()
    if not (directory / "config.json").is_file():
        raise InputError(f"{str(run)!r} is not a run directory: it has no config.json")
    checkpoints = Checkpoints(directory / "checkpoints")
    found = checkpoints.steps()
    if step is None:
        wanted, asked = found, ""
    else:
        wanted, asked = [n for n in found if n == step], f" of step {step}"
    if not wanted:
        raise InputError(f"run {run} has no checkpoint{asked}; it has {found}")
    metas = {n: checkpoints.meta(n) for n in wanted}

    def age(n: int) -> tuple[float, int]:
        since = metas[n]["since_reset"]
        return (math.inf if since is None else since), n

    best = max(metas, key=age)
    return checkpoints, best, metas[best]


@jax.jit
def checksums(state: State) -> dict[str, jax.Array]:
    """The sum of the bits of each array of a state, uint32: the same on any mesh."""

    def bits(x):
        words = lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}")
        return jnp.sum(words, dtype=jnp.uint32)

    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): bits(x) for path, x in leaves}
