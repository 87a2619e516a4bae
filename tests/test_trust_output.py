"""Signals at any time, and output that cannot be written: neither ends a run before its time."""
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import environment

import train
from lib.config import ROOT, load_file
from lib.errors import InputError
from lib.log import say
from lib.output import Forgiving, complain, forgiving
from lib.stop import PATIENCE
from lib.tables import columns, printable
from lib.tokenizers import Bytes

evaluate, sample, corpus = (load_file(ROOT / f"tools/{verb}.py") for verb in ("eval", "sample", "corpus"))

# ------------------------------------------------------------------------------------------- signals

WAITING = '''
import sys, time
sys.path.insert(0, {root!r})
import lib.stop
from lib.stop import Stop
lib.stop.PATIENCE = {patience}
with Stop(9.0, 75) as stop:
    if {begun}:
        stop.begin(None, lambda: None)
    print("ready", flush=True)
    end = time.monotonic() + 20
    while time.monotonic() < end and not ({ends} and stop.wants_exit):
        time.sleep(0.02)
print("saved", flush=True)
'''


def waiting(begun: bool, ends: bool, *signals: signal.Signals, pause: float = 0.0,
            patience: float = PATIENCE, before: str = ""):
    """(exit code, output) of a process that waits before or after `begin`, and gets signals."""
    script = WAITING.replace("with Stop", f"{before}\nwith Stop")
    script = script.format(root=str(ROOT), begun=begun, ends=ends, patience=patience)
    with subprocess.Popen([sys.executable, "-c", script], env=environment(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(pause)
        out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_a_signal_before_the_first_step_is_answered_at_once():
    """While a cache is built or a tokenizer is trained nothing needs to be saved."""
    code, out = waiting(False, False, signal.SIGTERM)
    assert (code, out) == (75, "stopped by SIGTERM before the first step; the same command begins again\n")


def test_a_signal_is_answered_while_a_step_takes_long_and_a_second_one_ends_it():
    code, out = waiting(True, False, signal.SIGTERM, signal.SIGTERM, pause=0.8)
    first, second = out.splitlines()
    assert code == 128 + signal.SIGTERM
    assert first == "SIGTERM: what is at work is finished and saved first; once more ends it at once"
    assert second.startswith("error: interrupted by SIGTERM; the same command resumes")


def test_who_ends_at_once_says_why_to_the_others_first():
    """`launch` hears it: else they would end by a trace of JAX's, within a minute."""
    before = "import lib.output\nlib.output.partings.append(lambda why: print('told', why, flush=True))"
    code, out = waiting(False, False, signal.SIGTERM, before=before)
    assert code == 75 and out.splitlines()[-1] == "told stopped by SIGTERM before the first step"
    code, out = waiting(True, False, signal.SIGTERM, signal.SIGTERM, pause=0.8, before=before)
    assert code == 128 + signal.SIGTERM and out.splitlines()[-1] == "told interrupted by SIGTERM"


def test_an_echo_of_a_signal_is_no_second_one():
    """As where a shell and a scheduler both pass it on; the run saves, and ends as if it came once."""
    code, out = waiting(True, True, signal.SIGTERM, signal.SIGTERM, pause=0.2, patience=2.0)
    assert code == 0 and out.splitlines()[-1] == "saved"


@pytest.mark.parametrize("code", [-1, 256, True])
def test_a_stop_code_is_an_exit_code(code):
    with pytest.raises(InputError, match="stop_code is"):
        train.check(train.Config(name="a", stop_code=code))


# -------------------------------------------------------------------------------------------- output


class Broken(io.StringIO):
    """A stream that nobody reads any more, or whose disk is full."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_stream_that_breaks_is_said_once_and_ends_nothing():
    other = io.StringIO()
    stream = Forgiving(Broken(), "standard output", other)
    for _ in range(3):
        assert stream.write("a") == 1
        stream.flush()
    assert other.getvalue() == (
        "standard output cannot be written ([Errno 32] Broken pipe); the run goes on without it\n")
    both = Forgiving(Broken(), "standard output", Broken())
    assert both.write("a") == 1 and not both.isatty()


def test_what_an_encoding_lacks_is_escaped():
    inner = io.TextIOWrapper(io.BytesIO(), "ascii")
    stream = Forgiving(inner, "standard output", None)
    stream.write("± 木 \udc80")
    stream.flush()
    assert inner.buffer.getvalue() == b"\\xb1 \\u6728 \\udc80"


def test_no_stream_at_all_is_no_error(monkeypatch):
    """As where a service starts a run with its output closed."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with forgiving():
        print("a")
        print("b", file=sys.stderr, flush=True)
        assert not sys.stdout.isatty()
    closed = io.StringIO()
    closed.close()
    assert Forgiving(closed, "standard output", None).write("a") == 1


OWN = '''
from functools import partial
import data
from train import *
phase = Phase(steps=4, batch=8, seq=32)
model = ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16)
source = data.Source(partial(data.text, path={text!r}))
config = Config(model=model, phases=(phase,), overlap=8, prompts=(),
                data=data.DataConfig(sources={{"x": source}}, tokenizer="bytes", dev=0, test=0))
'''


@pytest.mark.parametrize("where", ["pipe", "full"])
def test_a_run_whose_output_is_lost_ends_as_it_would(corpus, tmp_path, where):
    """A pipe that is closed after the first line, and a log on a full disk."""
    (tmp_path / "mine.py").write_text(OWN.format(text=str(corpus)))
    out = subprocess.PIPE
    if where == "full":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        out = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, ROOT / "train.py", "mine.py"]
    with subprocess.Popen(command, env=environment(), cwd=tmp_path, text=True, stdout=out,
                          stderr=subprocess.PIPE) as process:
        if where == "pipe":
            process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 0
    assert (tmp_path / "runs/mine/summary.json").is_file()
    assert said.count("standard output cannot be written") == 1 and "Traceback" not in said


# -------------------------------------------------------------------------------------- control sequences

EVIL = "a\x1b]0;owned\x07\x1b[2J\x9b1A\r\u202eb\udc80\tc\n"
SHOWN = "a\\x1b]0;owned\\x07\\x1b[2J\\x9b1A\\x0d\\u202eb\\udc80\tc\n"


def test_what_controls_a_terminal_is_shown():
    assert printable(EVIL) == SHOWN
    assert printable("plain é 木 🌲\n\t") == "plain é 木 🌲\n\t"


def test_text_of_others_reaches_no_terminal_as_it_is(capsys):
    """In lines of a run, errors, tables, figures of tasks, samples and inspected rows."""
    say(EVIL)
    print(columns([[EVIL, "1"]]))
    evaluate.show({f"task/{EVIL}/acc": 0.5})
    sample.Screen().show(EVIL)
    row = dict(segments=np.ones(4, int), weights=np.ones(4), targets=np.frombuffer(b"\x1b[2J", np.uint8))
    print(corpus.row_text(row, Bytes()).plain)
    complain(EVIL)
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x07\x9b\r\u202e\udc80")
    assert out.count("\\x1b[2J") == 5 and "\\x1b[2J" in err
