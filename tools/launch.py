"""Run any command as one of several processes, on one host or many: TPU pod, Slurm, Kubernetes.

    python train.py launch auto CONFIG ...                                  on each host, the same
    python train.py launch HOST:PORT --processes N --process I CONFIG ...   where no cluster tells

`auto` asks the cluster for the address of process 0, for the number of processes and for which of
them this is (see jax.distributed.initialize). Where there is no cluster to ask, say it: HOST:PORT
is a free port of process 0's host.

All processes see one directory of runs. Each makes and reads only its rows of a batch. One process
of a host builds token caches, process 0 prints and writes. SIGTERM to any of them saves all of them
at the same step. A process that ends by a mistake, or by a signal before the first step, says so to
the others, which end too. Where one is lost, JAX ends the others within a minute, with a trace of
its own, after which a sentence says so.

A process waits for the others `--patience` seconds (300), and says so.
"""
import contextlib
import functools
import os
import re
import subprocess
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed  # jax has no public way to say something to other processes

import train
from lib.arguments import Arguments
from lib.disk import is_step
from lib.errors import InputError, first_cause
from lib.output import complain, complaints, partings
from lib.processes import is_main_process

FLAGS = ("--processes", "--process")
PATIENCE = "--patience"
SECONDS = 300  # that a process waits for the others, without --patience
QUIET = 3.0  # seconds of waiting without a word
ENDED = "coppice/ended"  # the key under which a process says that it ends by a mistake
LISTEN = 0.5  # seconds from one look at that key to the next
# What a device says where another process does not answer.
LOST = re.compile(r"gloo|connect|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|coordination", re.I)


def parse_arguments(arguments: list[str]) -> tuple[str, dict[str, int], list[str]]:
    """(auto or HOST:PORT, what the flags say, the command to run)."""
    parser = Arguments("launch", __doc__)
    parser.usage = "%(prog)s auto | HOST:PORT --processes N --process I [CONFIG | VERB] ..."
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.error("allowed is auto or HOST:PORT")
    address, rest = arguments[0], arguments[1:]
    given = {}
    while rest and rest[0] in (*FLAGS, PATIENCE):
        given[rest[0]] = "".join(rest[1:2])
        rest = rest[2:]
    expected = 0 if address == "auto" else 2
    whole = all(is_step(number) for number in given.values())
    if not whole or len(given.keys() - {PATIENCE}) != expected:
        parser.error(
            f"{' '.join(arguments[:5])} is given; allowed is auto alone, or HOST:PORT --processes "
            "N --process I with whole numbers, before the command; --patience SECONDS with either"
        )
    return address, {flag: int(number) for flag, number in given.items()}, rest


def connect(address: str, given: dict[str, int], rest: list[str]):
    """Connect the processes. Raises InputError with what to do instead."""
    processes, process = (given.get(flag) for flag in FLAGS)
    where = None if address == "auto" else address
    seconds = given.get(PATIENCE, SECONDS)
    name = "this process" if process is None else f"process {process} of {processes}"
    there = threading.Event()
    threading.Thread(target=watch, args=[there, address, name, seconds], daemon=True).start()
    try:  # JAX itself would end the process by an abort, with a trace of the stack
        jax.distributed.initialize(where, processes, process,
                                   initialization_timeout=seconds + 60,
                                   heartbeat_timeout_seconds=60)
    except (ValueError, RuntimeError) as error:
        if address == "auto":
            command = " ".join(rest) or "CONFIG"
            raise InputError(
                f"launch auto: no cluster says which process this is ({error}); on one machine "
                f"leave it out: python train.py {command}; on several give each the address of the "
                f"first: launch HOST:PORT --processes N --process I {command}"
            ) from error
        raise InputError(f"launch {address}: {error}") from error
    finally:
        there.set()


def watch(there: threading.Event, address: str, name: str, seconds: int):
    """Say that a process waits for the others, and end it when its patience is over."""
    if there.wait(QUIET):
        return
    print(f"{name} waits for the others at {address}, for at most {seconds} seconds (--patience)",
          file=sys.stderr, flush=True)
    if not there.wait(seconds - QUIET):
        complain(f"launch {address}: not all processes were there after {seconds} seconds; start "
                 "each of them, at the same address, within --patience SECONDS of one another")
        os._exit(2)


def last_words(process: int) -> subprocess.Popen:
    """A shell that says one sentence if this process is gone before it writes a line to it.

    Where another process is lost, JAX aborts this one from within, with a trace of its stack.
    """
    said = (
        f"error: process {process} was ended from outside, or by JAX since another process of the "
        "run was lost; the same command goes on from the last checkpoint"
    )
    shell = ["sh", "-c", 'read line || echo "$0" >&2', said]
    return subprocess.Popen(
        shell, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )


def unsaid(words: subprocess.Popen):
    """Let `last_words` be silent: this process ends by itself, and has said why."""
    gone = OSError, ValueError, subprocess.TimeoutExpired  # the shell, or it was told before
    with contextlib.suppress(*gone):
        words.communicate(b"over\n", timeout=LISTEN)


def say_to_others(sentence: str):
    """Tell the other processes that this one ends, and why."""
    client, own = distributed.global_state.client, distributed.global_state.process_id
    if client is None or not sentence:
        return
    try:
        client.key_value_set(ENDED, f"process {own} has ended: {sentence}")
    except RuntimeError:  # another one was faster, or the service is gone
        return
    if own == 0:  # which is the one that the others ask
        time.sleep(4 * LISTEN)


def part(sentence: str, over: threading.Event, words: subprocess.Popen):
    """Tell the others, where this process ends at once by a signal."""
    over.set()
    unsaid(words)
    say_to_others(sentence)


def listen(over: threading.Event, words: subprocess.Popen):
    """End this process, with a sentence, where another one has ended by a mistake."""
    client = distributed.global_state.client
    while not over.wait(LISTEN):
        try:
            said = client.key_value_try_get(ENDED)
        except RuntimeError:  # nobody has said anything
            continue
        if not over.is_set():
            complain(f"{said}; the same command goes on from the last checkpoint")
            sys.stderr.flush()
            unsaid(words)
            os._exit(2)


def run(command: list[str]) -> int:
    """Run a command of all processes; its exit code."""
    try:
        return train.main(command)
    except Exception as error:  # of anything: the other processes must not wait for this one
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
            time.sleep(2 * LISTEN)  # if the other one said why, that is said in place of this
            complain(f"another process does not answer ({first_cause(error)}); the same command "
                     "goes on from the last checkpoint")
            return 1
        traceback.print_exc()
        complaints.append(first_cause(error))
        return 1


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    address, given, rest = parse_arguments(arguments)
    connect(address, given, rest)
    out, over = sys.stdout, threading.Event()
    words = last_words(jax.process_index())
    threading.Thread(target=listen, args=[over, words], daemon=True).start()
    partings.append(functools.partial(part, over=over, words=words))
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")
    try:
        code = run(rest)
    finally:
        over.set()
        unsaid(words)
    sys.stdout = out
    if code:
        say_to_others("".join(complaints[-1:]))
        sys.stderr.flush()
        os._exit(code)  # at once: a farewell would wait for the others, who may wait for this one
    return code
