"""Several processes: the mistake of one is a sentence for all; one that is alone says how long it waits."""
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import environment
from test_scale import free_port

from lib.config import ROOT, load_file

MINE = '''
import sys
from functools import partial
import data
from train import *
source = data.Source(partial(data.text, path={text!r}))
config = Config(model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16),
                phases=(Phase(steps=4, batch=8, seq=32),), overlap=8, prompts=(),
                data=data.DataConfig(sources={{"x": source}}, tokenizer="bytes", dev=0, test=0))
if "--process 1" in " ".join(sys.argv):
    config = 3
'''


def start(address: str, process: int, *arguments, cwd) -> subprocess.Popen:
    """Begin one of two processes."""
    command = [sys.executable, ROOT / "train.py", "launch", address, "--processes", "2", "--process",
               str(process), *arguments]
    return subprocess.Popen(command, env=environment(), cwd=cwd, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def test_one_process_s_mistake_is_a_sentence_for_the_others(corpus, tmp_path):
    (tmp_path / "mine.py").write_text(MINE.format(text=str(corpus)))
    address = f"localhost:{free_port()}"
    both = [start(address, i, "mine.py", cwd=tmp_path) for i in (0, 1)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert "Traceback" not in "".join(said)
    own = "config file mine.py defines no `config = Config(...)`"
    assert said[1] == f"error: {own}\n"
    assert f"error: process 1 has ended: {own}" in said[0]


class Service:
    """What processes tell each other by."""

    def __init__(self):
        self.said = {}

    def key_value_set(self, key, value):
        self.said[key] = value

    def key_value_try_get(self, key):
        return self.said[key]


def test_a_process_that_a_signal_ends_tells_the_others_and_not_itself(monkeypatch, capsys):
    launch, service = load_file(ROOT / "tools/launch.py"), Service()
    state = SimpleNamespace(client=service, process_id=1)
    monkeypatch.setattr(launch.distributed, "global_state", state)
    monkeypatch.setattr(launch, "LISTEN", 0.01)
    over = threading.Event()
    silent = launch.last_words(1)
    launch.part("stopped by SIGTERM before the first step", over, silent)
    assert silent.returncode == 0
    assert service.said == {launch.ENDED: "process 1 has ended: stopped by SIGTERM before the first step"}
    ended = []
    monkeypatch.setattr(launch.os, "_exit", lambda code: (ended.append(code), other.set()))
    launch.listen(over, silent)  # its own: it returns
    other = threading.Event()
    launch.listen(other, silent)
    said = "error: process 1 has ended: stopped by SIGTERM before the first step; the same command goes on"
    assert ended == [2] and capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("ends", ["os.abort()", "os.kill(os.getpid(), 9)", "launch.unsaid(words)"])
def test_a_process_that_is_lost_leaves_one_sentence(ends):
    """As where JAX aborts it, which prints a trace, or where the system kills it."""
    script = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom lib.config import load_file\n"
              f"launch = load_file({str(ROOT / 'tools/launch.py')!r})\nwords = launch.last_words(1)\n{ends}")
    done = subprocess.run([sys.executable, "-c", script], env=environment(), text=True, capture_output=True)
    said = "error: process 1 was ended from outside, or by JAX since another process of the run was lost"
    assert done.stderr.startswith(said) == (done.returncode != 0)
    assert done.stderr.count("\n") == (done.returncode != 0)


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_is_alone_says_how_long_it_waits(process, tmp_path):
    begun = time.monotonic()
    alone = start(f"localhost:{free_port()}", process, "--patience", "6", "mine.py", cwd=tmp_path)
    _, said = alone.communicate(timeout=120)
    assert f"process {process} of 2 waits for the others at localhost:" in said
    assert "for at most 6 seconds (--patience)" in said
    assert time.monotonic() - begun < 60
    assert "Traceback" not in said and alone.returncode == 2, said
    assert said.splitlines()[-1].startswith("error: launch localhost:"), said
