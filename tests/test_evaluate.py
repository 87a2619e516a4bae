"""Held-out figures: the test split, gzip and xz, and a run that is validated as nanoGPT's are."""
import gzip
import json
import lzma
import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import prose
from test_tasks import BYTES, bigram, counted, table

import model
import train
from lib import evaluate
from lib.config import ROOT, load_file
from lib.evaluate import compressed
from lib.sharding import MeshConfig, make_mesh
from train import parse


def test_the_end_of_a_run_measures_the_test_split_alone(cache, corpus, data_config, capsys):
    """Of a model that is certain of nothing: 8 bits a position; evals are not asked; all is said in print."""
    config = train.Config(data=data_config, phases=(train.Phase(batch=3, seq=64),), overlap=8,
                          evals=(partial(counted, path="/nowhere/at/all"),))
    mesh = make_mesh(MeshConfig())
    found = evaluate.test_figures(lambda arrays: np.full(arrays["tokens"].shape, 8 * math.log(2)),
                                    {"corpus": cache}, config, BYTES, mesh)
    texts = [(corpus / path).read_bytes() for path in found["held_out_paths"]]
    sizes = np.array([len(text) for text in texts])
    bpb = 8 * (sizes + 1).sum() / sizes.sum()
    assert found["eval/corpus.test/bpb"] == pytest.approx(bpb)
    assert {name: found[name] for name in compressed(texts)} == compressed(texts)
    half = 1.96 * found["eval/corpus.test/bpb_se"]
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    loss = f"{found['eval/corpus.test/loss']:.3f}"
    assert lines == [
        ["", "documents", "bytes", "bits per byte", "nats per token"],
        ["held-out corpus", str(len(texts)), f"{sizes.sum():,}", f"{bpb:.3f} ± {half:.3f}", loss],
        *([f"{how} -9 of the same, {of}", f"{found[f'{how}_{key}']:.3f}"]
          for of, key in (("each document alone", "bpb"), ("all as one text", "together_bpb"))
          for how in ("gzip", "xz")),
        ["± is half a 95 % interval"]]
    assert evaluate.test_figures(None, {}, config, BYTES, mesh) == {}


def test_what_is_not_finite_is_null_in_eval_json(tmp_path):
    evaluate.write_figures(tmp_path, {"a": math.nan, "b": 1, "c": math.inf, "d": 0.5, "e": ["x"]})
    wrote = json.loads((tmp_path / "eval.json").read_text())
    assert wrote == {"a": None, "b": 1, "c": None, "d": 0.5, "e": ["x"]}


def test_texts_are_compressed_as_gzip_9_and_xz_9_compress_them():
    texts = [prose(i, size).encode() for i, size in enumerate((1, 40, 4_000, 100_000))]
    for name, compress in (("gzip_bpb", partial(gzip.compress, compresslevel=9)),
                           ("xz_bpb", partial(lzma.compress, preset=9))):
        bits = 8 * sum(len(compress(text)) for text in texts)
        assert compressed(texts)[name] == bits / sum(map(len, texts))
        together = 8 * len(compress(b"".join(texts))) / sum(map(len, texts))
        assert compressed(texts)[name.replace("_", "_together_")] == together


def test_documents_that_repeat_each_other_are_smaller_together():
    """Alone, a compressor starts empty on each document and cannot see that it knows it already."""
    found = compressed([prose(1, 2_000).encode()] * 5)
    assert found["gzip_together_bpb"] < found["gzip_bpb"] / 2
    assert found["xz_together_bpb"] < found["xz_bpb"] / 2


def test_tiny_shakespeare_is_validated_as_nanogpt_does_it(tmp_path, capsys):
    """At its size, on the rest of the text, which is held out as the document that it is."""
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
    begin, rest = config.data.sources["shakespeare"].documents()
    assert (begin.text, rest.text) == (text[:2_700], text[2_700:])
    params = table(5)
    held_out = SimpleNamespace(texts=lambda: [rest.text.encode()])
    found = shakespeare.validation(params, bigram, config, lambda *_: held_out)
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
    assert summary["held_out_paths"] == ["rest"] and summary["eval/shakespeare.test/bpb"] > 0
    assert (here / "samples.txt").read_text().startswith("ROMEO")
    (tmp_path / "input.txt").write_text("é" * 99)
    assert train.main(line.split()) == 2 and "ASCII" in capsys.readouterr().err
