"""`corpus bench`: packings compared, batches and tokenizing timed."""
import json

import train

CORPUS = """from functools import partial

from data import DataConfig, Source, text
from model import ModelConfig
from train import Config, Phase

data = DataConfig(
    sources={"text": Source(partial(text, path="PLACE"))},
    dev=0.1,
    test=0.1,
)
config = Config(
    model=ModelConfig(vocab=320),
    overlap=0,
    phases=(Phase(steps=9, batch=2, seq=64),),
    data=data,
)
"""


def test_corpus_bench_compares_packings_and_times_batches_and_tokenizing(tmp_path, corpus, capsys):
    file = tmp_path / "some.py"
    file.write_text(CORPUS.replace("PLACE", str(corpus)))

    train.verb("corpus", ["bench", str(file), "--seconds", "0.2"])

    last_line = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(last_line)
    packings = found["packings"]
    plain = packings["concat_and_split"]
    best = packings["best_fit"]
    first = packings["first_fit"]

    assert plain["rows"] == plain["ideal"] == best["ideal"]
    assert best["rows"] >= best["ideal"]
    assert first["rows"] >= plain["rows"]
    assert plain["cut"] > best["cut"]
    assert plain["cut_fitting"] > 0
    assert best["cut_fitting"] == 0
    assert best["rows_s"] >= best["plan_s"] > 0
    assert found["batch"]["tokens_per_s"] > 0
    assert found["tokenizing"]["share"] > 0
