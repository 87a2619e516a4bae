"""DCLM's CORE tasks from files of their format: what is asked, how it is scored, and where."""
import csv
import json
import random
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import BYTES, CONFIG, bigram, nats, read_json, read_lines, table, write

import train
from lib.config import ROOT, from_json, to_json
from lib.core_tasks import KINDS, Question, core, core_figures, examples, read_core, split
from lib.errors import InputError

MC, SCHEMA, LM = KINDS
BUNDLE = "core.yaml", "eval_meta_data.csv"


class Published(NamedTuple):
    """A task as a test writes it."""

    kind: str
    rows: list
    shots: int = 0
    baseline: float | str = 0
    delimiter: str | None = None


def bundle(place: Path, **tasks: Published) -> Path:
    """A directory of tasks by label, as DCLM's are published."""
    (place / "eval_data/some").mkdir(parents=True, exist_ok=True)
    lines = ["icl_tasks:"]
    for label, task in tasks.items():
        write(place / f"eval_data/some/{label}.jsonl", task.rows)
        lines += [
            "-",
            f"  label: {label}",
            f"  dataset_uri: some/{label}.jsonl",
            f"  num_fewshot: [{task.shots}]",
            f"  icl_task_type: {task.kind}",
        ]
        if task.delimiter is not None:
            lines.append(f"  continuation_delimiter: {json.dumps(task.delimiter)}")
    (place / "core.yaml").write_text("\n".join(lines))
    with (place / "eval_meta_data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Eval Task", "Task Category", "Random baseline", "Description"])
        rows.writerow(["elsewhere", "other", "", 'A task, "quoted",\nthat is not asked for'])
        for label, task in tasks.items():
            rows.writerow([label, "other", task.baseline, "A task, of a test"])
    return place


def letters(rng, least: int, most: int) -> str:
    """A text of few letters, some beyond ASCII."""
    return "".join(rng.choice(list("abcdé木 "), rng.integers(least, most)))


def rows_of(kind: str, seed: int, n: int) -> list[dict]:
    """Lines of a task with two to four choices."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        choices = [letters(rng, 0, 9) + "wxyz"[i] for i in range(rng.integers(2, 5))]
        gold = int(rng.integers(len(choices)))
        context = letters(rng, 0, 20)
        rows.append({
            MC: dict(query=context, choices=choices, gold=gold),
            SCHEMA: dict(context_options=choices, continuation=f"q{context}", gold=gold),
            LM: dict(context=context, continuation=f"q{context}"),
        }[kind])
    return rows


def shuffled(rows: list, most: int | None = None) -> list:
    """The lines in the order in which they are asked."""
    rows = list(rows)
    random.Random(1337).shuffle(rows)
    return rows[:most]


def shown(rows: list, i: int, shots: int) -> list:
    """The lines that stand before line i, of those that are asked."""
    others = [row for j, row in enumerate(rows) if j != i]
    return random.Random(1234 + i).sample(others, shots)


class Heard:
    """A model that remembers the rows that it was given, padding taken away."""

    def __init__(self):
        self.rows, self.shapes = [], set()

    def __call__(self, params, ids):
        ids = np.asarray(ids)
        self.shapes.add(ids.shape)
        for row in ids.tolist():
            while row and row[-1] == BYTES.eos:
                row.pop()
            if row:
                self.rows.append(row)
        return bigram(params, ids)

    def texts(self) -> set[str]:
        """The rows as texts."""
        return {BYTES.decode(row) for row in self.rows}


def measured(path: Path, params=None, apply=bigram, most=None, seq: int = 4096) -> dict:
    """The figures of a directory."""
    params = table() if params is None else params
    return core_figures(params, apply, BYTES, read_core(path, most), seq)


def a_byte(params, before: str, rest: str) -> float:
    """Nats a byte of a text after another, at the beginning of a document."""
    ids = list(rest.encode())
    return nats(params, [BYTES.bos, *before.encode()], ids) / len(ids)


def begin_alike(texts: list[str]) -> int:
    """With how many bytes all texts begin alike."""
    rows = [text.encode() for text in texts]
    size = 0
    while size < min(map(len, rows)) and len({row[size] for row in rows}) == 1:
        size += 1
    return size


def best(params, texts: list[str], sizes: list[int]) -> int:
    """Which text has the fewest nats a byte of its last `sizes` bytes; no character is cut here."""
    scores = []
    for text, size in zip(texts, sizes, strict=True):
        row = [BYTES.bos, *text.encode()]
        scores.append(nats(params, row[:-size], row[-size:]) / size)
    return int(np.argmin(scores))


# ------------------------------------------------------------------------------------- each kind's answers


@pytest.mark.parametrize("delimiter, said", [(None, " "), ("\nAnswer: ", "\nAnswer: "), ("", "")])
def test_multiple_choice_takes_the_fewest_nats_a_piece_of_what_differs(tmp_path, delimiter, said):
    rows, params = rows_of(MC, 0, 60), table(1)
    right = []
    for row in rows:
        texts = [row["query"] + said + choice for choice in row["choices"]]
        alike = begin_alike(texts)
        right.append(best(params, texts, [len(t.encode()) - alike for t in texts]) == row["gold"])
    found = measured(bundle(tmp_path, quiz=Published(MC, rows, 0, 25, delimiter)), params)
    assert 0 < np.mean(right) < 1
    assert found["core/quiz"] == np.mean(right)


def test_a_schema_takes_the_fewest_nats_a_piece_of_what_is_alike(tmp_path):
    rows, params = rows_of(SCHEMA, 0, 60), table(1)
    right = []
    for row in rows:
        texts = [f"{context} {row['continuation']}" for context in row["context_options"]]
        alike = len(f" {row['continuation']}".encode())  # the contexts end with letters that differ
        right.append(best(params, texts, [alike] * len(texts)) == row["gold"])
    found = measured(bundle(tmp_path, names=Published(SCHEMA, rows)), params)
    assert 0 < np.mean(right) < 1
    assert found["core/names"] == np.mean(right)


def test_a_text_goes_on_rightly_where_each_piece_is_the_likeliest(tmp_path):
    """Contexts lose their spaces, the delimiter's go to what follows."""
    params = table(2)
    params[:] = -1
    for a, b in ("xA", ": ", " y", "yz", "z!"):
        params[ord(a), ord(b)] = 1
    rows = [
        dict(context="  x ", continuation="yz"),
        dict(context="x", continuation="yz!"),
        dict(context="x", continuation="yy"),
        dict(context="", continuation="y"),
    ]
    found = measured(bundle(tmp_path, next=Published(LM, rows, 0, 0, "A: ")), params)
    assert found["core/next"] == 3 / 4


def test_a_choice_that_is_the_beginning_of_another_keeps_a_piece_of_its_own(tmp_path):
    params = table(3)
    texts = ["ab", "abc"]
    likelier = best(params, texts, [1, 2])
    same = dict(query="q", choices=["same", "same"], gold=0)
    rows = [dict(query="", choices=texts, gold=likelier), same]
    path = bundle(tmp_path, quiz=Published(MC, rows, 0, 0, ""))
    assert measured(path, params)["core/quiz"] == 1.0
    rows[0]["gold"], same["gold"] = 1 - likelier, 1
    assert measured(bundle(tmp_path, quiz=Published(MC, rows, 0, 0, "")), params)["core/quiz"] == 0.0


some_text = st.text("ab \né木", max_size=12)


@settings(max_examples=50)
@given(some_text, some_text, some_text, st.lists(st.text("abé木", min_size=1), min_size=2, max_size=4))
def test_options_are_cut_where_they_begin_or_end_alike(pieces, before, context, rest, choices):
    for tokenizer in (BYTES, pieces):
        def ids(text, tokenizer=tokenizer):
            return [tokenizer.bos, *tokenizer.encode(text)]

        asked = {
            MC: [context + choice for choice in choices],
            SCHEMA: [choice + rest for choice in choices],
            LM: [f"{context}{rest}."],
        }
        for kind, options in asked.items():
            found = split(tokenizer, kind, before, Question(options, 0, context))
            for (head, tail), option in zip(found, options, strict=True):
                assert [*head, *tail] == ids(before + option)
                assert len(head) > 0 and len(tail) > 0
            heads, tails = ({tuple(pair[side]) for pair in found} for side in (0, 1))
            if kind == SCHEMA:  # the same end, which does not begin earlier
                whole = len({head[-1] for head in heads}) > 1 or min(map(len, heads)) == 1
                none = len(tails) > 1 and all(len(tail) == 1 for tail in tails)
                assert none or len(tails) == 1 and whole
            else:
                assert len(heads) == 1
            if kind == MC:  # it does not begin later, unless nothing were left
                assert len({tail[0] for tail in tails}) > 1 or min(map(len, tails)) == 1
            if kind == LM:
                stem, whole = ids((before + context).strip()), ids(before + options[0])
                assert whole[:len(stem)] != stem or heads == {tuple(stem)}


# ----------------------------------------------------------------------------------- examples, order, cuts


def test_prompts_are_rendered_as_published(tmp_path):
    """Two line breaks after each example; only contexts of texts that go on are stripped."""
    quiz = [dict(query=f" q{i} ", choices=["no", "yes "], gold=i % 2) for i in range(4)]
    names = [dict(context_options=[f"a{i} ", f"{i}b"], continuation=".", gold=1) for i in range(4)]
    going = [dict(context=f" \nc{i}\n", continuation=f"d{i}") for i in range(4)]
    path = bundle(
        tmp_path,
        quiz=Published(MC, quiz, 2, 50, "\nAnswer: "),
        names=Published(SCHEMA, names, 1, 50),
        going=Published(LM, going, 3, 0, "\nA: "),
    )
    found = {}
    for task in read_core(path):
        found[task.label] = []
        for i, question in enumerate(task.questions):
            pairs = split(BYTES, task.kind, examples(task, i), question)
            found[task.label].append([(BYTES.decode(a), BYTES.decode(b)) for a, b in pairs])

    quiz, names, going = shuffled(quiz), shuffled(names), shuffled(going)
    for i in range(4):
        before = ""
        for row in shown(quiz, i, 2):
            before += f"{row['query']}\nAnswer: {row['choices'][row['gold']]}\n\n"
        before += f"{quiz[i]['query']}\nAnswer: "
        assert found["quiz"][i] == [(before, "no"), (before, "yes ")]

        [row] = shown(names, i, 1)
        before = f"{row['context_options'][1]} .\n\n"
        first, second = names[i]["context_options"]
        assert found["names"][i] == [(f"{before}{first}", " ."), (f"{before}{second}", " .")]

        before = ""
        for row in shown(going, i, 3):
            before += f"{row['context'].strip()}\nA: {row['continuation']}\n\n"
        before += f"{going[i]['context'].strip()}\nA:"
        assert found["going"][i] == [(before, f" {going[i]['continuation']}")]


@pytest.mark.parametrize("n, shots", [(12, 10), (40, 5), (300, 10), (11, 10)])
def test_examples_are_drawn_as_published_and_never_the_question_itself(tmp_path, n, shots):
    rows = [dict(context=f"c{i}", continuation=f"d{i}") for i in range(n)]
    [task] = read_core(bundle(tmp_path, going=Published(LM, rows, shots)))
    rows = shuffled(rows)
    for i in range(n):
        expected = [f"{row['context']} {row['continuation']}\n\n" for row in shown(rows, i, shots)]
        assert examples(task, i) == "".join(expected)
        assert len(set(expected)) == shots
        assert task.questions[i].options[0] not in expected


def test_there_are_fewer_examples_where_there_are_few_lines(tmp_path):
    rows = [dict(context=f"c{i}", continuation=f"d{i}") for i in range(3)]
    [task] = read_core(bundle(tmp_path, going=Published(LM, rows, 10)))
    for i in range(3):
        assert sorted(examples(task, i).split("\n\n")) == sorted(
            ["", *(q.options[0] for j, q in enumerate(task.questions) if j != i)]
        )
    [alone] = read_core(tmp_path, most=1)
    assert examples(alone, 0) == ""


def test_most_takes_the_first_lines_of_a_file_that_is_shuffled(tmp_path):
    rows, params = rows_of(MC, 4, 50), table(1)
    path = bundle(tmp_path, quiz=Published(MC, rows, 3, 25))
    some, whole = read_core(path, 20), read_core(path)
    assert some == read_core(path, 20)
    assert some[0].questions == whole[0].questions[:20]
    texts = [row["query"] for row in shuffled(rows, 20)]
    for text, question in zip(texts, some[0].questions, strict=True):
        assert question.options[0].startswith(f"{text} ")
    found = measured(path, params, most=20)
    assert round(found["core/quiz"] * 20, 9).is_integer()
    assert found == measured(path, params, most=20)


def test_long_prompts_are_cut_on_the_left_and_few_shapes_are_compiled(tmp_path):
    """The last 64 bytes are left; a bigram does not miss the rest."""
    rows, params, heard = rows_of(MC, 5, 100), table(1), Heard()
    path = bundle(tmp_path, quiz=Published(MC, rows, 10, 25))
    found = measured(path, params, heard, seq=64)
    assert {len(row) for row in heard.rows} == {64}
    assert {width for _, width in heard.shapes} == {64}
    assert max(height for height, _ in heard.shapes) == 64
    assert found == measured(path, params)


def test_what_is_judged_is_never_cut(tmp_path):
    rows = [dict(query="q", choices=["x" * 50, "y" * 70], gold=0)]
    heard = Heard()
    measured(bundle(tmp_path, quiz=Published(MC, rows)), apply=heard, seq=16)
    assert heard.texts() == {" " + "x" * 50, " " + "y" * 70}


# ------------------------------------------------------------------------------------------------- figures


def always(letter: str) -> np.ndarray:
    """A model that says one letter after each."""
    params = np.full((258, 258), -5, np.float32)
    params[:, ord(letter)] = 5
    return params


def quiz_of(right: int, wrong: int) -> list[dict]:
    """Questions of which a model that always says y has so many right, and so many wrong."""
    golds = [1] * right + [0] * wrong
    return [dict(query=f"q{i}", choices=["n", "y"], gold=gold) for i, gold in enumerate(golds)]


def test_accuracies_are_centred_and_core_is_their_mean(tmp_path):
    going = [dict(context="a", continuation="y"), *[dict(context="a", continuation="n")] * 3]
    path = bundle(
        tmp_path,
        all_of_them=Published(MC, quiz_of(20, 0), 1, 25),
        guessed=Published(MC, quiz_of(10, 10), 0, 50),
        none_of_them=Published(MC, quiz_of(0, 20), 0, 33.3),
        going=Published(LM, going, 0, 0, ""),
    )
    found = measured(path, always("y"))
    assert found["core/all_of_them"] == 1 == found["core/all_of_them/centred"]
    assert found["core/guessed"] == 0.5 and found["core/guessed/centred"] == 0
    assert found["core/none_of_them/centred"] == pytest.approx(-0.333 / 0.667)
    assert found["core/going"] == 0.25 == found["core/going/centred"]
    assert found["core"] == pytest.approx((1 + 0 - 0.333 / 0.667 + 0.25) / 4)
    assert found["core_low"] < found["core"] < found["core_high"]
    error = np.sqrt(19 / 20 * 0.0 + (found["core/guessed_se"] / 0.5) ** 2 + found["core/going_se"] ** 2)
    assert found["core_se"] == pytest.approx(error / 4)
    assert found["core/guessed_low"] < 0.5 < found["core/guessed_high"]


def test_core_of_one_task_has_the_interval_of_its_accuracy(tmp_path):
    found = measured(bundle(tmp_path, guessed=Published(MC, quiz_of(12, 8), 0, 20)), always("y"))
    for end in ("", "_low", "_high"):
        assert found[f"core{end}"] == pytest.approx((found[f"core/guessed{end}"] - 0.2) / 0.8)


# ---------------------------------------------------------------------------------------- what is refused


GOOD = dict(query="q", choices=["a", "b"], gold=0)
BROKEN = {  # a line of multiple choice: what is said
    "{": "broken JSON",
    '{"choices": ["a", "b"], "gold": 0}': "query is None",
    '{"query": "q", "choices": "ab", "gold": 0}': "choices is 'ab'; allowed is a list",
    '{"query": "q", "choices": ["a"], "gold": 0}': "choices is .* two or more",
    '{"query": "q", "choices": ["a", 1], "gold": 0}': "choice 1: text is 1",
    '{"query": "q", "choices": ["a", "b"], "gold": 2}': "is 2; .* 0 to 1",
    '{"query": "q", "choices": ["a", "b"], "gold": true}': "is True",
    '{"query": "q", "choices": ["a", "b"], "answer": 0}': "is None",
    '{"query": "", "choices": ["", "b"], "gold": 0}': "a choice is empty",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_is_no_question_is_named(line, tmp_path):
    path = bundle(tmp_path, quiz=Published(MC, [GOOD, line], 0, 50, ""))
    with pytest.raises(InputError, match=f"quiz.jsonl, line 2.*{BROKEN[line]}"):
        read_core(path)


@pytest.mark.parametrize("kind, line, said", [
    (SCHEMA, dict(context_options=["a", "b"], gold=0), "continuation is None"),
    (SCHEMA, dict(context_options=["a"], continuation="c", gold=0), "context_options is"),
    (SCHEMA, dict(context_options=["a", "b"], continuation="c"), "gold"),
    (LM, dict(context="a"), "continuation is None"),
    (LM, dict(context="a", continuation=""), "continuation is ''"),
    (LM, dict(continuation="a"), "context is None"),
])
def test_a_line_of_another_kind_is_named(kind, line, said, tmp_path):
    with pytest.raises(InputError, match=f"some.jsonl, line 1.*{said}"):
        read_core(bundle(tmp_path, some=Published(kind, [line], 0, 0)))


MISTAKES = {  # what is put in place of what in core.yaml: what is said
    ("multiple_choice", "question_answering"):
        r"task 1 \(quiz\): icl_task_type is 'question_answering'; allowed are multiple_choice, sch",
    ("some/quiz.jsonl", "other.jsonl"): "dataset_uri leads to .*other.jsonl, which is no file",
    ("[0]", "[0, 10]"): "num_fewshot is .* a list of one number",
    ("[0]", "[-1]"): "num_fewshot",
    ("[0]", "0"): "num_fewshot is 0",
    ("[0]", "[true]"): "num_fewshot",
    ("label: quiz", "label: other"): "eval_meta_data.csv: Random baseline of other is None",
    ("label: quiz", "label: elsewhere"): "Random baseline of elsewhere is ''",
    ("label: quiz", "label: full"): "Random baseline of full is '100'; .* below 100",
    ("label: quiz", "label: 3"): "task 1: label is 3",
    ("  label: quiz", "  name: quiz"): "task 1: label is None",
    ("icl_tasks", "tasks"): "icl_tasks is None; allowed is a list of tasks",
    ("icl_tasks:", "icl_tasks: ["): "core.yaml cannot be read",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_in_core_yaml_is_named(change, tmp_path):
    bundle(tmp_path, quiz=Published(MC, [GOOD], 0, 50), full=Published(MC, [GOOD], 0, 100))
    file = tmp_path / "core.yaml"
    first, second, third = file.read_text().partition("-\n  label: full")
    file.write_text(first.replace(*change))
    with pytest.raises(InputError, match=MISTAKES[change]):
        read_core(tmp_path)
    file.write_text(first)
    assert len(read_core(tmp_path)) == 1


def test_labels_differ(tmp_path):
    path = bundle(tmp_path, quiz=Published(MC, [GOOD], 0, 50), same=Published(MC, [GOOD], 0, 50))
    file = path / "core.yaml"
    file.write_text(file.read_text().replace("label: same", "label: quiz"))
    with pytest.raises(InputError, match="two tasks quiz; allowed are labels that differ"):
        read_core(path)


@pytest.mark.parametrize("name", BUNDLE)
def test_a_file_that_is_not_there_is_named(name, tmp_path):
    path = bundle(tmp_path, quiz=Published(MC, [GOOD], 0, 50))
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{name} cannot be read .*allowed is a directory with"):
        read_core(path)


# ----------------------------------------------------------------------------------- in a run, by eval, docs


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, data_config) -> tuple[Path, Path]:
    """A run of two steps with SentencePiece that asks for CORE, and the files of its tasks."""
    place = tmp_path_factory.mktemp("core")
    path = bundle(
        place / "files",
        quiz=Published(MC, rows_of(MC, 0, 12), 2, 25, "\nAnswer: "),
        names=Published(SCHEMA, rows_of(SCHEMA, 0, 12), 0, 50),
        going=Published(LM, rows_of(LM, 0, 12), 1),
    )
    config = train.Config(
        name="asked",
        runs=str(place / "runs"),
        model=train.replace(tiny, layers=1),
        data=train.replace(data_config, dev=0, test=0),
        phases=(train.Phase(steps=2, batch=8, seq=32),),
        overlap=8,
        eval_every=1,
        evals=(partial(core, path=str(path), most=5),),
        prompts=(),
    )
    train.check(config)
    assert from_json(train.Config, to_json(config)).evals[0].func is core
    train.train(config, __file__)
    return place / "runs/asked", path


def test_a_run_asks_as_it_trains(run):
    directory, path = run
    rows = [row for row in read_lines(directory / "metrics.jsonl") if "core" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["core/quiz"] * 5 == pytest.approx(round(row["core/quiz"] * 5))
        centred = [row[f"core/{label}/centred"] for label in ("quiz", "names", "going")]
        assert row["core"] == pytest.approx(np.mean(centred))

    params, config, tokenizer, apply = train.load(str(directory))
    alone = core(params, apply, tokenizer, config, str(path), most=5)
    for name, value in alone.items():
        assert rows[-1][name] == pytest.approx(value)


def test_eval_prints_a_table_and_writes_eval_json(run, capsys):
    directory, path = run
    assert train.main(["eval", str(directory), "--core", str(path)]) == 0
    found, said = read_json(directory / "eval.json"), capsys.readouterr().out
    for label, shots, baseline in (("quiz", 2, 0.25), ("names", 0, 0.5), ("going", 1, 0.0)):
        share, centred = found[f"core/{label}"], found[f"core/{label}/centred"]
        assert share * 12 == pytest.approx(round(share * 12))  # all lines, not the config's five
        assert centred == pytest.approx((share - baseline) / (1 - baseline))
        line = rf"{label} +{shots} +12 +{share:.3f} \[.*\] +{baseline:.3f} +{centred:.3f}"
        assert re.search(line, said)
    assert f"core: {found['core']:.4f} [" in said

    assert train.main(["eval", str(directory), "--core", str(path), "--most", "4"]) == 0
    assert read_json(directory / "eval.json")["core/quiz"] * 4 in range(5)


def test_mistakes_on_the_command_line_are_one_sentence(run, tmp_path, capsys):
    directory, path = run
    broken = bundle(tmp_path, quiz=Published(MC, ["{"], 0, 50))
    for arguments, said in (
        (["--core", tmp_path / "none"], "core.yaml cannot be read"),
        (["--core", broken], "quiz.jsonl, line 1: broken JSON"),
        (["--core", path, "--most", "0"], "most is 0; allowed is 1 or more"),
        (["--most", "5"], "--most is 5 without --core"),
    ):
        code = train.main(["eval", str(directory), *map(str, arguments)])
        error = capsys.readouterr().err
        assert code == 2
        assert said in error
        assert error.count("\n") == 1


def test_the_files_that_docs_show_are_read(tmp_path):
    """docs/runs.md has core.yaml, a line of each kind and the table of baselines."""
    page = (ROOT / "docs/runs.md").read_text("utf-8")
    shown = dict(re.findall(r"(?ms)^```(yaml|json|csv)\n(.*?)^```", page))
    (tmp_path / "core.yaml").write_text(shown["yaml"])
    (tmp_path / "eval_meta_data.csv").write_text(shown["csv"])
    paths = re.findall(r"dataset_uri: (\S+)", shown["yaml"])
    lines = shown["json"].splitlines()
    for path, line in zip(paths, lines, strict=True):
        file = tmp_path / "eval_data" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, [line])
    tasks = read_core(tmp_path)
    assert [task.kind for task in tasks] == [MC, SCHEMA, LM]
    found = core(table(), bigram, BYTES, CONFIG, str(tmp_path))
    assert found["core/winograd"] in (0, 1)
