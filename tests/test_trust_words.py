"""The traps of the command line: paths, names, odd JSON and files that are none, each one sentence."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import train
from lib import hf, tasks
from lib.checkpoint import Checkpoints, find_checkpoint
from lib.config import ROOT, load_file
from lib.disk import user_path
from lib.errors import InputError
from lib.keys import run_step
from lib.tokenizers import make_tokenizer
from train import Config

sample, report = (load_file(ROOT / f"tools/{verb}.py") for verb in ("sample", "report"))


def refused(arguments: list[str], capsys) -> str:
    """The one sentence that a command is refused by."""
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


# --------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("text, said", [
    ("~nosuchuser/x", "in no home directory that is known here; allowed is a path, ./~nosuchuser/x"),
    ("a\0b", "is no path; allowed is one without NUL"), ("a\ud800", "is no path; allowed is")])
def test_a_path_that_is_none_is_one_sentence(text, said, capsys):
    with pytest.raises(InputError, match=said):
        user_path(text)
    for command in (["sample", text], ["eval", text], ["report", text], ["curves", text],
                    ["export", text, "out"], ["configs/quickstart.py", "--runs", text],
                    ["configs/quickstart.py", "--init_from", text], ["eval", "x", "--blimp", text],
                    ["configs/quickstart.py", "--init_from", f"hf:{text}"]):
        answer = refused(command, capsys)  # a field may not be half characters, path or not
        assert said in answer or "texts of whole characters" in answer
    assert user_path("~") == Path.home() and user_path("./~x") == Path("./~x")


def test_what_is_written_goes_where_a_path_leads(tmp_path, capsys, monkeypatch):
    """~ is a home directory in what a verb writes and in the files that it reads, too."""
    said = "in no home directory that is known here"
    for command in (["export", "run", "~nosuchuser/x"], ["sample", "run", "--prompts", "~nosuchuser/x"]):
        assert said in refused(command, capsys)
    assert "is no path" in refused(["sample", "run", "--prompts", "a\0b"], capsys)
    monkeypatch.setenv("HOME", str(tmp_path))
    export = load_file(ROOT / "tools/export.py")
    given = export.parse_arguments(["~/run", "~/out"])
    assert (given.run, given.directory) == (tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5_000, "{"])
def test_an_odd_line_of_prompts_is_one_sentence(line, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text(line)
    assert "--prompts has the line" in refused(["sample", "x", "--prompts", str(file)], capsys)


def test_a_prompt_that_is_no_text_is_refused_before_a_model_is_read(capsys):
    for flag in "--prompt", "--stop":
        assert f"{flag} is " in refused(["sample", "nowhere", flag, "a\udc80"], capsys)


@pytest.mark.parametrize("flag, value", [
    ("--n", "1000000000"), ("--seed", str(2**70)), ("--seed", "-1"), ("--tokens", str(10**12)),
    ("--temperature", "inf"), ("--temperature", "nan"), ("--top-p", "nan")])
def test_numbers_that_are_too_large_are_refused(flag, value, capsys):
    assert refused(["sample", "nowhere", flag, value], capsys).startswith(f"error: sample: {flag} is ")


def test_what_looks_like_a_number_of_steps_is_none(tmp_path):
    """Digits that are no digits of ASCII, among checkpoints."""
    for name in ("²", "٣", "1.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert Checkpoints(tmp_path / "checkpoints").steps() == []
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no checkpoint"):
        find_checkpoint(str(tmp_path))
    assert run_step("a@²") == ("a@²", None)


@pytest.mark.parametrize("content", ["", "[1]", "null", '"x"', "{", "\ud800", "[" * 100_000])
def test_a_config_that_is_no_object_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "config.json" in refused([str(tmp_path / "config.json")], capsys)
    assert "config.json" in refused([str(tmp_path)], capsys)
    (tmp_path / "checkpoints").mkdir()
    refused(["sample", str(tmp_path)], capsys)
    refused(["eval", str(tmp_path)], capsys)


def test_a_page_needs_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "collect", lambda paths: ([], []))
    for out in "", str(tmp_path):
        assert f"--out is {out!r}; allowed is a file" in refused(["report", "x", "--out", out], capsys)


@pytest.mark.parametrize("line", ["raise SystemExit", "raise SystemExit(3)", "exit()", "1 / 0", "config = 3"])
def test_a_config_that_ends_the_program_does_not(line, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"x = 1\n{line}\n")
    assert "config file " in refused([str(tmp_path / "mine.py")], capsys)


def test_no_damage_at_all_may_be_asked_for():
    train.check(Config(name="a", data=data.DataConfig(max_skipped=0)))


# --------------------------------------------------------------------------------------------- tasks


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_pipe_among_tasks_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="a.jsonl is no regular file"):
        tasks.json_lines(tmp_path)
    with pytest.raises(InputError, match="a.jsonl' is not a file of JSON Lines"):
        tasks.json_lines(tmp_path / "a.jsonl")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_pipe_in_a_hugging_face_directory_is_not_waited_for(file, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"a": 1}')
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(InputError, match=f"{file} is no regular file"):
        make_tokenizer(data.DataConfig(tokenizer=f"hf:{tmp_path}"), 0)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "[" * 100_000])
def test_what_a_study_keeps_beside_its_runs_is_one_sentence_where_it_is_damaged(content, tmp_path):
    study = load_file(ROOT / "tools/study.py")
    assert study.add_spent(tmp_path, np.array([2.0, 3.0])) == [2.0, 3.0]
    assert study.add_spent(tmp_path, np.array([1.0, 0.5])) == [3.0, 3.5]
    (tmp_path / "spent.json").write_text(content)
    with pytest.raises(InputError, match="spent.json is damaged .*; delete it, and the same command"):
        study.add_spent(tmp_path, 1.0)


def test_a_study_counts_what_its_processes_computed():
    clock = load_file(ROOT / "tools/study.py").clock
    begun = clock()
    work = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    passed, processors = clock() - begun
    assert passed > 0.2
    assert processors > 0.2  # it is counted in hundredths, each of its parts rounded down


# ------------------------------------------------------------------------------ Hugging Face directories

LLAMA = dict(model_type="llama", num_attention_heads=2, hidden_size=16, num_hidden_layers=1,
             intermediate_size=16, vocab_size=20, eos_token_id=1)
ODD = [None, [], {}, "x", -1, 0, 1.5, True, 10**30, [None], {"a": 1}]


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize(
    "field", [*LLAMA, "rope_scaling", "head_dim", "rms_norm_eps", "rope_theta", "hidden_act"])
def test_odd_fields_of_a_model_are_one_sentence(field, value, tmp_path):
    """Or a model that the check of configs looks at."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {field: value}))
    try:
        train.check(Config(name="a", model=hf.read_shape(f"hf:{tmp_path}")))
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "content", ["", "[]", "3", '"x"', "null", "{", "[" * 100_000, '{"model_type": []}'])
def test_odd_json_is_one_sentence(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError):
        hf.read_shape(f"hf:{tmp_path}")
    with pytest.raises(InputError):
        make_tokenizer(data.DataConfig(tokenizer=f"hf:{tmp_path}"), 0)


@pytest.mark.parametrize("change", [
    {"eos_token_id": []}, {"eos_token_id": "x"}, {"eos_token_id": -1}, {"vocab_size": None},
    {"vocab_size": "9"}])
def test_an_odd_tokenizer_is_one_sentence(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    for content in ({"added_tokens": 3}, {"added_tokens": [{}]}, {"model": []}, {"a": 1}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(InputError):
            make_tokenizer(data.DataConfig(tokenizer=f"hf:{tmp_path}"), 0)
    shutil.rmtree(tmp_path)
