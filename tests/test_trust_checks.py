"""What is refused in time: names that lead elsewhere, states that fit nowhere, disks that give nothing."""
import functools
import gzip
import math
import re

import jax
import pytest

import data
import model
import train
from lib import memory, output, sources
from lib.config import ROOT, load_file
from lib.errors import InputError
from lib.log import Log
from lib.schedule import make_plan
from lib.sources import Skipped

report = load_file(ROOT / "tools/report.py")


@pytest.mark.parametrize("name", ["../escape", "a/../../b", "/tmp/x", "a\0b", "a\nb", "half \ud83c"])
def test_the_name_of_a_run_leads_nowhere_else(name):
    said = "^name is .*; allowed (is a directory below runs|are .* whole characters)"
    with pytest.raises(InputError, match=said):
        train.check(train.Config(name=name))


@pytest.mark.parametrize("name", ["a/b", "../a", "", "a\0", "x" * 101, "half \ud83c"])
def test_the_name_of_a_source_is_no_path(name):
    source = data.Source(data.stdlib)
    with pytest.raises(InputError, match="^data.sources has the name .*without a slash"):
        train.check(train.Config(name="a", data=data.DataConfig(sources={name: source})))
    with pytest.raises(InputError, match="^data.held_out has the name .*without a slash"):
        train.check(train.Config(name="a", data=data.DataConfig(held_out={name: source})))


def test_what_is_advised_where_memory_is_out_is_allowed():
    """A config takes the value that the sentence names."""
    (value,) = re.findall(r"--model.remat (\w+)", memory.LESS)
    train.check(train.Config(name="a", model=model.ModelConfig(remat=value)))


@pytest.mark.parametrize("name", ["a", "a/b", "an idea.2", "été"])
def test_plain_names_are_allowed(name):
    train.check(train.Config(name=name))


# --------------------------------------------------------------------------------------------- memory


def test_a_state_that_fits_no_device_is_refused_before_anything_is_compiled(tiny, monkeypatch):
    config = train.Config(model=tiny)
    plan, mesh = make_plan(config, None), train.make_mesh(train.MeshConfig(), jax.devices()[:1])
    state = train.state_like(tiny, config.optimizer, mesh)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    monkeypatch.setattr(memory, "memory_of", lambda device: size)
    memory.check_state(config, plan, mesh)
    monkeypatch.setattr(memory, "memory_of", lambda device: size - 1)
    with pytest.raises(InputError, match="phases.0: parameters and optimiser state take .* GiB a device"):
        memory.check_state(config, plan, mesh)
    four = train.make_mesh(train.MeshConfig(fsdp=4), jax.devices()[:4])
    monkeypatch.setattr(memory, "cpus_of", lambda mesh: 1)
    memory.check_state(config, plan, four)  # spread over four it does
    monkeypatch.setattr(memory, "memory_of", lambda device: 0)  # not known
    memory.check_state(config, plan, mesh)
    assert memory.cpus_of(four) == 1


def test_a_batch_or_a_step_that_fits_no_memory_is_refused(tiny, monkeypatch):
    """A batch before it is made, a step before it runs: the system would end the process in silence."""
    large = train.Config(phases=(train.Phase(), train.Phase(batch=2**20, seq=2**17)))
    with pytest.raises(InputError, match="phases.1: a batch takes 3,072.0 GiB of this machine, which has "):
        memory.check_batch_memory(large)
    memory.check_batch_memory(train.Config())
    mesh = train.make_mesh(train.MeshConfig(), jax.devices()[:1])
    step = jax.jit(lambda x: x @ x).lower(jax.numpy.ones((256, 256))).compile()
    size = memory.step_memory(step)
    assert 2 * 4 * 256**2 <= size < 4 * 4 * 256**2
    monkeypatch.setattr(memory, "memory_of", lambda device: size)
    memory.check_step(step, 3, mesh)
    monkeypatch.setattr(memory, "memory_of", lambda device: size - 1)
    with pytest.raises(InputError, match="phases.3: a step takes 0.0 GiB a device.*phases.N.accumulate"):
        memory.check_step(step, 3, mesh)


def test_a_run_compares_its_step_with_what_there_is(tiny, monkeypatch, corpus, tmp_path):
    monkeypatch.setattr(memory, "step_memory", lambda step: 2**60)
    source = data.Source(functools.partial(data.text, path=str(corpus)))
    config = train.Config(name="a", runs=str(tmp_path), model=tiny, overlap=8, prompts=(),
                          phases=(train.Phase(steps=2, batch=8, seq=32),),
                          data=data.DataConfig(sources={"x": source}, tokenizer="bytes", dev=0, test=0))
    with pytest.raises(InputError, match="phases.0: a step takes 1,073,741,824.0 GiB a device"):
        train.train(config)


def test_cpus_share_what_there_is():
    mesh = train.make_mesh(train.MeshConfig(fsdp=4), jax.devices()[:4])
    assert memory.cpus_of(mesh) == 4 and memory.memory_of(jax.devices()[0]) > 2**28


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 7 TiB"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.")])
def test_out_of_memory_is_one_sentence(error, capsys):
    def work():
        raise error

    assert output.answered(work) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and said.count("\n") == 1 and "--mesh.fsdp" in said


def test_another_error_of_a_device_is_not_taken_for_it():
    def work():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        output.answered(work)


def test_a_run_of_too_many_steps_is_refused_before_its_rates_are_worked_out():
    phases = (train.Phase(steps=10**12),)
    with pytest.raises(InputError, match="phases take 1,000,000,000,000 steps together; allowed are at most"):
        train.check(train.Config(name="a", phases=phases))


# ---------------------------------------------------------------------------------------------- disks


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """(a file of ten lines, a function that sets at which of its openings the disk fails, after 4 lines)."""
    file = tmp_path / "a.txt"
    file.write_text("".join(f"line {i}\n" for i in range(10)))
    cut, opened = sources.cut, []

    def set_failures(*times: int, error: Exception | None = None):
        def broken(raw, separator, longest):
            opened.append(raw)
            for number, piece in enumerate(cut(raw, separator, longest)):
                if number == 4 and len(opened) in times:
                    raise error or OSError(5, "Input/output error")
                yield piece

        monkeypatch.setattr(sources, "cut", broken)

    monkeypatch.setattr(sources, "PAUSE", 0)
    return file, set_failures


def test_a_passing_error_of_the_disk_loses_no_document(failing):
    file, fails = failing
    whole = list(data.text(str(file), "\n"))
    fails(1, 2)
    assert list(data.text(str(file), "\n")) == whole and len(whole) == 10


def test_a_disk_that_gives_nothing_is_refused_and_not_counted(failing):
    """What is sealed as unreadable would be lost for ever."""
    file, fails = failing
    fails(1, 2, 3)
    with pytest.raises(InputError, match="a.txt' cannot be read .Input/output error.; mend that"):
        list(data.text(str(file), "\n"))


class Unreachable(Exception):
    """What an HTTP client raises that is no OSError."""


@pytest.mark.parametrize("error", [Unreachable("read timed out"), ConnectionResetError("reset by peer")])
def test_a_network_that_fails_loses_no_document(failing, error):
    """Its errors have no number, and were taken for damage, which is sealed for ever."""
    file, fails = failing
    fails(1, 2, error=error)
    assert [one.text for one in data.text(str(file), "\n")] == [f"line {i}\n" for i in range(10)]
    fails(*range(1, 9), error=error)
    with pytest.raises(InputError, match=f"a.txt' cannot be read .{type(error).__name__}: {error}.; mend"):
        list(data.text(str(file), "\n"))


def test_a_damaged_archive_is_counted_as_before(tmp_path):
    content = gzip.compress(b"tree\n" * 1_000)
    for name, damaged in (("a.gz", content[:-20]), ("b.gz", b"xx" + content[2:])):
        (tmp_path / name).write_bytes(damaged)
    found = [one for one in data.text(str(tmp_path), "\n") if isinstance(one, Skipped)]
    assert [(one.path, one.kind) for one in found] == [("a.gz", "truncated archive"), ("b.gz", "unreadable")]


# --------------------------------------------------------------------------------------------- reports


def test_a_loss_near_zero_is_no_spike(tmp_path, tiny, capsys):
    plan = make_plan(train.Config(model=tiny), None)
    log = Log(tmp_path / "metrics.jsonl", 0, plan, 3)
    for i in range(60):
        log.report_spike(i, 1e-6 + 1e-9 * i)
    log.report_spike(60, 1e-3)
    assert capsys.readouterr().out == ""
    log.report_spike(61, 1.0)
    assert "step 61: loss 1.000" in capsys.readouterr().out


def hostile(value, text: str):
    """A JSON value with a text in the place of each of its texts, and after each of its keys."""
    if isinstance(value, dict):
        return {key: hostile(part, text) for key, part in value.items()}
    if isinstance(value, list):
        return [hostile(part, text) for part in value]
    return text if isinstance(value, str) else value


def test_nothing_of_a_study_is_html(tmp_path):
    """Its verdicts and bounds neither, which were not escaped once."""
    evil = '<script>alert("x")</script>'
    claim = dict(says="a", verdict="confirmed", arm="b", control="a", measure="bpb", mean=0.1, half=0.1)
    found = report.claim_of(hostile(claim, evil) | {"below": evil}, False)
    assert "<script" not in found and found.count("&lt;script&gt;") >= 4


def test_an_export_takes_away_nobody_s_files(tmp_path):
    """A directory DIR.partial is somebody's; what an export that fails began is taken away."""
    export = load_file(ROOT / "tools/export.py")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine").write_text("mine")
    with pytest.raises(OSError, match="No space"), export.made_whole(tmp_path / "out") as partly:
        (partly / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))]
    assert left == ["out.partial", "out.partial/mine"]

    with export.made_whole(tmp_path / "out") as partly:
        (partly / "config.json").write_text("{}")
    assert (tmp_path / "out/config.json").read_text() == "{}"
