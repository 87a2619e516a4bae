"""`corpus bench`: packings compared, batches and tokenizing timed."""
import json

import train

CORPUS = """from functools import partial

from data import DataConfig, Source, text
from model import ModelConfig
from train import Config, Phase

config = Config(model=ModelConfig(vocab=320), overlap=0, phases=(Phase(steps=9, batch=2, seq=64),),
                data=DataConfig(sources={"text": Source(partial(text, path="PLACE"))}, dev=0.1, test=0.1))
"""


def test_corpus_bench_compares_the_packings_and_times_batches_and_tokenizing(tmp_path, corpus, capsys):
    (tmp_path / "some.py").write_text(CORPUS.replace("PLACE", str(corpus)))
    train.verb("corpus", ["bench", str(tmp_path / "some.py"), "--seconds", "0.2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain, best = (found["packings"][name] for name in ("concat_and_split", "best_fit"))
    assert plain["rows"] == plain["ideal"] == best["ideal"] <= best["rows"]
    assert plain["cut"] > best["cut"] and plain["cut_fitting"] > 0 == best["cut_fitting"]
    assert found["packings"]["first_fit"]["rows"] >= plain["rows"] and best["rows_s"] >= best["plan_s"] > 0
    assert found["batch"]["tokens_per_s"] > 0 and found["tokenizing"]["share"] > 0
