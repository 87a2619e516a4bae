"""Held-out figures: the test split, gzip and xz, and a run that is validated as nanoGPT's are."""
import gzip
import lzma
import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import prose
from test_tasks import BYTES, bigram, counted, read_json, read_lines, table

import model
import train
from lib import evaluate
from lib.config import ROOT, load_file
from lib.evaluate import compressed
from lib.sharding import MeshConfig, make_mesh

# ----------------------------------------------------------------------------------- the test split


@pytest.fixture
def setting(data_config):
    """A config whose own evals cannot be run: the file that they write to has no directory."""
    not_run = partial(counted, path="/nowhere/at/all")
    phases = (train.Phase(batch=3, seq=64),)
    return train.Config(data=data_config, phases=phases, overlap=8, evals=(not_run,))


def one_byte_each(arrays):
    """Losses of a model that is certain of nothing: 8 bits a position."""
    return np.full(arrays["tokens"].shape, 8 * math.log(2))


def figures_of(losses, caches, config) -> dict:
    """The figures of the test split of caches."""
    return evaluate.test_figures(losses, caches, config, BYTES, make_mesh(MeshConfig()))


def cells(out: str) -> list[list[str]]:
    """The rows of a table that is printed, whose columns stand two or more spaces apart."""
    return [re.split("  +", line) for line in out.splitlines()]


def test_the_end_of_a_run_measures_and_prints_the_test_split_alone(cache, corpus, setting, capsys):
    """Beside its bytes a document has an end to predict."""
    found = figures_of(one_byte_each, {"corpus": cache}, setting)
    out = capsys.readouterr().out

    texts = [(corpus / path).read_bytes() for path in found["held_out_paths"]]
    sizes = np.array([len(text) for text in texts])
    bpb = 8 * (sizes + 1).sum() / sizes.sum()
    assert found["eval/corpus.test/bpb"] == pytest.approx(bpb)
    for name, bits in compressed(texts).items():
        assert found[name] == bits

    half = 1.96 * found["eval/corpus.test/bpb_se"]
    loss = f"{found['eval/corpus.test/loss']:.3f}"
    shown = {name: f"{found[name]:.3f}" for name in compressed(texts)}
    alone, together = "each document alone", "all as one text"
    assert cells(out) == [
        ["", "documents", "bytes", "bits per byte", "nats per token"],
        ["held-out corpus", str(len(texts)), f"{sizes.sum():,}", f"{bpb:.3f} ± {half:.3f}", loss],
        [f"gzip -9 of the same, {alone}", shown["gzip_bpb"]],
        [f"xz -9 of the same, {alone}", shown["xz_bpb"]],
        [f"gzip -9 of the same, {together}", shown["gzip_together_bpb"]],
        [f"xz -9 of the same, {together}", shown["xz_together_bpb"]],
        ["± is half a 95 % interval"],
    ]


def test_without_held_out_documents_there_are_no_figures(setting):
    """Then no losses are asked for."""
    assert figures_of(None, {}, setting) == {}


def test_what_is_not_finite_is_null_in_eval_json(tmp_path):
    evaluate.write_figures(tmp_path, {"a": math.nan, "b": 1, "c": math.inf, "d": 0.5, "e": ["x"]})
    wrote = read_json(tmp_path / "eval.json")
    assert wrote == {"a": None, "b": 1, "c": None, "d": 0.5, "e": ["x"]}


# -------------------------------------------------------------------------------------- compressors


@pytest.mark.parametrize("name, compress", [
    ("gzip", partial(gzip.compress, compresslevel=9)),
    ("xz", partial(lzma.compress, preset=9)),
], ids=["gzip", "xz"])
def test_texts_are_compressed_as_gzip_9_and_xz_9_compress_them(name, compress):
    texts = [prose(i, size).encode() for i, size in enumerate((1, 40, 4_000, 100_000))]
    size = sum(map(len, texts))

    found = compressed(texts)

    alone = sum(len(compress(text)) for text in texts)
    together = len(compress(b"".join(texts)))
    assert found[f"{name}_bpb"] == 8 * alone / size
    assert found[f"{name}_together_bpb"] == 8 * together / size


def test_documents_that_repeat_each_other_are_smaller_together():
    """Alone, a compressor starts empty on each document and cannot see that it knows it already."""
    found = compressed([prose(1, 2_000).encode()] * 5)
    assert found["gzip_together_bpb"] < found["gzip_bpb"] / 2
    assert found["xz_together_bpb"] < found["xz_bpb"] / 2


# --------------------------------------------------------------- Tiny Shakespeare as nanoGPT has it


@pytest.fixture(scope="module")
def shakespeare():
    """The config file, loaded."""
    return load_file(ROOT / "configs/baselines/shakespeare_char.py")


def arguments(shakespeare, root) -> list[str]:
    """The command line of a small run in `root`, of the text in its input.txt."""
    line = (
        f"{shakespeare.__file__}:adamw --runs {root} "
        f"--data.sources.shakespeare.documents.path {root}/input.txt "
        "--phases.0.steps 4 --phases.0.seq 16 --phases.0.batch 8 "
        "--model.layers 1 --model.embed 16 --model.mlp 16 "
        "--model.heads 2 --model.kv_heads 2 --model.head_dim 8 "
        "--evals.0.windows 300 --sample_tokens 4 --eval_every 2"
    )
    return line.split()


@pytest.fixture(scope="module")
def text() -> str:
    """3,000 characters of six kinds."""
    drawn = np.random.default_rng(0).choice(list("abc d\n"), 3_000)
    return "".join(drawn)


@pytest.fixture(scope="module")
def small_run(shakespeare, text, tmp_path_factory):
    """(config, file, root) of a small run of that text."""
    root = tmp_path_factory.mktemp("shakespeare")
    (root / "input.txt").write_text(text)
    config, file = train.parse(arguments(shakespeare, root))
    return config, file, root


def test_the_shakespeare_config_has_nanogpt_s_size(shakespeare):
    """A GPT-2 without biases, whose head is tied."""
    matrices = 12 * 128**2
    gains = 2 * 128
    embeddings = 65 * 128
    positions = 64 * 128
    last_gain = 128
    size = 4 * (matrices + gains) + embeddings + positions + last_gain
    assert model.count(shakespeare.config.model) == pytest.approx(size, rel=0.02)


def test_shakespeare_is_two_documents_of_which_the_first_has_nine_tenths(small_run, text):
    config, _, _ = small_run
    begin, rest = config.data.sources["shakespeare"].documents()
    assert begin.text == text[:2_700]
    assert rest.text == text[2_700:]


def test_shakespeare_is_validated_on_rows_from_random_starts_in_the_rest(
    shakespeare, small_run, text
):
    """`whole` is of rows end to end."""
    config, _, _ = small_run
    params = table(5)
    wide = params.astype(np.float64)
    rest = text[2_700:].encode()
    ids = list(rest)
    pairs = zip(ids[:-1], ids[1:], strict=True)
    each = np.array([np.log(np.exp(wide[a]).sum()) - wide[a, b] for a, b in pairs])
    rows = np.array([each[i:i + 16].mean() for i in range(len(ids) - 16)])

    def held_out(source, split):
        assert (source, split) == ("shakespeare", "test")
        return SimpleNamespace(texts=lambda: [rest])

    found = shakespeare.validation(params, bigram, config, held_out)

    assert found["eval/whole/loss"] == pytest.approx(rows[::16].mean(), rel=1e-5)
    loss, error = found["eval/validation/loss"], found["eval/validation/loss_se"]
    assert abs(loss - rows.mean()) < 4 * error < 0.2
    assert error == pytest.approx(rows.std() / 2_000**0.5, rel=0.1)


def test_a_run_ends_with_its_validation_the_held_out_rest_and_a_sample(shakespeare, small_run):
    config, file, root = small_run

    summary = train.train(config, file)

    directory = root / "shakespeare_char-adamw"
    metrics = read_lines(directory / "metrics.jsonl")
    validated = [row["step"] for row in metrics if "eval/validation/loss" in row]
    assert validated == [2, 4]
    last = shakespeare.last(metrics)
    assert summary["eval/validation/loss"] == pytest.approx(last, rel=1e-5)
    assert summary["held_out_paths"] == ["rest"]
    assert summary["eval/shakespeare.test/bpb"] > 0
    assert (directory / "samples.txt").read_text().startswith("ROMEO")


def test_a_shakespeare_that_is_not_ascii_is_refused(shakespeare, tmp_path, capsys):
    (tmp_path / "input.txt").write_text("é" * 99)
    assert train.main(arguments(shakespeare, tmp_path)) == 2
    assert "ASCII" in capsys.readouterr().err
