"""Minimal pairs, multiple choice, completions, and where a run has them."""
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import model
import train
from lib import disk
from lib.config import from_json, to_json
from lib.schedule import Schedule
from lib.tasks import blimp, encode_pair, judged, minimal_pairs, proportion, tasks
from lib.tokenizers import Bytes

BYTES = Bytes()
CONFIG = train.Config(phases=(train.Phase(seq=64),))


def bigram(params, ids):
    """Logits [b t v] of a model that looks at one piece alone: params [v v]."""
    return jnp.asarray(params)[np.asarray(ids)]


def table(seed: int = 0) -> np.ndarray:
    """Logits of the next byte after each."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, (258, 258)).astype(np.float32)


def steps_of(before: list[int], rest: list[int]) -> list[tuple[int, int]]:
    """(a piece, the next one) for each piece of `rest`, which comes after `before`."""
    contexts = [before[-1], *rest[:-1]]
    return list(zip(contexts, rest, strict=True))


def nats(params: np.ndarray, before: list[int], rest: list[int]) -> float:
    """What `bigram` needs for `rest` after `before`, a piece at a time."""
    wide = params.astype(np.float64)
    total = 0.0
    for a, b in steps_of(before, rest):
        total += np.log(np.exp(wide[a]).sum()) - wide[a, b]
    return total


def nats_of_text(params: np.ndarray, before: str, rest: str) -> float:
    """The same for texts, at the beginning of a document."""
    return nats(params, [BYTES.bos, *before.encode()], list(rest.encode()))


def write(path, rows) -> str:
    """A JSON Lines file; a row that is text stands there as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return str(path)


def read_json(path):
    """What a JSON file holds."""
    return json.loads(path.read_text())


def read_lines(path) -> list[dict]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------- how continuations are judged

before_and_rest = st.tuples(st.binary(max_size=90), st.binary(min_size=1, max_size=150))


@given(st.lists(before_and_rest, min_size=1, max_size=9))
@settings(max_examples=12)
def test_continuations_of_any_length_are_judged_as_one_piece_at_a_time(rows):
    pairs = [([BYTES.bos, *before], list(rest)) for before, rest in rows]
    params = table()
    likeliest = params.argmax(1)

    found, greedy = judged(params, bigram, BYTES, pairs, 0)

    assert found == pytest.approx([nats(params, *pair) for pair in pairs], rel=1e-5)
    for pair, is_greedy in zip(pairs, greedy.tolist(), strict=True):
        assert is_greedy == all(likeliest[a] == b for a, b in steps_of(*pair))


def test_few_shapes_reach_the_model_and_contexts_are_cut_on_the_left():
    """Widths are powers of two, the continuation is never cut, and padding stands on the right."""
    shapes = set()
    firsts = []

    def apply(params, ids):
        shapes.add(ids.shape)
        firsts.extend(ids[:, 0].tolist())
        return bigram(params, ids)

    pairs = [([256, *range(n)], [7] * 5) for n in range(3, 250)]
    cut, _ = judged(table(), apply, BYTES, pairs, 32)
    whole, _ = judged(table(), bigram, BYTES, pairs, 10_000)

    assert shapes == {(16, 16), (64, 32)}
    first_of_longest = max(first for first in firsts if first < 256)
    assert first_of_longest == 249 - 33 + 5
    assert cut == pytest.approx(whole, rel=1e-5)  # a bigram does not miss what was cut


def test_a_continuation_longer_than_a_row_is_judged_whole():
    before, rest = [256, 1, 2], [7] * 100
    found, _ = judged(table(), bigram, BYTES, [(before, rest)], 32)
    assert found[0] == pytest.approx(nats(table(), before, rest), rel=1e-5)


@pytest.mark.parametrize("context, rest", [
    ("the tree is", " cut back"),
    ("the tree is ", "cut"),
    ("the\n\n", "tree"),
    ("", " the tree"),
    ("  ", "roots"),
    ("été 樹", "木 grows"),
])
def test_the_boundary_is_where_the_context_s_own_pieces_end(pieces, context, rest):
    """The context's last spaces go to what follows. The pieces of all of it are cut there."""
    before, after = encode_pair(pieces, context, rest)
    whole = pieces.encode(context + rest)
    assert before == [pieces.bos, *pieces.encode(context.rstrip())]
    assert after == whole[len(before) - 1:]


def test_a_piece_may_lie_across_the_boundary(pieces):
    whole = pieces.encode("the tree")
    context = pieces.encode("the tr")
    _, after = encode_pair(pieces, "the tr", "ee")
    assert after == whole[len(context):]


def test_in_bytes_a_space_before_the_boundary_goes_to_what_follows():
    assert encode_pair(BYTES, "a ", "b") == ([256, 97], [32, 98])


# -------------------------------------------------------------------------------------------- tasks


def choices(seed: int, n: int) -> list[dict]:
    """Questions with two to five choices of 2 to 13 characters, some beyond ASCII."""
    rng = np.random.default_rng(seed)
    letters = list("abcdefgh é木")

    def word():
        return "x" + "".join(rng.choice(letters, rng.integers(0, 12)))

    questions = []
    for _ in range(n):
        query = word()
        names = "abcde"[:rng.integers(2, 6)]
        questions.append(dict(query=query, choices=[name + word() for name in names]))
    for question in questions:
        question["gold"] = int(rng.integers(len(question["choices"])))
    return questions


def characters(text: str) -> int:
    """The length of a text."""
    return len(text)


def utf8_bytes(text: str) -> int:
    """The length of a text in bytes."""
    return len(text.encode())


def no_norm(text: str) -> int:
    """1: scores are not divided."""
    return 1


def scores_of_choices(params, question: dict) -> list[float]:
    """The log-likelihood of each choice after its query."""
    query = question["query"]
    head = query.rstrip()  # what stands behind goes to the choices
    tail = query[len(head):]
    return [-nats_of_text(params, head, f"{tail} {choice}") for choice in question["choices"]]


def is_right(params, question: dict, size) -> bool:
    """Whether the right choice has the highest score by its size."""
    scores = scores_of_choices(params, question)
    sizes = [size(choice) for choice in question["choices"]]
    return np.argmax(np.divide(scores, sizes)) == question["gold"]


def test_multiple_choice_by_sums_by_characters_and_by_bytes(tmp_path):
    questions, params = choices(0, 40), table(1)
    path = write(tmp_path / "quiz.jsonl", questions)

    found = tasks(params, bigram, BYTES, CONFIG, path=path)

    for name, size in (("acc", no_norm), ("acc_norm", characters), ("acc_bytes", utf8_bytes)):
        right = [is_right(params, question, size) for question in questions]
        error = np.std(right, ddof=1) / math.sqrt(40)
        assert found[f"task/quiz/{name}"] == np.mean(right)
        assert found[f"task/quiz/{name}_se"] == pytest.approx(error)
    different = {found[f"task/quiz/{name}"] for name in ("acc", "acc_norm", "acc_bytes")}
    assert len(different) > 1


def test_multiple_choice_by_other_names_and_with_the_answer_as_a_text(tmp_path):
    questions, params = choices(0, 40), table(1)
    path = write(tmp_path / "quiz.jsonl", questions)
    found = tasks(params, bigram, BYTES, CONFIG, path=path)

    renamed = []
    for question in questions:
        answers = question["choices"]
        answer = answers[question["gold"]]
        renamed.append(dict(prompt=question["query"] + " ", choices=answers, answer=answer))
    write(tmp_path / "quiz.jsonl", renamed)
    again = tasks(params, bigram, BYTES, CONFIG, path=path, delimiter="")

    for name, value in found.items():
        assert again[name] == pytest.approx(value)


def likeliest_bytes(params) -> list[dict]:
    """Completions of four letters that a model takes to be the likeliest."""
    rows = []
    for letter in "abcd":
        likeliest = params[ord(letter), :128].argmax()
        rows.append(dict(context=letter, completion=chr(likeliest)))
    return rows


def ascii_table(seed: int) -> np.ndarray:
    """A table that gives next to nothing to what is no ASCII."""
    params = table(seed)
    params[:, 128:] = -30
    return params


def test_completions_by_taking_the_likeliest(tmp_path):
    params = ascii_table(2)
    path = write(tmp_path / "next.jsonl", likeliest_bytes(params))
    found = tasks(params, bigram, BYTES, CONFIG, path=path)
    assert found["task/next/exact"] == 1.0


def test_completions_by_likelihood(tmp_path):
    params = ascii_table(2)
    words = dict(prompt="ab", completion=" one two")
    accent = dict(context="", completion="é")
    rows = [*likeliest_bytes(params), words, accent]
    path = write(tmp_path / "next.jsonl", rows)

    found = tasks(params, bigram, BYTES, CONFIG, path=path)

    each, sizes = [], []
    for row in rows:
        context = row.get("context", "ab")
        each.append(nats_of_text(params, context, row["completion"]))
        sizes.append(utf8_bytes(row["completion"]))
    mean = np.mean(each)
    bits = sum(each) / math.log(2)
    assert found["task/next/exact"] == pytest.approx(4 / 6)
    assert found["task/next/loglikelihood"] == pytest.approx(-mean, rel=1e-5)
    assert found["task/next/perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["task/next/bpb"] == pytest.approx(bits / sum(sizes), rel=1e-5)


def test_one_completion_has_no_standard_error(tmp_path):
    words = dict(prompt="ab", completion=" one two")
    path = write(tmp_path / "one.jsonl", [words])
    alone = tasks(ascii_table(2), bigram, BYTES, CONFIG, path=path)
    assert math.isnan(alone["task/one/bpb_se"])
    assert math.isnan(alone["task/one/exact_se"])


# ------------------------------------------------------------------------------------ minimal pairs


def forty_pairs() -> list[dict]:
    """Short and long pairs of sentences of two letters each."""
    pairs = []
    for a in "cdefg":
        for b in "hijk":
            for n in (1, 30):
                pairs.append(dict(sentence_good=f"{a}b" * n, sentence_bad=f"{b}a" * n))
    return pairs


def prefers_good(params, pair: dict) -> bool:
    """Whether the good sentence is the likelier."""
    good = nats_of_text(params, "", pair["sentence_good"])
    bad = nats_of_text(params, "", pair["sentence_bad"])
    return good < bad


def test_minimal_pairs_of_one_paradigm_are_those_of_all(tmp_path):
    params, pairs = table(3), forty_pairs()
    right = [prefers_good(params, pair) for pair in pairs]
    write(tmp_path / "first.jsonl", pairs)

    found = minimal_pairs(params, bigram, BYTES, tmp_path)

    assert found["blimp/first"] == np.mean(right)
    assert found["blimp"] == np.mean(right)
    assert found["blimp_pairs"] == np.mean(right)
    for end in ("_low", "_high"):
        assert found[f"blimp{end}"] == pytest.approx(found[f"blimp/first{end}"])


def test_minimal_pairs_by_paradigm_and_together(tmp_path):
    """The interval of ten right ones of ten is Wilson's, worked out by hand."""
    params, pairs = table(3), forty_pairs()
    right = [prefers_good(params, pair) for pair in pairs]
    ten_right = [pair for pair in pairs if prefers_good(params, pair)][:10]
    write(tmp_path / "first.jsonl", pairs)
    write(tmp_path / "second.jsonl", ten_right)

    found = minimal_pairs(params, bigram, BYTES, str(tmp_path))

    assert found["blimp/second"] == 1.0
    assert found["blimp"] == (1 + np.mean(right)) / 2
    assert found["blimp_pairs"] == (10 + np.sum(right)) / 50
    assert found["blimp/second_low"] == pytest.approx(1 - 1.96**2 / (10 + 1.96**2))
    assert found["blimp/second_high"] == pytest.approx(1)
    assert found["blimp_low"] < found["blimp"] < found["blimp_high"] < 1
    alone = blimp(params, bigram, BYTES, tmp_path)
    assert alone == {name: found[name] for name in ("blimp", "blimp_se")}


@pytest.mark.parametrize("p, n", [(0.5, 40), (0.2, 67), (0.7, 200)])
def test_wilson_s_interval_holds_the_share_as_often_as_it_says(p, n):
    """Over the binomial distribution, exactly: 93 to 97 % at each of these."""
    inside = 0.0
    for k in range(n + 1):
        found = proportion("x", np.arange(n) < k)
        if found["x_low"] <= p <= found["x_high"]:
            inside += math.comb(n, k) * p**k * (1 - p)**(n - k)
    assert 0.93 < inside < 0.97


BROKEN = {
    '{"context": "a", ': "line 2: broken JSON",
    '["context"]': "line 2: .* is not a JSON object",
    '{"context": "a", "choices": ["b"], "answer": 0}': "line 2: choices is .* two or more texts",
    '{"context": "a", "choices": ["b", ""], "answer": 0}': "line 2, choice 1: .* not empty",
    '{"context": "a", "choices": ["b", 3], "answer": 0}': "line 2, choice 1: .* is 3",
    '{"context": "a", "choices": ["b", "c"], "answer": 2}': "line 2: answer .* is 2; .* 0 to 1",
    '{"context": "a", "choices": ["b", "c"], "answer": true}': "line 2: answer .* is True",
    '{"context": "a", "choices": ["b", "c"]}': "line 2: answer .* is None",
    '{"choices": ["b", "c"], "answer": 0}': "line 2: context or query or prompt is None",
    '{"context": "a", "completion": "b"}': "line 2: choices and completions are in one file",
    '{"context": "a\\ud800", "choices": ["b", "c"], "answer": 0}':
        "line 2: context .* allowed is a text",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_is_no_task_is_named(line, tmp_path):
    good = dict(context="a", choices=["b", "c"], answer=1)
    path = write(tmp_path / "quiz.jsonl", [good, line])
    with pytest.raises(data.InputError, match=BROKEN[line]) as error:
        tasks(table(), bigram, BYTES, CONFIG, path=path)
    assert str(error.value).startswith(path)


@pytest.mark.parametrize("line, said", [
    ('{"sentence_good": "a"}', "line 2: sentence_bad is None"),
    ('{"sentence_good": "a", "sentence_bad": ""}', "line 2: sentence_bad is ''"),
    ('{"sentence_good": ["a"], "sentence_bad": "b"}', "line 2: sentence_good is"),
    ("{", "line 2: broken JSON"),
])
def test_a_line_that_is_no_pair_is_named(line, said, tmp_path):
    good = dict(sentence_good="a", sentence_bad="b")
    write(tmp_path / "pairs.jsonl", [good, line])
    with pytest.raises(data.InputError, match=f"pairs.jsonl, {said}"):
        minimal_pairs(table(), bigram, BYTES, tmp_path)


def test_a_directory_of_pairs_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(data.InputError, match="not a directory with .jsonl"):
        minimal_pairs(table(), bigram, BYTES, tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------- in a run


def noted(params, apply, config, word: str = "x"):
    """An `evals` that asks for the config.

    It gives the steps of the first phase, and how far the rows of its `apply`, seven at a time,
    are from the model's own.
    """
    ids = np.arange(7 * 9).reshape(7, 9)
    own = model.apply(params, jnp.asarray(ids), config.model)
    apart = jnp.abs(apply(params, ids) - own).max()
    return {f"own/{word}": float(config.phases[0].steps), "own/apart": float(apart)}


def counted(params, apply, path: str):
    """An `evals` that gives how often it was called, by the size of a file."""
    with open(path, "a") as file:
        file.write("x")
    return {"own/calls": float(Path(path).stat().st_size)}


class Run(NamedTuple):
    """A run that has ended."""

    place: Path  # where its files of tasks are
    directory: Path
    summary: dict
    rows: list[dict]  # of metrics.jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, data_config) -> Run:
    """A run on eight devices that asks for tasks and pairs as it trains, without dev or test."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "pairs").mkdir()
    quiz = write(place / "quiz.jsonl", choices(0, 12))
    tree = dict(context="the", completion=" tree")
    the = dict(context="", completion="the")
    write(place / "next.jsonl", [tree, the])
    pair = dict(sentence_good="the tree", sentence_bad="\x01\x02\x03\x04ZQZ")
    write(place / "pairs/some.jsonl", [pair] * 5)
    config = train.Config(
        name="tasked",
        runs=str(place / "runs"),
        model=train.replace(tiny, layers=1),
        data=train.replace(data_config, dev=0, test=0),
        phases=(train.Phase(steps=6, batch=8, seq=32),),
        overlap=8,
        eval_every=3,
        save_every=3,
        keep=2,
        evals=(
            partial(tasks, path=quiz),
            partial(noted, word="steps"),
            partial(blimp, path=str(place / "pairs")),
            partial(counted, path=str(place / "calls")),
        ),
        sample_tokens=4,
    )
    train.check(config)
    assert from_json(train.Config, to_json(config)).evals[0].func is tasks

    summary = train.train(config, __file__)

    directory = place / "runs/tasked"
    return Run(place, directory, summary, read_lines(directory / "metrics.jsonl"))


def test_tasks_come_up_while_a_run_trains(run):
    found = [row for row in run.rows if "task/quiz/acc" in row]
    assert [row["step"] for row in found] == [3, 6]
    for row in found:
        assert "train/loss" not in row
        assert 0 <= row["task/quiz/acc_norm"] <= 1
        assert 0 <= row["blimp"] <= 1
        assert row["own/steps"] == 6
        assert row["own/apart"] < 1e-4

    trained = [row["step"] for row in run.rows if "train/loss" in row]
    assert trained == [1, 2, 3, 4, 5, 6]


def test_tasks_are_in_what_a_run_leaves_at_its_end(run):
    last = [row for row in run.rows if "task/quiz/acc" in row][-1]
    names = [name for name in last if name.startswith(("task/", "blimp"))]
    wrote = read_json(run.directory / "eval.json")
    assert names
    for name in names:
        assert wrote[name] == pytest.approx(last[name])
        assert run.summary[name] == wrote[name]
    for file in ("samples.txt", "curves.png", "summary.json"):
        assert (run.directory / file).stat().st_size > 0


def test_a_config_s_own_evals_run_once_an_evaluation(run):
    """The end of a run takes their figures from its last evaluation."""
    calls = [row["own/calls"] for row in run.rows if "own/calls" in row]
    assert calls == [1, 2]
    assert run.summary["own/calls"] == 2


def test_the_command_line_adds_tasks_and_pairs_to_eval_json(run, capsys):
    following = str(run.place / "next.jsonl")
    quiz = str(run.place / "quiz.jsonl")
    pairs = str(run.place / "pairs")
    line = ["eval", str(run.directory), "--step", "3"]

    code = train.main([*line, "--tasks", following, "--blimp", pairs, "--tasks", quiz])

    assert code == 0
    found = read_json(run.directory / "eval.json")
    assert 0 <= found["task/next/exact"] <= 1
    assert found["task/next/bpb"] > 0
    assert found["blimp/some"] in (0, 1)
    assert found["own/steps"] == 6
    assert "task/quiz/acc_bytes_se" in found

    said = capsys.readouterr().out
    bpb = found["task/next/bpb"]
    error = 1.96 * found["task/next/bpb_se"]
    share, low = found["blimp/some"], found["blimp/some_low"]
    assert f"task/next/bpb: {bpb:.4g} ± {error:.2g} (± is half a 95 % interval)" in said
    assert f"blimp/some: {share:.3f} [{low:.3f}, " in said

    rows = read_lines(run.directory / "metrics.jsonl")
    in_training = next(row for row in rows if row["step"] == 3 and "blimp" in row)
    assert found["blimp"] == in_training["blimp"]
    assert found["task/quiz/acc"] == in_training["task/quiz/acc"]

    # One device, with what a notebook has, gives the same figures.
    params, config, tokenizer, apply = train.load(str(run.directory), 3)
    alone = tasks(params, apply, tokenizer, config, path=following)
    for name, value in alone.items():
        assert found[name] == pytest.approx(value, rel=1e-4)


def test_mistakes_on_the_command_line_are_one_sentence(run, tmp_path, capsys):
    quiz = run.place / "quiz.jsonl"
    same_name = shutil.copy(quiz, tmp_path / "quiz.jsonl")
    broken = write(tmp_path / "broken.jsonl", ["{"])
    nowhere = tmp_path / "none"
    for arguments, said in (
        (["--tasks", broken], "broken.jsonl, line 1: broken JSON"),
        (["--tasks", quiz, same_name], "names that differ"),
        (["--tasks", nowhere], "none"),
        (["--blimp", nowhere], "none"),
    ):
        code = train.main(["eval", str(run.directory), *map(str, arguments)])
        error = capsys.readouterr().err
        assert code == 2
        assert said in error
        assert error.count("\n") == 1


# ------------------------------------------------------------------------ the real harness, by hand


class Planted:
    """Tasks cut from the corpus at random."""

    def __init__(self, corpus: Path):
        files = sorted(corpus.rglob("*.txt"))
        self.text = "\n".join(file.read_text("utf-8") for file in files)
        self.rng = np.random.default_rng(0)

    def integer(self, *bounds) -> int:
        return int(self.rng.integers(*bounds))

    def cut(self, size: int) -> str:
        """So many characters."""
        start = self.integer(len(self.text) - size)
        return self.text[start:start + size]

    def question(self) -> dict:
        """A query of up to 49 characters and three choices."""
        query = self.cut(self.integer(0, 50))
        gold = self.integer(3)
        answers = [self.cut(self.integer(1, 20)) + "." for _ in range(3)]
        return dict(query=query, gold=gold, choices=answers)

    def long_question(self, tail: str) -> dict:
        """A query that is longer than the model's rows, and ends with `tail`."""
        return dict(query=self.cut(400) + tail, gold=0, choices=["tree", "self"])

    def completion(self) -> dict:
        """The last 15 characters after those before, cut within words too."""
        text = self.cut(self.integer(30, 90))
        return dict(context=text[:-15], completion=text[-15:])

    def pair(self) -> dict:
        """Two texts of 20 characters."""
        return dict(sentence_good=self.cut(20), sentence_bad=self.cut(20))

    def files(self) -> dict[str, list[dict]]:
        """The rows of each file."""
        quiz = [self.question() for _ in range(60)]
        quiz += [self.long_question(tail) for tail in ("", " ", "\n\n")]
        following = [self.completion() for _ in range(40)]
        following.append(dict(context="the", completion=" tree"))
        following.append(dict(context="roots", completion=" stay"))
        pairs = [self.pair() for _ in range(40)]
        return dict(quiz=quiz, following=following, pairs=pairs)


def harness_tasks(paths: dict[str, str]) -> list[dict]:
    """The files as tasks of lm-evaluation-harness."""
    def task(name: str, kind: str, metrics: str, **fields) -> dict:
        return fields | dict(
            task=name,
            dataset_path="json",
            dataset_kwargs=dict(data_files=dict(test=paths[name])),
            test_split="test",
            output_type=kind,
            metric_list=[dict(metric=metric) for metric in metrics.split()],
        )

    quiz = task(
        "quiz",
        "multiple_choice",
        "acc acc_norm acc_bytes",
        doc_to_text="query",
        doc_to_target="gold",
        doc_to_choice="choices",
    )
    following = task(
        "following",
        "loglikelihood",
        "acc perplexity",
        doc_to_text="context",
        doc_to_target="completion",
    )
    pairs = task(
        "pairs",
        "multiple_choice",
        "acc",
        doc_to_text="",
        doc_to_target=0,
        target_delimiter="",
        doc_to_choice="{{[sentence_good, sentence_bad]}}",
    )
    return [quiz, following, pairs]


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """lm-evaluation-harness, which reads nothing from the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    why = "pip install 'lm_eval[hf]': {} is not installed"
    harness = pytest.importorskip("lm_eval", reason=why.format("lm_eval"))
    for name in ("torch", "transformers", "lm_eval.models.huggingface"):
        pytest.importorskip(name, reason=why.format(name))
    return harness


SAME = {  # our name: (the harness's task, its metric)
    "task/quiz/acc": ("quiz", "acc"),
    "task/quiz/acc_norm": ("quiz", "acc_norm"),
    "task/quiz/acc_bytes": ("quiz", "acc_bytes"),
    "task/following/exact": ("following", "acc"),
    "blimp/pairs": ("pairs", "acc"),
}


@pytest.mark.study
def test_the_harness_gives_the_exported_model_the_same_scores(
        tmp_path, harness, tiny, data_config, corpus, pieces):
    """On local files: choices, completions and pairs, some longer than the model's rows."""
    tokenizer = tmp_path / "pieces.model"
    disk.write(tokenizer, pieces.model)
    config = train.Config(
        name="tasked",
        runs=str(tmp_path),
        model=train.replace(tiny, vocab=pieces.vocab),
        data=train.replace(data_config, tokenizer=str(tokenizer), dev=0, test=0),
        phases=(train.Phase(steps=30, batch=8, seq=64),),
        overlap=8,
        schedule=Schedule(peak=1e-2),
        prompts=(),
    )
    train.train(config, __file__)
    run, exported = str(tmp_path / "tasked"), str(tmp_path / "exported")
    assert train.main(["export", run, exported]) == 0

    paths = {}
    for name, rows in Planted(corpus).files().items():
        paths[name] = write(tmp_path / f"{name}.jsonl", rows)
    pairs = tmp_path / "blimp"
    pairs.mkdir()
    shutil.copy(paths["pairs"], pairs)
    line = ["eval", run, "--blimp", str(pairs), "--tasks", paths["quiz"], paths["following"]]
    assert train.main(line) == 0
    ours = read_json(tmp_path / "tasked/eval.json")

    loaded = dict(pretrained=exported, dtype="float32")
    asked = harness_tasks(paths)
    theirs = harness.simple_evaluate("hf", loaded, batch_size=8, device="cpu", tasks=asked)
    results = theirs["results"]

    for name, (task, metric) in SAME.items():
        score = results[task][f"{metric},none"]
        error = results[task][f"{metric}_stderr,none"]
        assert ours[name] == pytest.approx(score, abs=1e-12), name
        assert ours[f"{name}_se"] == pytest.approx(error, abs=1e-9)
    perplexity = results["following"]["perplexity,none"]
    assert ours["task/following/perplexity"] == pytest.approx(perplexity, rel=1e-4)
    accuracies = {ours[f"task/quiz/{name}"] for name in ("acc", "acc_norm", "acc_bytes")}
    assert len(accuracies) > 1
