"""Run any command as one of several processes, on one host or many: a TPU pod, Slurm, Kubernetes, by hand.

    python train.py launch auto CONFIG ...                                      on each host, the same
    python train.py launch HOST:PORT --processes N --process I CONFIG ...       where nothing tells them apart

`auto` asks the cluster (see jax.distributed.initialize) for the address of process 0, how many there are and
which this is; elsewhere say it, HOST:PORT being a free port of process 0's host. All see one directory of
runs. Each makes and reads its rows of a batch alone, one a host builds token caches, process 0 prints and
writes. SIGTERM to any saves all of them at one step; one that is lost ends the others within a minute.
"""
import os
import sys
import traceback

import jax

import train
from lib.arguments import Arguments
from lib.errors import InputError
from lib.processes import is_main_process


def main(arguments: list[str]) -> int:
    """Command line; gives the exit code."""
    parser = Arguments("launch", __doc__)
    parser.usage = "%(prog)s auto | HOST:PORT --processes N --process I [CONFIG | VERB] ..."
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.error("allowed is auto or HOST:PORT")
    address, rest, given = arguments[0], arguments[1:], {}
    while rest and rest[0] in ("--processes", "--process"):
        given[rest[0]], rest = "".join(rest[1:2]), rest[2:]
    if not all(n.isdigit() for n in given.values()) or len(given) != (0 if address == "auto" else 2):
        parser.error(f"{' '.join(arguments[:5])} is given; allowed is auto alone, or HOST:PORT --processes N "
                     "--process I with whole numbers, before the command")
    try:
        jax.distributed.initialize(None if address == "auto" else address, *(
            int(given[n]) if given else None for n in ("--processes", "--process")),
            heartbeat_timeout_seconds=60)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"launch {address}: {error}") from error
    out, code = sys.stdout, 1
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")
    try:
        code = train.main(rest)
    except Exception:
        traceback.print_exc()
    sys.stdout = out
    if code:
        sys.stderr.flush()
        os._exit(code)  # at once: a farewell would wait for the others, who may wait for this one
    return code
