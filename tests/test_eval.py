"""tools/eval.py beyond bits per byte: minimal pairs, multiple choice, completions, and where they come up."""
import gzip
import json
import lzma
import math
import shutil
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import prose
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import model
import train
from lib import disk
from lib.config import ROOT, from_json, load_file, to_json
from lib.evaluate import compressed
from lib.schedule import Schedule
from lib.tasks import blimp, encode_pair, judged, minimal_pairs, proportion, tasks
from lib.tokenizers import Bytes
from train import parse

evaluate = load_file(ROOT / "tools/eval.py")
BYTES = Bytes()
CONFIG = train.Config(phases=(train.Phase(seq=64),))


def bigram(params, ids):
    """Logits [b t v] of a model that looks at one piece alone: params [v v]."""
    return jnp.asarray(params)[np.asarray(ids)]


def table(seed: int = 0) -> np.ndarray:
    """Logits of the next byte after each."""
    return np.random.default_rng(seed).normal(0, 2, (258, 258)).astype(np.float32)


def nats(params: np.ndarray, before: list[int], rest: list[int]) -> float:
    """What `bigram` needs for `rest` after `before`, a piece at a time."""
    whole, wide = [*before, *rest], params.astype(np.float64)
    return sum(np.log(np.exp(wide[a]).sum()) - wide[a, b] for a, b in
               zip(whole[len(before) - 1:-1], rest, strict=True))


def write(path, rows) -> str:
    """A JSON Lines file; a row that is text stands there as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return str(path)


@given(st.lists(st.tuples(st.binary(max_size=90), st.binary(min_size=1, max_size=150)), min_size=1,
                max_size=9))
@settings(max_examples=12)
def test_continuations_of_any_length_are_judged_as_one_piece_at_a_time(rows):
    pairs = [([BYTES.bos, *before], list(rest)) for before, rest in rows]
    params = table()
    found, greedy = judged(params, bigram, BYTES, pairs, 0)
    assert found == pytest.approx([nats(params, *pair) for pair in pairs], rel=1e-5)
    assert greedy.tolist() == [all(params[a].argmax() == b for a, b in zip(
        [before[-1], *rest[:-1]], rest, strict=True)) for before, rest in pairs]


def test_few_shapes_reach_the_model_and_contexts_are_cut_on_the_left():
    """Widths are powers of two, the continuation is never cut, and padding stands on the right."""
    seen = set()

    def apply(params, ids):
        seen.add(ids.shape)
        firsts.extend(ids[:, 0].tolist())
        return bigram(params, ids)

    firsts, rest = [], [7] * 5
    pairs = [([256, *range(n)], rest) for n in range(3, 250)]
    cut, _ = judged(table(), apply, BYTES, pairs, 32)
    assert seen == {(16, 16), (64, 32)} and max(f for f in firsts if f < 256) == 249 - 33 + 5
    whole, _ = judged(table(), bigram, BYTES, pairs, 10_000)
    assert cut == pytest.approx(whole, rel=1e-5)  # a bigram does not miss what was cut
    long, _ = judged(table(), bigram, BYTES, [([256, 1, 2], [7] * 100)], 32)
    assert long[0] == pytest.approx(nats(table(), [256, 1, 2], [7] * 100), rel=1e-5)


def test_the_boundary_is_where_the_context_s_own_pieces_end(pieces):
    """The context's last spaces go to what follows; the pieces of all of it are cut, not spelt anew."""
    for context, rest in (("the tree is", " cut back"), ("the tree is ", "cut"), ("the\n\n", "tree"),
                          ("", " the tree"), ("  ", "roots"), ("été 樹", "木 grows")):
        before, after = encode_pair(pieces, context, rest)
        assert before == [pieces.bos, *pieces.encode(context.rstrip())]
        assert after == pieces.encode(context + rest)[len(before) - 1:]
    assert encode_pair(BYTES, "a ", "b") == ([256, 97], [32, 98])
    joined = pieces.encode("the tree")  # a piece may lie across the boundary
    assert encode_pair(pieces, "the tr", "ee")[1] == joined[len(pieces.encode("the tr")):]


def choices(seed: int, n: int) -> list[dict]:
    """Questions with two to five choices of 2 to 13 characters, some beyond ASCII."""
    rng = np.random.default_rng(seed)
    letters = list("abcdefgh é木")
    def word(): return "x" + "".join(rng.choice(letters, rng.integers(0, 12)))
    rows = [dict(query=word(), choices=[c + word() for c in "abcde"[:rng.integers(2, 6)]]) for _ in range(n)]
    return [r | dict(gold=int(rng.integers(len(r["choices"])))) for r in rows]


def test_multiple_choice_by_sums_by_characters_and_by_bytes(tmp_path):
    rows, params = choices(0, 40), table(1)
    path = write(tmp_path / "quiz.jsonl", rows)
    found = tasks(params, bigram, BYTES, CONFIG, path=path)
    heads = [r["query"].rstrip() for r in rows]  # what stands behind goes to the choices
    scores = [[-nats(params, [256, *head.encode()], list(f"{r['query'][len(head):]} {c}".encode()))
               for c in r["choices"]] for r, head in zip(rows, heads, strict=True)]
    for name, size in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
        right = [np.argmax([s / size(c) for s, c in zip(each, r["choices"], strict=True)]) == r["gold"]
                 for each, r in zip(scores, rows, strict=True)]
        assert found[f"task/quiz/{name}"] == np.mean(right)
        assert found[f"task/quiz/{name}_se"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(40))
    assert len({found[f"task/quiz/{name}"] for name in ("acc", "acc_norm", "acc_bytes")}) > 1
    renamed = [dict(prompt=r["query"] + " ", choices=r["choices"], answer=r["choices"][r["gold"]])
               for r in rows]
    again = tasks(params, bigram, BYTES, CONFIG, path=write(tmp_path / "quiz.jsonl", renamed),
                           delimiter="")
    assert all(again[k] == pytest.approx(v) for k, v in found.items())


def test_completions_by_likelihood_and_by_taking_the_likeliest(tmp_path):
    params = table(2)
    likely = [dict(context=c, completion=bytes([params[ord(c), :128].argmax()]).decode()) for c in "abcd"]
    params[:, 128:] = -30
    found = tasks(params, bigram, BYTES, CONFIG, path=write(tmp_path / "next.jsonl", likely))
    assert found["task/next/exact"] == 1.0
    rows = [*likely, dict(prompt="ab", completion=" one two"), dict(context="", completion="é")]
    found = tasks(params, bigram, BYTES, CONFIG, path=write(tmp_path / "next.jsonl", rows))
    each = np.array([nats(params, [256, *(r.get("context", "ab")).encode()], list(r["completion"].encode()))
                     for r in rows])
    size = np.array([len(r["completion"].encode()) for r in rows])
    assert found["task/next/exact"] == pytest.approx(4 / 6)
    assert found["task/next/loglikelihood"] == pytest.approx(-each.mean(), rel=1e-5)
    assert found["task/next/perplexity"] == pytest.approx(math.exp(each.mean()), rel=1e-4)
    assert found["task/next/bpb"] == pytest.approx(each.sum() / math.log(2) / size.sum(), rel=1e-5)
    alone = tasks(params, bigram, BYTES, CONFIG, path=write(tmp_path / "one.jsonl", rows[-2:-1]))
    assert math.isnan(alone["task/one/bpb_se"]) and math.isnan(alone["task/one/exact_se"])


def test_minimal_pairs_of_one_model_by_paradigm_and_together(tmp_path):
    """Wilson's intervals against values worked out by hand; the mean of one paradigm has that paradigm's."""
    params = table(3)
    pairs = [dict(sentence_good=f"{a}b" * n, sentence_bad=f"{b}a" * n) for a in "cdefg" for b in "hijk"
             for n in (1, 30)]
    right = [nats(params, [256], list(p["sentence_good"].encode()))
             < nats(params, [256], list(p["sentence_bad"].encode())) for p in pairs]
    write(tmp_path / "first.jsonl", pairs)
    alone = minimal_pairs(params, bigram, BYTES, tmp_path)
    assert alone["blimp/first"] == alone["blimp"] == alone["blimp_pairs"] == np.mean(right)
    assert all(alone[f"blimp{end}"] == pytest.approx(alone[f"blimp/first{end}"]) for end in ("_low", "_high"))
    write(tmp_path / "second.jsonl", [p for p, good in zip(pairs, right, strict=True) if good][:10])
    both = minimal_pairs(params, bigram, BYTES, str(tmp_path))
    assert both["blimp/second"] == 1.0 and both["blimp"] == (1 + np.mean(right)) / 2
    assert both["blimp_pairs"] == (10 + np.sum(right)) / 50
    assert both["blimp/second_low"] == pytest.approx(1 - 1.96**2 / (10 + 1.96**2))  # Wilson at 10 of 10
    assert both["blimp/second_high"] == pytest.approx(1)
    assert both["blimp_low"] < both["blimp"] < both["blimp_high"] < 1
    assert blimp(params, bigram, BYTES, tmp_path) == {k: both[k] for k in ("blimp", "blimp_se")}


def test_wilson_s_interval_holds_the_share_as_often_as_it_says():
    """Over the binomial distribution, exactly: 93 to 97 % at each of these."""
    for p, n in ((0.5, 40), (0.2, 67), (0.7, 200)):
        inside = 0.0
        for k in range(n + 1):
            found = proportion("x", np.arange(n) < k)
            inside += math.comb(n, k) * p**k * (1 - p)**(n - k) * (found["x_low"] <= p <= found["x_high"])
        assert 0.93 < inside < 0.97


BROKEN = {
    '{"context": "a", ': "line 2: broken JSON",
    '["context"]': "line 2: .* is no JSON object",
    '{"context": "a", "choices": ["b"], "answer": 0}': "line 2: choices is .* two texts",
    '{"context": "a", "choices": ["b", ""], "answer": 0}': "line 2, choice 1: .* not empty",
    '{"context": "a", "choices": ["b", 3], "answer": 0}': "line 2, choice 1: .* is 3",
    '{"context": "a", "choices": ["b", "c"], "answer": 2}': "line 2: answer .* is 2; .* 0 to 1",
    '{"context": "a", "choices": ["b", "c"], "answer": true}': "line 2: answer .* is True",
    '{"context": "a", "choices": ["b", "c"]}': "line 2: answer .* is None",
    '{"choices": ["b", "c"], "answer": 0}': "line 2: context or query or prompt is None",
    '{"context": "a", "completion": "b"}': "line 2: choices and completions are in one file",
    '{"context": "a\\ud800", "choices": ["b", "c"], "answer": 0}': "line 2: context .* allowed is a text",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_is_no_task_is_named(line, tmp_path):
    good = dict(context="a", choices=["b", "c"], answer=1)
    with pytest.raises(data.InputError, match=BROKEN[line]) as error:
        tasks(table(), bigram, BYTES, CONFIG, path=write(tmp_path / "quiz.jsonl", [good, line]))
    assert str(error.value).startswith(str(tmp_path / "quiz.jsonl"))


@pytest.mark.parametrize("line, said", [
    ('{"sentence_good": "a"}', "line 2: sentence_bad is None"),
    ('{"sentence_good": "a", "sentence_bad": ""}', "line 2: sentence_bad is ''"),
    ('{"sentence_good": ["a"], "sentence_bad": "b"}', "line 2: sentence_good is"),
    ("{", "line 2: broken JSON"),
])
def test_a_line_that_is_no_pair_is_named(line, said, tmp_path):
    write(tmp_path / "pairs.jsonl", [dict(sentence_good="a", sentence_bad="b"), line])
    with pytest.raises(data.InputError, match=f"pairs.jsonl, {said}"):
        minimal_pairs(table(), bigram, BYTES, tmp_path)
    with pytest.raises(data.InputError, match="no directory of .jsonl"):
        minimal_pairs(table(), bigram, BYTES, tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ in a run

def noted(params, apply, config, word: str = "x"):
    """An `evals` that asks for the config, and gives what the rows of its `apply` say, seven at a time."""
    ids = np.arange(7 * 9).reshape(7, 9)
    out = apply(params, ids)
    alone = model.apply(params, jnp.asarray(ids), config.model)
    return {f"own/{word}": float(config.phases[0].steps), "own/apart": float(jnp.abs(out - alone).max())}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, data_config):
    """A run on eight devices that asks for tasks and pairs as it trains, without dev or test; its metrics."""
    here = tmp_path_factory.mktemp("tasks")
    write(here / "quiz.jsonl", choices(0, 12))
    write(here / "next.jsonl", [dict(context="the", completion=" tree"), dict(context="", completion="the")])
    (here / "pairs").mkdir()
    write(here / "pairs/some.jsonl", [dict(sentence_good="the tree", sentence_bad="\x01\x02\x03\x04ZQZ")] * 5)
    config = train.Config(
        name="tasked", runs=str(here / "runs"), model=train.replace(tiny, layers=1),
        data=train.replace(data_config, dev=0, test=0), phases=(train.Phase(steps=6, batch=8, seq=32),),
        overlap=8, eval_every=3, save_every=3, keep=2,
        evals=(partial(tasks, path=str(here / "quiz.jsonl")), partial(noted, word="steps"),
               partial(blimp, path=str(here / "pairs"))), sample_tokens=4)
    train.check(config)
    assert from_json(train.Config, to_json(config)).evals[0].func is tasks
    summary = train.train(config, __file__)
    rows = [json.loads(line) for line in (here / "runs/tasked/metrics.jsonl").read_text().splitlines()]
    return here, summary, rows


def test_tasks_come_up_while_a_run_trains_and_at_its_end(run):
    here, summary, rows = run
    found = [r for r in rows if "task/quiz/acc" in r]
    assert [r["step"] for r in found] == [3, 6] and all("train/loss" not in r for r in found)
    assert all(0 <= r["task/quiz/acc_norm"] <= 1 and 0 <= r["blimp"] <= 1 for r in found)
    assert all(r["own/steps"] == 6 and r["own/apart"] < 1e-4 for r in found)
    wrote = json.loads((here / "runs/tasked/eval.json").read_text())
    same = {k: v for k, v in found[-1].items() if k.startswith(("task/", "blimp"))}
    assert same and all(wrote[k] == pytest.approx(v) and summary[k] == wrote[k] for k, v in same.items())
    for file in ("samples.txt", "curves.png", "summary.json"):
        assert (here / "runs/tasked" / file).stat().st_size > 0
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4, 5, 6]


def test_the_command_line_adds_tasks_and_pairs_to_eval_json(run, capsys):
    here, _, _ = run
    directory = str(here / "runs/tasked")
    assert train.main(["eval", directory, "--step", "3", "--tasks", str(here / "next.jsonl"), "--blimp",
                       str(here / "pairs"), "--tasks", str(here / "quiz.jsonl")]) == 0
    found, said = json.loads((here / "runs/tasked/eval.json").read_text()), capsys.readouterr().out
    assert 0 <= found["task/next/exact"] <= 1 and found["task/next/bpb"] > 0 and found["blimp/some"] in (0, 1)
    assert found["own/steps"] == 6 and "task/quiz/acc_bytes_se" in found
    assert f"task/next/bpb: {found['task/next/bpb']:.4g} +- " in said
    assert f"blimp/some: {found['blimp/some']:.3f} [{found['blimp/some_low']:.3f}, " in said
    rows = [json.loads(r) for r in (here / "runs/tasked/metrics.jsonl").read_text().splitlines()]
    at = next(r for r in rows if r["step"] == 3 and "blimp" in r)
    assert found["blimp"] == at["blimp"] and found["task/quiz/acc"] == at["task/quiz/acc"]
    # sharded over eight devices or on one, and by what a notebook has, the same figures
    params, config, tokenizer, apply = train.load(directory, 3)
    alone = tasks(params, apply, tokenizer, config, path=str(here / "next.jsonl"))
    assert all(found[k] == pytest.approx(v, rel=1e-4) for k, v in alone.items())


def test_mistakes_on_the_command_line_are_one_sentence(run, tmp_path, capsys):
    here, _, _ = run
    shutil.copy(here / "quiz.jsonl", tmp_path / "quiz.jsonl")
    write(tmp_path / "broken.jsonl", ["{"])
    for more, said in ((["--tasks", tmp_path / "broken.jsonl"], "broken.jsonl, line 1: broken JSON"),
                       (["--tasks", here / "quiz.jsonl", tmp_path / "quiz.jsonl"], "names that differ"),
                       (["--tasks", tmp_path / "none"], "none"), (["--blimp", tmp_path / "none"], "none")):
        assert train.main(["eval", str(here / "runs/tasked"), *map(str, more)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_texts_are_compressed_as_gzip_9_and_xz_9_compress_them():
    texts = [prose(i, size).encode() for i, size in enumerate((1, 40, 4_000, 100_000))]
    for name, compress in (("gzip_bpb", partial(gzip.compress, compresslevel=9)),
                           ("xz_bpb", partial(lzma.compress, preset=9))):
        bits = 8 * sum(len(compress(text)) for text in texts)
        assert compressed(texts)[name] == bits / sum(map(len, texts))


# ------------------------------------------------------------------------------------------- tiny Shakespeare

def test_tiny_shakespeare_is_validated_as_nanogpt_does_it(tmp_path, capsys):
    """At its size, on the rest of the text; a run without dev and test ends with its figures and a sample."""
    shakespeare = load_file(ROOT / "configs/baselines/shakespeare_char.py")
    size = 4 * (12 * 128**2 + 2 * 128) + 65 * 128 + 64 * 128 + 128  # of a GPT-2 without biases, head tied
    assert model.count(shakespeare.config.model) == pytest.approx(size, rel=0.02)
    text = "".join(np.random.default_rng(0).choice(list("abc d\n"), 3_000))
    (tmp_path / "input.txt").write_text(text)
    line = (f"{shakespeare.__file__}:adamw --runs {tmp_path} --phases.0.steps 4 --phases.0.seq 16 "
            "--phases.0.batch 8 --model.layers 1 --model.embed 16 --model.mlp 16 --model.heads 2 "
            "--model.kv_heads 2 --model.head_dim 8 --evals.0.windows 300 --sample_tokens 4 --eval_every 2 "
            f"--data.sources.shakespeare.documents.path {tmp_path}/input.txt")
    config, file = parse(line.split())
    assert "".join(d.text for d in config.data.sources["shakespeare"].documents()) == text[:2_700]
    params = table(5)
    found = shakespeare.validation(params, bigram, config)
    ids, wide = list(text[2_700:].encode()), params.astype(np.float64)
    each = np.array([np.log(np.exp(wide[a]).sum()) - wide[a, b] for a, b in zip(ids, ids[1:], strict=False)])
    rows = np.array([each[i:i + 16].mean() for i in range(len(ids) - 16)])
    assert found["eval/whole/loss"] == pytest.approx(rows[::16].mean(), rel=1e-5)
    assert abs(found["eval/validation/loss"] - rows.mean()) < 4 * found["eval/validation/loss_se"] < 0.2
    assert found["eval/validation/loss_se"] == pytest.approx(rows.std() / 2_000**0.5, rel=0.1)
    summary = train.train(config, file)
    here = tmp_path / "shakespeare_char-adamw"
    metrics = [json.loads(r) for r in (here / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in metrics if "eval/validation/loss" in r] == [2, 4]
    assert summary["eval/validation/loss"] == pytest.approx(shakespeare.last(metrics), rel=1e-5)
    assert (here / "samples.txt").read_text().startswith("ROMEO")
    (tmp_path / "input.txt").write_text("é" * 99)
    assert train.main(line.split()) == 2 and "ASCII" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- the real harness, by hand

@pytest.mark.study
def test_the_harness_gives_the_exported_model_the_same_scores(tmp_path, tiny, data_config, corpus, pieces,
                                                              monkeypatch):
    """lm-evaluation-harness on local files: choices, completions and pairs, some beyond the model's rows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    why = "pip install 'lm_eval[hf]': {} is not installed"
    harness = pytest.importorskip("lm_eval", reason=why.format("lm_eval"))
    for name in ("torch", "transformers", "lm_eval.models.huggingface"):
        pytest.importorskip(name, reason=why.format(name))
    disk.write(tmp_path / "pieces.model", pieces.model)
    config = train.Config(
        name="tasked", runs=str(tmp_path), model=train.replace(tiny, vocab=pieces.vocab),
        data=train.replace(data_config, tokenizer=str(tmp_path / "pieces.model"), dev=0, test=0),
        phases=(train.Phase(steps=30, batch=8, seq=64),), overlap=8, schedule=Schedule(peak=1e-2),
        prompts=())
    train.train(config, __file__)
    assert train.main(["export", str(tmp_path / "tasked"), str(tmp_path / "exported")]) == 0

    text = "\n".join(p.read_text("utf-8") for p in sorted(corpus.rglob("*.txt")))
    rng = np.random.default_rng(0)
    def cut(size): return text[(at := int(rng.integers(len(text) - size))):at + size]
    quiz = [dict(query=cut(int(rng.integers(0, 50))), gold=int(rng.integers(3)),
                 choices=[cut(int(rng.integers(1, 20))) + "." for _ in range(3)]) for _ in range(60)]
    quiz += [dict(query=cut(400) + tail, gold=0, choices=["tree", "self"]) for tail in ("", " ", "\n\n")]
    following = [cut(int(rng.integers(30, 90))) for _ in range(40)]  # cut within words too
    following = [dict(context=t[:-15], completion=t[-15:]) for t in following]
    following += [dict(context=p, completion=c) for p, c in (("the", " tree"), ("roots", " stay"))]
    pairs = [dict(sentence_good=cut(20), sentence_bad=cut(20)) for _ in range(40)]
    files = dict(quiz=quiz, following=following, pairs=pairs)
    paths = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    (tmp_path / "blimp").mkdir()
    shutil.copy(paths["pairs"], tmp_path / "blimp")
    assert train.main(["eval", str(tmp_path / "tasked"), "--blimp", str(tmp_path / "blimp"), "--tasks",
                       paths["quiz"], paths["following"]]) == 0
    ours = json.loads((tmp_path / "tasked/eval.json").read_text())

    def task(name: str, kind: str, metrics: str, **how) -> dict:
        return how | dict(
            task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=paths[name])),
            test_split="test", output_type=kind, metric_list=[dict(metric=m) for m in metrics.split()])

    asked = [task("quiz", "multiple_choice", "acc acc_norm acc_bytes", doc_to_text="query",
                  doc_to_target="gold", doc_to_choice="choices"),
             task("following", "loglikelihood", "acc perplexity", doc_to_text="context",
                  doc_to_target="completion"),
             task("pairs", "multiple_choice", "acc", doc_to_text="", doc_to_target=0, target_delimiter="",
                  doc_to_choice="{{[sentence_good, sentence_bad]}}")]
    loaded = dict(pretrained=str(tmp_path / "exported"), dtype="float32")
    found = harness.simple_evaluate("hf", loaded, batch_size=8, device="cpu", tasks=asked)["results"]
    for here, there in (("task/quiz/acc", "quiz acc"), ("task/quiz/acc_norm", "quiz acc_norm"),
                        ("task/quiz/acc_bytes", "quiz acc_bytes"), ("task/following/exact", "following acc"),
                        ("blimp/pairs", "pairs acc")):
        name, metric = there.split()
        assert ours[here] == pytest.approx(found[name][f"{metric},none"], abs=1e-12), here
        assert ours[f"{here}_se"] == pytest.approx(found[name][f"{metric}_stderr,none"], abs=1e-9)
    assert ours["task/following/perplexity"] == pytest.approx(found["following"]["perplexity,none"], rel=1e-4)
    assert len({v for k, v in ours.items() if k.startswith("task/quiz/acc") and not k.endswith("_se")}) > 1
