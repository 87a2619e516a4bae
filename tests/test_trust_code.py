"""Code that a run's directory names: none of it runs unasked where the run was made elsewhere."""
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from conftest import environment
from test_trust_runs import made, metadata, settings, stopped  # noqa: F401 (fixtures)

import train
from lib import trust
from lib.config import ROOT, from_json, function_of, load_file, to_json
from lib.disk import with_checksum, without_checksum
from lib.errors import InputError
from lib.fields import describe
from model import ModelConfig

EVIL = '''
import pathlib
pathlib.Path(r"{flag}").write_text("it ran")

def f(*args, **given):
    """A function of any field."""

class T:
    """A tokenizer."""
'''


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    """Nothing is, until a test says so; see conftest.py."""
    monkeypatch.setattr(trust, "asked", [])


@pytest.fixture
def evil(tmp_path) -> tuple[Path, Path]:
    """(a file that leaves a flag when it is run, the flag)."""
    file, flag = tmp_path / "elsewhere/evil.py", tmp_path / "flag"
    file.parent.mkdir()
    file.write_text(EVIL.format(flag=flag))
    return file, flag


def named(file: Path | str, name: str = "f") -> dict:
    """A function of a file as JSON."""
    return {"function": f"{file}:{name}", "arguments": {}, "source": "0"}


def with_field(written: dict, path: str, value) -> dict:
    """A JSON object with the part at a path replaced."""
    copy = json.loads(json.dumps(written))
    *above, last = path.split(".")
    place = copy
    for name in above:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return copy


PLACES = ["optimizer", "reparam", "evals", "model.forward", "model.layers", "name",
          "phases.0.packing", "phases.0.steps", "data.tokenizer", "data.sources.x.documents",
          "data.sources.x.split", "schedule.shape"]


@pytest.mark.parametrize("place", PLACES)
def test_a_config_runs_no_code_from_elsewhere(stopped, evil, place, capsys):  # noqa: F811
    """Whatever field names it, and whichever command reads it."""
    run, (file, flag) = stopped / "runs/run", evil
    written = json.loads((run / "config.json").read_text())
    value = [named(file)] if place == "evals" else named(file)
    (run / "config.json").write_text(json.dumps(with_field(written, place, value)))
    commands = [["sample", run], ["eval", run], ["export", run, stopped / "out"], [run / "config.json"],
                ["corpus", "inspect", run / "config.json"]]
    for command in commands:
        assert train.main([str(word) for word in command]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and ("--trust" in said or "where" in said), said
    assert not flag.exists()


@pytest.mark.parametrize("field", ["forward", "layers"])
def test_metadata_run_no_code_from_elsewhere(stopped, evil, field, tiny):  # noqa: F811
    """Their checksum is no signature: whoever wrote them may have written it too."""
    run, (file, flag) = stopped / "runs/run", evil
    for step in (2, 4):
        meta = without_checksum(json.loads(metadata(run, step).read_text()))
        meta["model"][field] = named(file)
        metadata(run, step).write_text(json.dumps(with_checksum(meta)))
    with pytest.raises(InputError, match="--trust|where an integer"):
        train.load(str(run))
    with pytest.raises(InputError, match="--trust|where an integer"):
        train.train(train.replace(settings(stopped, tiny, init_from=str(run)), name="next"))
    assert not flag.exists()


def test_a_tokenizer_runs_no_code_from_elsewhere(stopped, evil):  # noqa: F811
    run, (file, flag) = stopped / "runs/run", evil
    model = json.dumps({"class": f"{file}:T", "source": "", "model": ""}, separators=(",", ":"))
    (run / "tokenizer.model").write_text(model)
    for step in (2, 4):
        meta = without_checksum(json.loads(metadata(run, step).read_text()))
        del meta["tokenizer"]
        metadata(run, step).write_text(json.dumps(with_checksum(meta)))
    with pytest.raises(InputError, match="--trust"):
        train.load(str(run))
    assert not flag.exists()


@pytest.mark.parametrize("way", ["up", "inside", "link"])
def test_no_way_around(stopped, evil, way):  # noqa: F811
    """A path that climbs out of the repository's, the run's own source/ unsigned, a link there."""
    file, flag = evil
    source = stopped / "runs/run/source"
    shutil.copy(file, source / "evil.py")
    (source / "linked.py").symlink_to(file)
    climbed = Path("configs") / Path(*[".."] * len(ROOT.parts)) / file.relative_to("/")
    name = {"up": climbed, "inside": source / "evil.py", "link": source / "linked.py"}[way]
    with pytest.raises(InputError, match="--trust"):
        from_json(Callable, named(name))
    assert not flag.exists()


@pytest.mark.parametrize("gadget", [
    "lib/config.py:load_file", "lib/config.py:load_module", "lib/disk.py:write", "train.py:main",
    "tools/launch.py:main", "lib/sources.py:ast", "lib/sources.py:Path", "lib/readers.py:text",
    "data.py:partial", "lib/sources.py:__builtins__"])
def test_what_runs_files_or_writes_them_is_no_function_of_a_config(gadget):
    """Nor is what a file imports: a function is named by the file that defines it."""
    with pytest.raises(InputError, match="--trust|does not define"):
        function_of({"function": gadget, "arguments": {"path": "/tmp/x"}})


def test_a_function_stands_where_a_function_may():
    hints = {field.name for field in fields(ModelConfig) if "Callable" in describe_of(field)}
    assert hints == {"rows", "forward", "outputs", "flops"}
    for field in fields(ModelConfig):
        written = {field.name: to_json(train.causal)}
        if field.name in hints:
            assert getattr(from_json(ModelConfig, written), field.name) is train.causal
        else:
            with pytest.raises(InputError, match="function .*causal.* where .* is allowed"):
                from_json(ModelConfig, written)


def describe_of(field) -> str:
    """A field's type in words."""
    return f"{field.type} {describe(field.type)}"


# --------------------------------------------------------------------------------------- of one's own

IDEA = '''
from dataclasses import replace
from functools import partial
import data
from lib.packing import concat_and_split
from train import *


def idea(lengths, seq: int, number: int = {number}):
    """A packing."""
    return concat_and_split(lengths, seq)

'''


def idea(place: Path, number: int = 1) -> Path:
    """A file with a function, that no process has run."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(IDEA.format(number=number))
    return place


def source_of(file: Path, tmp_path: Path) -> str:
    """The hash of the function's source, without running the file in its place."""
    twin = tmp_path / f"twin-{len(list(tmp_path.iterdir()))}.py"
    shutil.copy(file, twin)
    return to_json(load_file(twin).idea)["source"]


def recorded(run: Path, file: Path):
    """A run's record of a file."""
    (run / "source").mkdir(parents=True)
    trust.record(run / "source", {str(file)})


def test_one_s_own_run_runs_the_code_that_it_recorded(home, tmp_path):
    """As it was, where the file has changed or is gone."""
    for harm in ("none", "changed", "gone"):
        run, file = tmp_path / harm / "run", idea(tmp_path / harm / "idea.py")
        recorded(run, file)
        written = named(file, "idea") | {"source": source_of(file, tmp_path)}
        if harm == "changed":
            idea(file, 2)
        elif harm == "gone":
            file.unlink()
        with pytest.raises(InputError, match="idea.py.*, which is not code of this repository"):
            function_of(written)
        trust.read_record(run)
        found = function_of(written)
        assert to_json(found)["arguments"] == {"number": 1}
        assert Path(found.__code__.co_filename) == (file if harm == "none" else run / "source/idea.py")


def test_a_run_that_was_made_elsewhere_asks_for_trust(home, tmp_path, monkeypatch):
    run, file = tmp_path / "run", idea(tmp_path / "idea.py")
    recorded(run, file)
    written = named(file, "idea") | {"source": source_of(file, tmp_path)}
    file.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user's"))
    trust.read_record(run)
    with pytest.raises(InputError, match="a file that is gone, .* add --trust"):
        function_of(written)
    copy = run / "source/idea.py"
    content = copy.read_text()
    copy.write_text(content + "x = 1")  # a copy that is not as recorded runs for nobody
    with trust.trust(True):
        trust.read_record(run)
        with pytest.raises(InputError, match="a file that is gone"):
            function_of(written)
        copy.write_text(content)
        trust.read_record(run)
        assert function_of(written).__code__.co_filename == str(copy)


@pytest.mark.parametrize("harm", ["signed by nobody", "another file", "another copy", "torn", "odd"])
def test_a_record_that_was_changed_is_no_record(home, tmp_path, harm):
    run, file = tmp_path / "run", idea(tmp_path / "idea.py")
    recorded(run, file)
    place = run / "source/code.json"
    known = json.loads(place.read_text())
    if harm == "signed by nobody":
        del known["signature"]
    elif harm == "another file":
        known["files"][str(tmp_path / "evil.py")] = known["files"][str(file)]
    elif harm == "another copy":
        known["files"][str(file)]["hash"] = "0"
    text = {"torn": place.read_text()[:40], "odd": '{"files": {"a": 1}}'}.get(harm, json.dumps(known))
    place.write_text(text)
    trust.read_record(run)
    with pytest.raises(InputError, match="--trust"):
        function_of(named(file, "idea"))


def test_the_secret_is_the_user_s_alone(home, tmp_path):
    first = trust.secret()
    assert len(first) == 32 and trust.secret() == first
    assert (home / "secret").stat().st_mode & 0o777 == 0o600
    (home / "secret").write_bytes(b"")  # as after a power cut
    assert len(trust.secret()) == 32 and trust.secret() != first


def test_files_of_one_name_are_kept_apart(home, tmp_path):
    """Also from the house's own."""
    files = [idea(tmp_path / name, i) for i, name in enumerate(("a/idea.py", "b/idea.py", "c/model.py"))]
    (tmp_path / "run/source").mkdir(parents=True)
    trust.record(tmp_path / "run/source", {str(file) for file in files})
    known = json.loads((tmp_path / "run/source/code.json").read_text())["files"]
    copies = [known[str(file)]["copy"] for file in files]
    assert len(set(copies)) == 3 and copies[0] == "idea.py" and copies[2] != "model.py"
    for file, copy in zip(files, copies, strict=True):
        assert (tmp_path / "run/source" / copy).read_text() == file.read_text()


def test_files_of_functions_in_functions_settings_are_recorded():
    """As those of a teacher, which are settings of the student's `forward`."""
    inner = partial(train.causal)
    written = [{"a": named("x.py") | {"arguments": {"own": named("y.py"), "more": [named("z.py")]}}}, 3]
    assert trust.named_files(written) == {"x.py", "y.py", "z.py"}
    assert trust.named_files(to_json(inner)) == {"lib/objectives.py"}


OWN = IDEA + '''
phase = Phase(steps=2, batch=8, seq=32, packing=idea)
config = Config(
    model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16),
    phases=(phase,), overlap=8,
    data=data.DataConfig(sources={{"x": data.Source(partial(data.text, path={text!r}))}}, tokenizer="bytes",
                         dev=0, test=0), prompts=())
'''


def test_own_code_runs_in_another_process_and_another_s_asks(corpus, tmp_path):
    """A run with a packing of its own is read after its file is gone, by its user alone."""
    file = tmp_path / "mine.py"
    file.write_text(OWN.format(number=1, text=str(corpus)))

    def ran(cache: str, *words: str):
        where = environment(XDG_CACHE_HOME=str(tmp_path / cache))
        command = [sys.executable, ROOT / "train.py", *words]
        done = subprocess.run(command, env=where, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, said = ran("mine", str(file))
    assert code == 0, said
    file.unlink()
    sample = "sample", "runs/mine", "--prompt", "tree", "--tokens", "2"
    assert ran("mine", *sample)[0] == 0
    code, said = ran("theirs", *sample)
    assert code == 2 and said.count("\n") == 1 and "--trust" in said and str(file) in said
    assert ran("theirs", *sample, "--trust")[0] == 0


def test_every_function_of_the_library_may_run():
    """What configs/ uses of lib/ is offered, so that a run by it is read anywhere."""
    for path in sorted((ROOT / "configs").rglob("*.py")):
        study = getattr(load_file(path), "study", None)
        for config in {**study.arms, **study.needs}.values() if study else ():
            for name in trust.named_files(to_json(config)):
                assert trust.is_offered((ROOT / name).resolve()), f"{path} uses {name}"
