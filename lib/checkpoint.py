"""Checkpoints of a run, by Orbax: whole or absent, checked when they are read."""
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
from lib.processes import is_main_process


class Damaged(InputError):
    """A checkpoint that cannot be read, or is not what was written."""


class Checkpoints:
    """Orbax checkpoints of a run: STEP/ with params, opt and meta, whole or absent.

    keep: how many of the newest are kept, keep_every: and of which steps. Only a run that trains, in each of
    its processes, may open them with these; readers clean up and delete nothing.
    """

    def __init__(self, root: Path, keep: int | None = None, keep_every: int = 0):
        for name in ("absl", "asyncio"):  # what goes wrong reaches us as exceptions
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self.root, self.trash = root.resolve(), root.resolve() / "trash"
        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        options = dict(read_only=True, save_interval_steps=0, create=False) if keep is None else dict(
            cleanup_tmp_directories=True, todelete_subdir="trash",  # retired by a rename: whole or gone
            preservation_policy=policies.AnyPreservationPolicy(kept))
        self.manager = ocp.CheckpointManager(self.root, options=ocp.CheckpointManagerOptions(**options))

    def steps(self) -> list[int]:
        """Steps that are complete on disk, ascending."""
        return sorted(int(p.name) for p in self.root.glob("*") if p.name.isdigit())

    def save(self, step: int, state: State, meta: dict):
        """Begin to save; returns when the state may change again. Raises what the previous save met."""
        self.wait()
        arrays, rest = ocp.args.StandardSave, dict(opt=state.opt, step=state.step, skipped=state.skipped)
        meta = meta | {"checksums": {k: int(v) for k, v in jax.device_get(checksums(state)).items()}}
        with self.writing():
            self.manager.save(step, force=True, args=ocp.args.Composite(
                params=arrays(state.params), opt=arrays(rest), meta=ocp.args.JsonSave(meta)))

    def wait(self):
        """Until the save in flight is on disk."""
        with self.writing():
            self.manager.wait_until_finished()
        if is_main_process():
            shutil.rmtree(self.trash, ignore_errors=True)

    def writing(self):
        """What writing meets (a full disk is an OSError, a ValueError or a bare Exception), said in full."""
        return user_errors(Exception, InputError, f"no checkpoint can be written to {self.root} ({{reason}}); make "
                     f"room, and the same command resumes from step {(self.steps() or [0])[-1]}")

    def close(self):
        """Wait and stop; without this the last save is lost at exit."""
        self.wait()
        self.manager.close()

    def restore(self, step: int, **items):
        """Some of a checkpoint's items; raises Damaged where Orbax raises, for which it has many kinds."""
        sentence = f"checkpoint {self.root / str(step)} is damaged ({{reason}}); there are {self.steps()}"
        with user_errors(Exception, Damaged, sentence):
            return self.manager.restore(step, args=ocp.args.Composite(**items))

    def meta(self, step: int) -> dict:
        """What is known of a checkpoint before its arrays are read."""
        return self.restore(step, meta=ocp.args.JsonRestore())["meta"]

    def params(self, step: int, like: State) -> dict[str, jax.Array]:
        """Parameters alone, placed as `like` says."""
        return self.restore(step, params=ocp.args.StandardRestore(like.params))["params"]

    def state(self, step: int, like: State) -> State:
        """The whole state, onto any mesh."""
        rest = dict(opt=like.opt, step=like.step, skipped=like.skipped)
        arrays, kept = ocp.args.StandardRestore, self.meta(step).get("checksums")
        got = self.restore(step, params=arrays(like.params), opt=arrays(rest))
        state = State(got["params"], **got["opt"])
        sums = jax.device_get(checksums(state))
        if changed := ", ".join(n for n in sums if kept and kept[n] != sums[n]):
            raise Damaged(f"checkpoint {self.root / str(step)} is damaged (not as written: {changed})")
        return state


def find_checkpoint(run: str, step: int | None = None) -> tuple[Checkpoints, int, dict]:
    """A run's checkpoints, the step of one of them, and what is known of it.

    Without a step: the newest, or where an edit recurs (embeddings are being forgotten), the one longest
    after it.
    """
    directory = Path(run).expanduser()
    if not (directory / "config.json").is_file():
        raise InputError(f"{str(run)!r} is not a run directory: it has no config.json")
    checkpoints = Checkpoints(directory / "checkpoints")
    found = checkpoints.steps()
    if not found or (step is not None and step not in found):
        raise InputError(f"run {run} has no checkpoint{f' of step {step}' if step else ''}; it has {found}")
    metas = {s: checkpoints.meta(s) for s in (found if step is None else [step])}
    since = {s: math.inf if m["since_reset"] is None else m["since_reset"] for s, m in metas.items()}
    step = max(metas, key=lambda s: (since[s], s))
    return checkpoints, step, metas[step]


@jax.jit
def checksums(state: State) -> dict[str, jax.Array]:
    """The sum of the bits of each parameter and each array of the optimiser, uint32: the same on any mesh."""
    def bits(x):
        return jnp.sum(lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}"), dtype=jnp.uint32)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): bits(x)
            for path, x in jax.tree.leaves_with_path(state)}
