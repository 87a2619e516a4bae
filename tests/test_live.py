"""`bench --against`: two processes that stay alive and are measured in turn."""
import json
import sys

import pytest

import train
from lib import live
from lib.errors import InputError
from lib.live import Bench, compared, in_turn

PEER = '''
import json, os, sys
count, flags = 0, sys.argv[1:]
print("no JSON")
if "COPPICE_LIVE" in os.environ and "--once" not in flags:
    print(json.dumps({"compile_s": 2.0, "flags": flags}), flush=True)
    for line in sys.stdin:
        count += 1
        print(json.dumps({"tokens_per_s": 100 * count, "peak_gib": float(line)}), flush=True)
else:
    print(json.dumps({"tokens_per_s": 50}))
'''


@pytest.fixture
def peer(tmp_path):
    """The command line of a tiny peer, which says that it was faster each time."""
    file = tmp_path / "peer.py"
    file.write_text(PEER)
    return [sys.executable, str(file)]


def test_a_process_stays_alive_between_rounds(peer):
    with Bench(peer) as bench:
        first, second = bench.measure(0.5), bench.measure(0.25)
        assert (bench.alive, bench.ready["compile_s"]) == (True, 2.0)
        process = bench.process
    assert (first, second) == ({"tokens_per_s": 100, "peak_gib": 0.5},
                               {"tokens_per_s": 200, "peak_gib": 0.25})
    assert process.poll() is not None


def test_a_command_that_knows_of_no_rounds_is_run_anew_for_each(peer):
    with Bench([*peer, "--once"]) as bench:
        for _ in range(2):
            assert bench.measure(1.0) == {"tokens_per_s": 50}
        assert not bench.alive


def test_a_command_that_fails_is_named_with_its_reason():
    line = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with Bench(line) as bench, pytest.raises(InputError, match="-c .* ended with 1: no such model"):
        bench.measure(1.0)


def test_the_order_is_turned_round_from_one_round_to_the_next(capsys):
    order = []

    def of(name, speed):
        def measure(seconds):
            order.append(name)
            return {"tokens_per_s": speed * len(order), "peak_gib": speed}

        return measure

    found = compared(in_turn(of("a", 2), of("b", 1), 3, 1.0))
    assert "".join(order) == "abbaab"
    ratios = [2 / 2, 2 * 4 / 3, 2 * 5 / 6]
    assert found["ratios"] == pytest.approx(ratios, abs=1e-3)
    assert (found["ratio"], found["rounds"]) == (pytest.approx(10 / 6, abs=1e-3), 3)
    assert (found["peak_gib"], found["against_peak_gib"]) == (2, 1)
    assert capsys.readouterr().out.count("ratio") == 3


def test_bench_against_says_load_memory_and_compile_time_of_both(peer, capsys, monkeypatch):
    """Of this bench, a process of its own, a tiny peer stands here too."""
    bench = train.load_file(train.ROOT / "tools/bench.py")
    monkeypatch.setattr(bench, "Bench", lambda line: Bench(peer))
    command = "python theirs.py"
    bench.main(["--against", command, "--compile", "--rounds", "2", "--seconds", "0.5"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["against"] == f"{command} --compile"
    assert (found["compile_s"], found["against_compile_s"], found["alive"]) == (2.0, 2.0, True)
    assert (found["peak_gib"], found["against_peak_gib"]) == (0.5, 0.5)
    assert len(found["load"]) == 2
    assert found["ratios"] == [1.0, 1.0]


def test_this_bench_stays_alive_and_its_rounds_go_on_from_one_another(monkeypatch, capsys):
    monkeypatch.setenv(live.LIVE, "1")
    monkeypatch.setattr(live.sys, "stdin", iter(["0\n", "0\n"]))
    words = "--layers 1 --embed 32 --mlp 32 --vocab 64 --batch 2 --seq 16".split()
    train.verb("bench", words)
    ready, *rounds = map(json.loads, capsys.readouterr().out.splitlines())
    assert "tokens_per_s" not in ready
    assert ready["compile_s"] > 0
    assert len(rounds) == 2
    for found in rounds:
        assert found.keys() >= {"tokens_per_s", "step_ms", "peak_gib", "loss"}
    assert rounds[1]["loss"] < rounds[0]["loss"]


def test_compile_is_for_the_other_benchmark():
    with pytest.raises(InputError, match="--compile .* allowed with --against"):
        train.verb("bench", ["--compile"])
