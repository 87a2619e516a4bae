"""A run under fire: moved with its data, its checkpoints, metadata and rows damaged."""
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import data
import model
import train
from lib import checkpoint, resume
from lib.checkpoint import Checkpoints, Damaged, checksums, find_checkpoint
from lib.disk import content_hash, read_object, write_checked
from lib.errors import InputError


def settings(root: Path, tiny, **more) -> train.Config:
    """The config of a run of six steps, below a directory that holds its text."""
    source = data.Source(partial(data.text, path=str(root / "text")))
    own = data.DataConfig(sources={"x": source, "x.test": source}, tokenizer="bytes", dev=0.1, test=0)
    phase = train.Phase(steps=6, batch=8, seq=32, mixture={"x": 1, "x.test": 1})
    return train.Config(name="run", runs=str(root / "runs"), model=tiny, data=own, phases=(phase,), overlap=8,
                        save_every=2, eval_every=3, keep=9, prompts=(), **more)


@pytest.fixture(scope="module")
def made(tiny, corpus, tmp_path_factory) -> Path:
    """A directory with a text and a complete run on it."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(corpus, root / "text")
    train.train(settings(root, tiny))
    return root


@pytest.fixture
def stopped(made, tmp_path) -> Path:
    """A copy of it, killed after step 4: in another place, with times as they were."""
    root = tmp_path / "moved"
    shutil.copytree(made, root)
    cut_back(root / "runs/run", 4)
    return root


def cut_back(run: Path, step: int):
    """Take away what a run wrote after a checkpoint."""
    (run / "summary.json").unlink()
    for place in run.glob("checkpoints/[0-9]*"):
        if int(place.name) > step:
            shutil.rmtree(place)


def rows(run: Path) -> list[dict]:
    """The rows of a run without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in found]


def sums(run: Path, step: int) -> dict:
    """The checksums of a checkpoint."""
    return Checkpoints(run / "checkpoints").meta(step)["checksums"]


def assert_same(run: Path, whole: Path):
    """Rows and last checkpoint are those of the run that was never stopped."""
    assert rows(run) == rows(whole) and sums(run, 6) == sums(whole, 6)


# ---------------------------------------------------------------------------------------------- moved


@pytest.mark.parametrize("cache", ["the old cache", "no cache"])
def test_a_run_moved_with_its_data_goes_on(made, stopped, tiny, monkeypatch, capsys, tmp_path, cache):
    """To another path, with other permissions, under another patch release of Python: byte for byte."""
    for path in [stopped / "text", *(stopped / "text").rglob("*")]:
        path.chmod(0o700)
    monkeypatch.setattr(sys, "version", "3.11.99 (another day)")
    if cache == "no cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    capsys.readouterr()
    train.train(settings(stopped, tiny))
    assert "resuming from step 4" in capsys.readouterr().out
    assert_same(stopped / "runs/run", made / "runs/run")


def test_a_run_goes_on_where_the_times_of_its_text_changed(made, stopped, tiny):
    for path in (stopped / "text").rglob("*.txt"):
        path.touch()
    train.train(settings(stopped, tiny))
    assert_same(stopped / "runs/run", made / "runs/run")


def test_other_text_in_the_new_place_is_refused(stopped, tiny):
    next((stopped / "text").rglob("*.txt")).write_text("something else")
    with pytest.raises(InputError, match="was trained on other text than the sources give now"):
        train.train(settings(stopped, tiny))


# ----------------------------------------------------------------------------------------- parameters


def put_back(run: Path, step: int, change):
    """Write a checkpoint again with its parameters changed, under the checksums that it had."""
    saved = Checkpoints(run / "checkpoints")
    meta = saved.meta(step)
    _, config, *_ = train.load(str(run), step)
    state = saved.state(step, train.state_like(config.model, config.optimizer, one_device()))
    state = state.replace(params=state.params | change(state.params))
    shutil.rmtree(run / "checkpoints" / str(step))
    again = Checkpoints(run / "checkpoints", keep=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "checksums", lambda state: meta["checksums"])
        again.save(step, state, meta)
        again.close()


def one_device():
    """A mesh of one device."""
    return train.make_mesh(train.MeshConfig(), jax.devices()[:1])


def swapped(params: dict) -> dict:
    """Two values of a matrix in each other's place."""
    q = np.array(params["q"])
    flat = q.reshape(-1)
    flat[[3, 70]] = flat[[70, 3]]
    return {"q": jnp.asarray(q)}


def huge(params: dict) -> dict:
    """A value of 1e37."""
    return {"embed": params["embed"].at[5, 5].set(1e37)}


@pytest.mark.parametrize("change", [swapped, huge])
def test_damaged_parameters_are_refused_wherever_they_are_loaded(stopped, tiny, change):
    run = stopped / "runs/run"
    put_back(run, 4, change)
    (name,) = change(train.load(str(run), 2)[0])
    said = f"checkpoints/4 is damaged .not as written: params/{name}"
    with pytest.raises(Damaged, match=said):
        train.load(str(run))
    if change is huge:
        return
    for how in ("params", "all"):
        start = settings(stopped, tiny, init_from=f"{run}@4", init_with=how)
        with pytest.raises(Damaged, match=said):
            train.train(replace(start, name=f"next-{how}"))


def test_the_checksum_knows_places_and_no_mesh(params):
    """Swapped, moved and changed elements change it; a layout over devices does not."""
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    known = int(checksums({"x": jnp.asarray(x)})["x"])
    moved = [x.T, x[::-1], np.roll(x, 1), np.where(x == 9, 9 + 2**-20, x)]
    found = {int(checksums({"x": jnp.asarray(y)})["x"]) for y in moved}
    assert len(found | {known}) == 5
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    for spec in (PartitionSpec("a"), PartitionSpec("b", "a"), PartitionSpec(None, ("a", "b"))):
        laid = jax.device_put(x, NamedSharding(mesh, spec))
        assert int(checksums({"x": laid})["x"]) == known
    for dtype in ("bool", "int32", "bfloat16", "float16", "uint8"):
        one, other = (checksums({"x": jnp.asarray(y, dtype)})["x"] for y in ([0, 1, 0], [1, 0, 0]))
        assert int(one) != int(other)


# ------------------------------------------------------------------------------------------- metadata


def metadata(run: Path, step: int) -> Path:
    """The file of a checkpoint's metadata."""
    return run / f"checkpoints/{step}/meta/metadata"


def test_damaged_metadata_give_way_to_the_checkpoint_before(made, stopped, tiny, capsys):
    """A place in the data that was changed is no longer silent, and blames no config."""
    run = stopped / "runs/run"
    file = metadata(run, 4)
    meta = json.loads(file.read_text())
    meta["start"] = [64, 0]
    file.write_text(json.dumps(meta))
    train.train(settings(stopped, tiny))
    out = capsys.readouterr().out
    assert "checkpoints/4 is damaged (its metadata are not as written)" in out
    assert "goes back to step 2" in out
    assert_same(run, made / "runs/run")


def test_no_damage_of_metadata_is_read(stopped):
    """A byte changed, cut off or taken out anywhere: noticed, or the same metadata."""
    run = stopped / "runs/run"
    file, rng = metadata(run, 4), np.random.default_rng(0)
    content, whole = file.read_bytes(), Checkpoints(run / "checkpoints").meta(4)
    noticed = 0
    for _ in range(60):
        at, byte = int(rng.integers(len(content))), bytes([rng.integers(256)])
        ways = content[:at] + byte + content[at + 1:], content[:at], content[:at] + content[at + 1:]
        file.write_bytes(ways[rng.integers(3)])
        try:
            assert Checkpoints(run / "checkpoints").meta(4) == whole
        except Damaged:
            noticed += 1
    assert noticed > 50


def test_a_damaged_checkpoint_is_no_obstacle_to_the_others(stopped, capsys):
    """An old one, or the newest: readers say so, and take the newest that is whole."""
    run = stopped / "runs/run"
    metadata(run, 2).write_text("{")
    assert find_checkpoint(str(run))[1] == 4
    assert "checkpoints/2 is damaged" in capsys.readouterr().err
    metadata(run, 4).write_text("[1]")
    with pytest.raises(Damaged):
        train.load(str(run))


def test_a_passing_error_retires_no_checkpoint(made, stopped, tiny, monkeypatch):
    """An error of the disk is waited out or said; what was read is as it was written."""
    run, times = stopped / "runs/run", [0]
    restore = Checkpoints.attempt

    def failing(checkpoints, step, wanted):
        times[0] += 1
        if times[0] < 3:
            raise Damaged("as Orbax says it") from OSError(5, "Input/output error")
        return restore(checkpoints, step, wanted)

    monkeypatch.setattr(Checkpoints, "attempt", failing)
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be read now .OSError: .Errno 5.*try again"):
            train.train(settings(stopped, tiny))
    assert not list(run.glob("checkpoints/*.damaged"))
    train.train(settings(stopped, tiny))
    assert_same(run, made / "runs/run")


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 7 GiB"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.")])
def test_memory_that_is_out_retires_no_checkpoint(stopped, tiny, monkeypatch, error):
    def full(checkpoints, step, args):
        raise ValueError("as Orbax says it") from error

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", full)
    with pytest.raises(InputError, match="cannot be read now .*nothing was changed.*smaller model"):
        train.train(settings(stopped, tiny))
    assert not list((stopped / "runs/run").glob("checkpoints/*.damaged"))


def test_a_checkpoint_of_an_older_version_is_read_with_a_note_and_not_resumed(stopped, tiny, capsys):
    run = stopped / "runs/run"
    file = metadata(run, 4)
    meta = json.loads(file.read_text())
    del meta["checksum"], meta["format"]
    file.write_text(json.dumps(meta | {"checksums": {}}))
    params, *_ = train.load(str(run))
    assert "embed" in params
    assert "older version of Coppice; it is read without comparing" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"--init_from {run}@4 --init_with all --name NEW"):
        train.train(settings(stopped, tiny))
    start = settings(stopped, tiny, init_from=f"{run}@4", init_with="all")
    assert train.train(replace(start, name="next"))["step"] == 6


def test_a_link_among_a_run_s_source_leads_nothing_out_of_it(stopped, tiny, tmp_path):
    """Of a directory that one was given: what a link leads to stays as it is."""
    source, mine = stopped / "runs/run/source", tmp_path / "mine"
    (tmp_path / "folder").mkdir()
    mine.write_text("mine")
    (source / "model.py").unlink()
    (source / "model.py").symlink_to(mine)
    shutil.rmtree(source / "lib")
    (source / "lib").symlink_to(tmp_path / "folder")
    train.train(settings(stopped, tiny))
    assert mine.read_text() == "mine" and not list((tmp_path / "folder").iterdir())
    assert (source / "model.py").read_text() == Path(model.__file__).read_text()
    assert (source / "lib/disk.py").is_file() and not (source / "lib").is_symlink()
    train.keep_source(source, str(source / "model.py"))  # a run may be resumed by its own copy
    (tmp_path / "folder/link").symlink_to(mine)
    shutil.rmtree(source)
    source.symlink_to(tmp_path / "folder")
    train.keep_source(source, "")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["link"] and source.is_dir()


def test_a_damaged_tokenizer_of_a_run_is_refused(stopped):
    (stopped / "runs/run/tokenizer.model").write_bytes(b"coppice bytes 2\n")
    with pytest.raises(InputError, match="tokenizer.model is damaged"):
        train.load(str(stopped / "runs/run"))


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"'])
def test_a_damaged_config_of_a_run_is_one_sentence(stopped, content):
    (stopped / "runs/run/config.json").write_text(content)
    with pytest.raises(InputError, match="config.json"):
        train.load(str(stopped / "runs/run"))


# ----------------------------------------------------------------------------------------------- rows


def test_bad_lines_of_metrics_stop_no_run(made, stopped, tiny, capsys):
    bad = [b"{\n", b"\xff\xfe\x00\n", b"[1]\n", b'{"step": "4"}\n', b"9" * 5_000 + b"\n"]
    run = stopped / "runs/run"
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:1], *bad, *lines[1:]]))
    train.train(settings(stopped, tiny))
    assert f"{file} is damaged in line 2, 3, 4, 5, 6;" in capsys.readouterr().out
    assert_same(run, made / "runs/run")


def test_half_a_summary_is_made_again(made, tmp_path, tiny, capsys):
    root = tmp_path / "moved"
    shutil.copytree(made, root)
    end = root / "runs/run/summary.json"
    whole = json.loads(end.read_text())
    for content in ("", '{"step": 6, ', "[]", "\x00" * 50):
        end.write_text(content)
        assert read_object(end) == {}
    train.train(settings(root, tiny))
    assert f"{end} is damaged; the run ends again" in capsys.readouterr().out
    assert json.loads(end.read_text()).keys() == whole.keys()
    assert_same(root / "runs/run", made / "runs/run")


def test_a_run_killed_while_it_concludes_has_its_last_row_once(made, tmp_path, tiny):
    """Without a test split, and with a source whose name looks like one: rows are marked."""
    root = tmp_path / "moved"
    shutil.copytree(made, root)
    run = root / "runs/run"
    (run / "summary.json").unlink()
    train.train(settings(root, tiny))
    assert_same(run, made / "runs/run")
    found = rows(run)
    assert [row["step"] for row in found if "final" in row] == [6]
    assert [row["step"] for row in found if "eval/x.test/bpb" in row] == [3, 6]


def test_content_that_is_not_its_hash_is_nothing(tmp_path):
    file = tmp_path / "a"
    write_checked(file, b"tree")
    assert file.read_bytes() == b"tree" + content_hash(b"tree")
    assert not [path for path in tmp_path.iterdir() if path != file]


# ----------------------------------------------------------------------------------------------- rounding


def test_what_changes_rounding_alone_may_change(made, stopped, tiny, capsys):
    """Parts of a batch, how layers are compiled, and devices: said in a sentence, and nothing else moves."""
    config = settings(stopped, replace(tiny, unroll=1, remat="all", logits_mib=1))
    (phase,) = config.phases
    phases = (replace(phase, accumulate=2),)
    train.train(replace(config, phases=phases, mesh=train.MeshConfig(fsdp=4, tensor=2)))
    out = capsys.readouterr().out
    assert "resuming from step 4" in out
    assert "at step 4: devices was 1 and is 8; model.logits_mib was 0 and is 1; model.remat" in out
    assert "phases.0.accumulate was 1 and is 2; from here on figures are the same but for rounding" in out
    ours, theirs = rows(stopped / "runs/run"), rows(made / "runs/run")
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_parts_of_a_batch_stay_where_they_are_more_than_sums(stopped, tiny):
    config = settings(stopped, tiny, gradient=plainly)
    assert resume.sums_alone(settings(stopped, tiny), config.phases[0])
    assert not resume.sums_alone(config, config.phases[0])
    (phase,) = config.phases
    other = replace(phase, accumulate=2, objective=data.causal, reduce=partial(model.weighted_mean))
    assert not resume.sums_alone(settings(stopped, tiny), other)


def plainly(gradient, params, batch, step):
    """A `gradient` that changes nothing, as far as is known."""
    return gradient(params, batch)
