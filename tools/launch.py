"""Run any command as one of several processes, on one host or many: TPU pod, Slurm, Kubernetes.

    python train.py launch auto CONFIG ...                                  on each host, the same
    python train.py launch HOST:PORT --processes N --process I CONFIG ...   where no cluster tells

`auto` asks the cluster for the address of process 0, for the number of processes and for which of
them this is (see jax.distributed.initialize). Where there is no cluster to ask, say it: HOST:PORT
is a free port of process 0's host.

All processes see one directory of runs. Each makes and reads only its rows of a batch. One process
of a host builds token caches, process 0 prints and writes. SIGTERM to any of them saves all of them
at the same step. A process that is lost ends the others within a minute.
"""
import os
import sys
import traceback

import jax

import train
from lib.arguments import Arguments
from lib.disk import is_step
from lib.errors import InputError
from lib.processes import is_main_process

FLAGS = ("--processes", "--process")


def parse_arguments(arguments: list[str]) -> tuple[str, dict[str, int], list[str]]:
    """(auto or HOST:PORT, what the flags say, the command to run)."""
    parser = Arguments("launch", __doc__)
    parser.usage = "%(prog)s auto | HOST:PORT --processes N --process I [CONFIG | VERB] ..."
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.error("allowed is auto or HOST:PORT")
    address, rest = arguments[0], arguments[1:]
    given = {}
    while rest and rest[0] in FLAGS:
        given[rest[0]] = "".join(rest[1:2])
        rest = rest[2:]
    expected = 0 if address == "auto" else 2
    whole = all(is_step(number) for number in given.values())
    if not whole or len(given) != expected:
        parser.error(
            f"{' '.join(arguments[:5])} is given; allowed is auto alone, or HOST:PORT --processes "
            "N --process I with whole numbers, before the command"
        )
    return address, {flag: int(number) for flag, number in given.items()}, rest


def connect(address: str, given: dict[str, int], rest: list[str]):
    """Connect the processes. Raises InputError with what to do instead."""
    processes, process = (given.get(flag) for flag in FLAGS)
    where = None if address == "auto" else address
    try:
        jax.distributed.initialize(where, processes, process, heartbeat_timeout_seconds=60)
    except (ValueError, RuntimeError) as error:
        if address == "auto":
            command = " ".join(rest) or "CONFIG"
            raise InputError(
                f"launch auto: no cluster says which process this is ({error}); on one machine "
                f"leave it out: python train.py {command}; on several give each the address of the "
                f"first: launch HOST:PORT --processes N --process I {command}"
            ) from error
        raise InputError(f"launch {address}: {error}") from error


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    address, given, rest = parse_arguments(arguments)
    connect(address, given, rest)
    out = sys.stdout
    code = 1
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")
    try:
        code = train.main(rest)
    except Exception:  # whatever it is, the other processes must not wait for this one
        traceback.print_exc()
    sys.stdout = out
    if code:
        sys.stderr.flush()
        os._exit(code)  # at once: a farewell would wait for the others, who may wait for this one
    return code
