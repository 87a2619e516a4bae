"""Checkpoints of a run, by Orbax: whole or absent, checked when they are read.

A frozen parameter that came from another run's checkpoint is not written again: see `Loan`.
"""

import contextlib
import logging
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax

from lib.disk import file_hash, is_step, user_path, with_checksum, without_checksum
from lib.errors import InputError, first_cause, user_errors
from lib.keys import is_run, run_step
from lib.memory import LESS, is_out
from lib.optim import State
from lib.processes import all_gather, is_main_process
from lib.trust import read_record

FORMAT = 1  # of a checkpoint's metadata; those that name none were made before there was one


class Damaged(InputError):
    """A checkpoint that cannot be read, or is not what was written."""


class Loan(NamedTuple):
    """A parameter that is another run's, and that checkpoints leave out while it is frozen."""

    run: str  # directory of the run whose checkpoint holds it, absolute
    step: int  # of that checkpoint
    name: str  # of the parameter there
    checksum: int | None  # see `checksums`; None of an older version, which is not compared

    def written(self, directory: Path) -> dict:
        """The loan as the meta of a checkpoint of the run in `directory` has it.

        Its path is known from there too: both runs may be moved together.
        """
        near = os.path.relpath(self.run, directory.resolve())
        return dict(self._asdict(), near=near)

    @classmethod
    def read(cls, written: dict, directory: Path) -> "Loan":
        """The inverse of `written`, wherever the run in `directory` is now."""
        given = dict(written)
        near = directory.resolve() / given.pop("near")
        checkpoint = near / "checkpoints" / str(given["step"])
        if checkpoint.is_dir():
            given["run"] = os.path.normpath(near)
        return cls(**given)


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
        return sorted(int(p.name) for p in self.root.glob("*") if is_step(p.name))

    def save(self, step: int, state: State, meta: dict, loans: dict[str, Loan] | None = None):
        """Begin to save; returns when the state may change again.

        loans: of frozen parameters. Those that are still what was borrowed are not written.
        Raises InputError for what the save before met.
        """
        self.wait()
        sums = jax.device_get(checksums(state))
        sums = {name: int(value) for name, value in sums.items()}
        meta = meta | {"checksums": sums, "format": FORMAT}
        lent = unchanged(loans or {}, state.params)
        if len(lent) == len(state.params):  # Orbax writes no item without arrays
            lent = {}
        if lent:
            home = self.root.parent
            meta["borrowed"] = {name: loan.written(home) for name, loan in lent.items()}
        own = {name: x for name, x in state.params.items() if name not in lent}
        rest = dict(opt=state.opt, step=state.step, skipped=state.skipped)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(own),
            opt=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave(with_checksum(meta)),
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
            Exception,  # of Orbax, which gives a full disk as any kind
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
        """Some of a checkpoint's items; raises Damaged where they are not there as written.

        What cannot be read now is no damage and an InputError: the same command may go on later.
        """
        wanted = ocp.args.Composite(**items)
        try:
            return self.attempt(step, wanted)
        except Damaged as error:
            refuse_unreadable(self.root / str(step), error)
            if jax.process_count() > 1:  # one process alone may not begin again
                raise
        return self.attempt(step, wanted)  # it may have been a passing error of the disk

    def attempt(self, step: int, wanted: ocp.args.Composite):
        """Read items once; Damaged where Orbax raises any of its many exceptions."""
        eagerly = jax.ensure_compile_time_eval()  # an edit may load a run while shapes are traced
        said = self.damaged(step, "{reason}")
        with eagerly, user_errors(Exception, Damaged, said):  # of Orbax, which has many kinds
            return self.manager.restore(step, args=wanted)

    def damaged(self, step: int, reason: str) -> str:
        """What is said of a damaged checkpoint."""
        return f"checkpoint {self.root / str(step)} is damaged ({reason}); there are {self.steps()}"

    def meta(self, step: int) -> dict:
        """What is known of a checkpoint before its arrays are read."""
        written = self.restore(step, meta=ocp.args.JsonRestore())["meta"]
        if isinstance(written, dict) and not written.keys() & {"checksum", "format"}:
            return written  # of a run that was made before there were checksums of it
        meta = without_checksum(written)
        if meta is None:
            raise Damaged(self.damaged(step, "its metadata are not as written"))
        return meta

    def loans(self, step: int) -> dict[str, Loan]:
        """The parameters that a checkpoint does not hold itself."""
        home = self.root.parent
        meta = self.meta(step)
        loans = {name: Loan.read(loan, home) for name, loan in meta.get("borrowed", {}).items()}
        if "format" in meta:
            return loans
        return {name: loan._replace(checksum=None) for name, loan in loans.items()}

    def params(self, step: int, like: State) -> dict[str, jax.Array]:
        """Parameters alone, placed as `like` says; raises Damaged where they are not as written.

        Raises InputError where one is borrowed, and its run is gone or has changed.
        """
        params = self.read(step, like.params)["params"]
        self.compare(step, {f"params/{name}": x for name, x in params.items()})
        return params

    def compare(self, step: int, arrays: State | dict):
        """Raise Damaged unless arrays, named as in a state, are what a checkpoint was given."""
        meta = self.meta(step)
        if "format" not in meta:
            note = "is of an older version of Coppice; it is read without comparing checksums"
            print(f"checkpoint {self.root / str(step)} {note}", file=sys.stderr, flush=True)
            return
        written = meta["checksums"]
        with jax.ensure_compile_time_eval():  # an edit may load a run while shapes are traced
            sums = jax.device_get(checksums(arrays))
        changed = [name for name in sums if written.get(name) != sums[name]]
        if changed:
            raise Damaged(self.damaged(step, f"not as written: {', '.join(changed)}"))

    def read(self, step: int, params: dict, **items) -> dict:
        """The parameters of a checkpoint, also those that are borrowed, and other items of it."""
        loans = self.loans(step)
        own = {name: x for name, x in params.items() if name not in loans}
        items["params"] = ocp.args.StandardRestore(own)
        found = dict(self.restore(step, **items))
        if loans:
            owed = {name: params[name] for name in loans}
            lent = borrowed(f"checkpoint {self.root / str(step)}", loans, owed)
            both = found["params"] | lent
            found["params"] = {name: both[name] for name in params}
        return found

    def some_params(self, step: int, like: dict) -> dict[str, jax.Array]:
        """Some of the parameters that a checkpoint holds itself, placed as `like` says."""
        how = ocp.checkpoint_utils.construct_restore_args(like)
        part = ocp.args.PyTreeRestore(item=like, restore_args=how, partial_restore=True)
        return self.restore(step, params=part)["params"]

    def state(self, step: int, like: State) -> State:
        """The whole state, onto any mesh; raises Damaged where it is not what was written.

        Raises InputError where a parameter is borrowed, and its run is gone or has changed.
        """
        rest = dict(opt=like.opt, step=like.step, skipped=like.skipped)
        found = self.read(step, like.params, opt=ocp.args.StandardRestore(rest))
        state = State(found["params"], **found["opt"])
        self.compare(step, state)
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
    directory = user_path(run)
    if not (directory / "config.json").is_file():
        raise InputError(f"{str(run)!r} is not a run directory: it has no config.json")
    read_record(directory)
    checkpoints = Checkpoints(directory / "checkpoints")
    found = checkpoints.steps()
    if step is None:
        wanted, asked = found, ""
    else:
        wanted, asked = [n for n in found if n == step], f" of step {step}"
    if not wanted:
        raise InputError(f"run {run} has no checkpoint{asked}; it has {found}")
    metas = whole_metas(checkpoints, wanted)

    def age(n: int) -> tuple[float, int]:
        since = metas[n]["since_reset"]
        return (math.inf if since is None else since), n

    best = max(metas, key=age)
    return checkpoints, best, metas[best]


def whole_metas(checkpoints: Checkpoints, steps: list[int]) -> dict[int, dict]:
    """{step: what is known of it} of checkpoints; those whose metadata are damaged are left out.

    Raises Damaged where none is left.
    """
    metas, problem = {}, None
    for step in steps:
        try:
            metas[step] = checkpoints.meta(step)
        except Damaged as error:
            problem = error
            if len(steps) > 1:
                print(f"{error}; it is left out", file=sys.stderr, flush=True)
    if not metas:
        raise problem
    return metas


def refuse_unreadable(place: Path, error: Exception):
    """Raise InputError if all that went wrong is that its disk, or memory, does not give it now."""
    said = f"checkpoint {place} cannot be read now ({{reason}}); nothing was changed, so try again"
    while error.__cause__:
        error = error.__cause__
    if is_out(error):
        raise InputError(f"{said.replace('{reason}', first_cause(error))}; {LESS}")
    with user_errors(OSError, InputError, said):
        gone = FileNotFoundError, NotADirectoryError, IsADirectoryError
        if isinstance(error, OSError) and not isinstance(error, gone):
            raise error
        for path in place.rglob("*"):
            if path.is_file():
                file_hash(path)  # reads all of it


def borrow(sources: dict[str, str]) -> dict[str, Loan]:
    """Loans of parameters named {parameter: "RUN@STEP:NAME"}, as `model.Edited.borrowed` has them.

    What that run has borrowed itself is borrowed from where it is. Raises InputError for a run, a
    step or a parameter that is not there.
    """
    by_place: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        place, _, theirs = source.rpartition(":")
        by_place.setdefault(place, {})[name] = theirs
    found = {}
    for place, names in by_place.items():
        checkpoints, step, meta = find_checkpoint(*run_step(place))
        home = checkpoints.root.parent
        sums, again = meta.get("checksums", {}), meta.get("borrowed", {})
        for name, theirs in names.items():
            if f"params/{theirs}" not in sums:
                raise InputError(f"{place} has no parameter {theirs!r} for {name} to be borrowed")
            found[name] = Loan(str(home), step, theirs, sums[f"params/{theirs}"])
            if theirs in again:
                found[name] = Loan.read(again[theirs], home)
    return found


def unchanged(loans: dict[str, Loan], params: dict) -> dict[str, Loan]:
    """Those of the loans whose parameters are still what was borrowed."""
    there = {name: params[name] for name in loans if name in params}
    sums = jax.device_get(checksums(there))
    same = {}
    for name in there:
        if sums[name] == loans[name].checksum:
            same[name] = loans[name]
    return same


def borrowed(by: str, loans: dict[str, Loan], like: dict) -> dict[str, jax.Array]:
    """The parameters of loans, read from the runs that have them, and placed as `like` says.

    by: the checkpoint that needs them, for what is said. Raises InputError for a run that is gone
    or has changed.
    """
    found = {}
    places: dict[tuple[str, int], dict[str, str]] = {}
    for name, loan in loans.items():
        names = places.setdefault((loan.run, loan.step), {})
        names[name] = loan.name
    for (run, step), names in places.items():
        needs = f"{by} takes {', '.join(names)} from run {run} at step {step}"
        if not is_run(run):
            raise InputError(f"{needs}, and that run is gone; put it back, or move both together")
        checkpoints = Checkpoints(Path(run) / "checkpoints")
        there = checkpoints.steps()
        if step not in there:
            raise InputError(f"{needs}, and that checkpoint is gone; there are {there}")
        wanted = {theirs: like[name] for name, theirs in names.items()}
        with user_errors(Damaged):
            lent = checkpoints.some_params(step, wanted)
        for name, theirs in names.items():
            if loans[name].checksum not in (None, checksum(lent[theirs])):
                raise InputError(f"{needs}, and {theirs} has changed since; put back what it was")
            found[name] = lent[theirs]
    return found


def checksum(x: jax.Array) -> int:
    """The hash of an array, see `checksums`."""
    with jax.ensure_compile_time_eval():  # an edit may load a run while shapes are traced
        return int(checksums({"x": x})["x"])


def checksums(state: State | dict) -> dict[str, jax.Array]:
    """A hash of each array of a state, uint32: the same on any mesh.

    It is the sum of scrambled words, each of an element's bits and its place in the whole array. So
    elements that are changed, swapped or moved change it.
    """
    leaves = jax.tree.leaves_with_path(state)
    begin, found = np.uint32(0), {}
    for path, x in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = hashed(x, begin)
        if jax.process_count() > 1:  # sums of two programs at once may meet in another order there
            jax.block_until_ready(found[name])
    return found


@jax.jit
def hashed(x: jax.Array, begin) -> jax.Array:
    """The hash of an array; one program for all of a shape. begin: the place of its first element.

    `begin` is an argument because what depends on none is worked out before a program, by
    `ensure_compile_time_eval`, and becomes a constant in it: as large as the array.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}")
    place = begin
    for size in words.shape:
        place = place[..., None] * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
    return jnp.sum(scrambled(words.astype(jnp.uint32) ^ scrambled(place + 1)), dtype=jnp.uint32)


def scrambled(bits: jax.Array) -> jax.Array:
    """uint32 numbers, one to one, by the last step of MurmurHash3: each bit changes all of them."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
