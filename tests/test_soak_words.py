"""Mutated commands and configs, drawn from a seed: no traceback, no hang, no known nonsense taken."""

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import soak

import train
from lib import fields
from lib.config import ROOT, load_file, to_json, walk
from lib.fields import fits, options

MOST = 10.0  # seconds that a command may take
FILES = [
    "configs/quickstart.py",
    "configs/growth/g_stack.py:stack_g2",
    "configs/context/meco.py",
    "configs/forgetting/active_forgetting.py",
    "configs/baselines/llama_124m.py",
    "configs/bench.py",
]
# Values that no field takes.
NEVER = [
    "{[1]}",
    "[1",
    "a\udc80",
    "\ud800",
    "1e999",
    "nan",
    "-inf",
    str(2**64),
    str(-(2**80)),
    "9" * 5_000,
    "[[[[1]]]]",
    "{'a': {}}",
    "(1,)(2)",
    "lambda: 0",
    "__import__('os')",
    "1" + "0" * 400,
]
LARGE = [str(2**64), str(-(2**80))]  # which are floats
ODD = [
    "",
    "0",
    "-1",
    "1",
    "2.5",
    "true",
    "None",
    "x",
    "[]",
    "()",
    "{}",
    "(1, 2)",
    "'x'",
    "1e-400",
    "0x10",
    "1_000",
    "~",
    "~nosuchuser",
    "../x",
    "a\0b",
    "\x1b[2J",
    "²",
    "٣",
    "NaN",
    "--",
    "=",
    "-",
    "é" * 300,
    "10**9",
    "1000000000",
]
NAMES = [
    "",
    "²",
    "lr",
    "steps",
    "model",
    "phases.9.steps",
    "phases.-1.steps",
    "phases.x",
    "data.sources",
    "a" * 500,
    "optimizer.table",
    "__class__",
    "model.layers.x",
    "phases.0",
    "\ud800",
    "name.x",
    "phases.0.edits.0",
    "--x",
]
VERBS = {
    "sample": [
        "RUN",
        "--prompt",
        "--prompts",
        "--n",
        "--tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--stop",
        "--seed",
        "--step",
        "--mesh.data",
    ],
    "eval": ["RUN", "--blimp", "--tasks", "--core", "--most", "--data", "--step", "--delimiter"],
    "export": ["RUN", "OUT", "--step", "--dtype"],
    "report": ["RUN", "--out"],
    "curves": ["RUN"],
    "study": ["configs/growth/g_stack.py", "--seeds", "--arms", "--jobs", "--runs"],
    "fit": ["configs/quickstart.py", "--topology", "--devices"],
    "launch": ["auto", "localhost:1", "--processes", "--process", "--patience"],
    "nosuchverb": ["x"],
}
LINES = [
    "raise SystemExit",
    "raise OSError(5)",
    "1 / 0",
    "import nosuch",
    "config = 3",
    "config = Config(name=3)",
    "config = Config(nosuch=1)",
    "config = Config(phases=())",
    "def (",
    "\t  x",
    "\x00",
    "config = Config(clip=float('nan'))",
    "config = Config(seed=10**5000)",
    "config = Config(optimizer=print)",
    "config = Config(evals=(len,))",
    "config = Config(token_loss=lambda a, b, c: a)",
    "config = Config",
    "config = Config(phases=Phase())",
    "config = Config(phases=[Phase()])",
    "config = Config(model=None)",
    "def config(n: int):\n    return Config()",
    "def config():\n    return 3",
    "study = 3",
    "x = '" + "a" * 10_000,
]


class Stopped(BaseException):
    """A command that took too long, or came to where it would begin to work."""


@pytest.fixture
def only_words(monkeypatch):
    """Commands end where they would begin to work: what is tried is what is said of words."""

    def reached(*_, **__):
        raise Stopped("reached")

    monkeypatch.setattr(train, "train", lambda config, file: train.check(config) or {})
    for verb, names in {
        "sample": ["load"],
        "eval": ["load"],
        "export": ["load"],
        "study": ["run_study", "Runner"],
        "launch": ["connect"],
        "fit": ["with_vocabulary", "here", "compiler"],
    }.items():
        module = load_file(ROOT / f"tools/{verb}.py")
        for name in names:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, reached)


def ended(command: list[str], capsys) -> str:
    """What came of a command: "refused", "taken" or "reached"; anything else fails."""

    def late(*_):
        raise Stopped("late")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, MOST)
    try:
        code = train.main(command)
    except Stopped as stopped:
        assert str(stopped) == "reached", f"{command} takes more than {MOST} s"
        return "reached"
    except SystemExit as error:
        assert not error.code, command
        return "taken"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        said = capsys.readouterr().err
    assert code in (0, 2), (command, code)
    if code == 2:
        assert said.count("error: ") >= 1 and "Traceback" not in said, (command, said)
        assert said.splitlines()[-1].startswith("error: "), (command, said)
        assert not set(said) & set("\x1b\x07\udc80\ud800"), (command, said)
    return "refused" if code else "taken"


def of_a_field(dice: random.Random) -> tuple[list[str], bool]:
    """(a command that sets a drawn field to a drawn value, whether that is known nonsense)."""
    file = dice.choice(FILES)
    path, _, hint = dice.choice(leaves(file))
    value = dice.choice(NEVER if dice.random() < 0.5 else ODD)
    file = str(ROOT / file)
    texts = any(of in (str, fields.Any) for of in options(hint)) or fits("x", hint)
    broken = value in ("a\udc80", "\ud800")
    large = value in LARGE and float in options(hint)
    holds = any(fits((), of) or fits({}, of) for of in options(hint))
    never = value in NEVER and (broken or not texts) and not large and not holds
    return [file, f"--{path}", value] if dice.random() < 0.7 else [file, f"--{path}={value}"], never


def leaves(file: str) -> list:
    """The fields of a config that flags set."""
    found = train.load_config(str(ROOT / file))
    return [
        (path, part, hint) for path, part, hint in walk(found) if not callable(part) and "~" not in path
    ]


def of_a_name(dice: random.Random) -> tuple[list[str], bool]:
    """(a command with a flag that is none, True)."""
    file = dice.choice(FILES)
    path = dice.choice(NAMES)
    if dice.random() < 0.5:
        letters = list(dice.choice(leaves(file))[0])
        letters[dice.randrange(len(letters))] = dice.choice("xq_²")
        path = "".join(letters)
    return [str(ROOT / file), f"--{path}", "1"], False


def of_a_verb(dice: random.Random, root: Path) -> tuple[list[str], bool]:
    """(a command of a verb with drawn words, False)."""
    verb = dice.choice(sorted(VERBS))
    places = {"RUN": str(root / dice.choice(["nowhere", "empty", "broken"])), "OUT": str(root / "out")}
    words = [places.get(word, word) for word in VERBS[verb]]
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    drawn = [verb]
    for word in words:
        if dice.random() < 0.6:
            drawn.append(word)
            if word.startswith("--"):
                drawn.append(dice.choice(ODD + NEVER))
    if dice.random() < 0.2:
        drawn.insert(dice.randrange(1, len(drawn) + 1), dice.choice(ODD + NEVER))
    return drawn, False


def of_json(dice: random.Random, root: Path) -> tuple[list[str], bool]:
    """(a command that reads a config.json with some of it changed, False)."""
    value = json.loads(json.dumps(to_json(train.load_config(str(ROOT / dice.choice(FILES))))))
    for _ in range(dice.randint(1, 3)):
        value = mutated(value, dice)
    text = json.dumps(value)
    if dice.random() < 0.2:
        text = text[: dice.randrange(len(text))]
    (root / "json").mkdir(exist_ok=True)
    (root / "json/config.json").write_text(text)
    return [str(root / "json/config.json")], False


def mutated(value, dice: random.Random):
    """A JSON value with a drawn part of it taken away, added or made another."""
    odd = [
        None,
        True,
        -1,
        0,
        1e300,
        10**30,
        "",
        "x",
        "\ud800",
        [],
        {},
        [[]],
        {"function": 3, "arguments": []},
        {"function": "os.py:system", "arguments": {}},
        {"function": "data.py:text", "arguments": {"path": 3}},
    ]
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(sorted(value))
        if dice.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if dice.random() < 0.1:
            return value | {dice.choice(["nosuch", "", "²"]): dice.choice(odd)}
        return value | {key: mutated(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.7:
        place = dice.randrange(len(value))
        return [mutated(part, dice) if i == place else part for i, part in enumerate(value)]
    return dice.choice(odd)


def of_python(dice: random.Random, root: Path, number: int) -> tuple[list[str], bool]:
    """(a command that reads a config file with drawn lines, False)."""
    lines = ["from train import Config, Phase", *dice.sample(LINES, dice.randint(1, 3))]
    file = root / f"drawn_{number}.py"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return [str(file)], False


def drawn(kind: str, dice: random.Random, root: Path, case: int) -> tuple[list[str], bool]:
    """(a command of a kind, whether it is known nonsense)."""
    if kind == "a field":
        return of_a_field(dice)
    if kind == "a name":
        return of_a_name(dice)
    if kind == "a verb":
        return of_a_verb(dice, root)
    if kind == "config.json":
        return of_json(dice, root)
    return of_python(dice, root, case)


@pytest.mark.soak
def test_words_are_taken_or_refused_in_a_sentence(tmp_path, only_words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where pages of drawn names are written
    begun, number, counts, failed = time.monotonic(), soak.size("WORDS", 3_000), Counter(), []
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken/checkpoints/²").mkdir(parents=True)
    (tmp_path / "broken/config.json").write_text("[1]")
    for case in range(number):
        dice = random.Random(f"{soak.seed()} {case}")
        kind = dice.choice(["a field", "a field", "a name", "a verb", "config.json", "a config file"])
        command, never = drawn(kind, dice, tmp_path, case)
        try:
            found = ended(command, capsys)
            assert not never or found == "refused", f"{command} is nonsense, and is taken"
        except Exception as error:  # of the command, which must raise none
            failed.append(f"{command!r:.300}: {type(error).__name__}: {error!s:.300}")
            continue
        counts[f"{kind}: {'known nonsense, ' * never}{found}"] += 1
    assert not failed, "\n".join([f"{len(failed)} of {number}:", *failed[:40]])
    soak.record(
        "Commands and configs",
        number,
        counts,
        "Fields set to drawn values, names that are none, verbs with drawn words, `config.json` and config "
        "files with drawn defects. Each ended within ten seconds, by one sentence and exit code 2, or was "
        "taken; none that is known nonsense was. Verbs end where they would begin to work.",
        begun,
    )
