"""configs/selection/model_collapse.py: what a generation reads, and what it samples."""
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import strong
from jax.sharding import NamedSharding, PartitionSpec

import train
from lib.config import ROOT, load_file, to_json
from lib.sharding import MeshConfig, make_mesh
from lib.tokenizers import Bytes

pytestmark = pytest.mark.library
collapse = load_file(ROOT / "configs/selection/model_collapse.py")


def sources_of(config) -> dict:
    """{source: the run that it samples, or what it reads}."""
    keywords = {name: source.documents.keywords for name, source in config.data.sources.items()}
    return {name: words.get("run", words.get("path")) for name, words in keywords.items()}


REAL = {"real": "../shared/data/tinyshakespeare.txt"}


def test_a_generation_that_replaces_reads_the_last_one_alone():
    config = collapse.generation("replace", 4)
    assert sources_of(config) == REAL | {"made3": "needs:replace3_before"}
    assert config.phases[0].mixture == {"real": 0.0, "made3": 1.0}
    assert sources_of(collapse.generation("replace", 2)) == REAL | {"made1": "needs:first"}


def test_each_generation_is_sampled_by_draws_of_its_own_and_has_the_first_one_s_tokenizer():
    for way in ("replace", "accumulate"):
        for number in collapse.GENERATIONS:
            data = collapse.generation(way, number).data
            seeds = {name: source.documents.keywords["seed"]
                     for name, source in data.sources.items() if name != "real"}
            assert seeds == {name: int(name.removeprefix("made")) for name in seeds} != {}
            assert data.tokenizer == "needs:first/tokenizer.model"
    assert collapse.first.data.tokenizer == "bpe"


def test_speeches_are_the_first_short_documents(tmp_path):
    path = tmp_path / "plays.txt"
    path.write_text("\n\n".join(["short", "l" * 300, "also short", "third"]))
    found = collapse.speeches(str(path), number=2, longest=200)
    assert [one.text for one in found] == ["short\n\n", "also short\n\n"]


def test_a_generation_that_accumulates_reads_all_before_it_by_size():
    config = collapse.generation("accumulate", 4)
    assert sources_of(config) == REAL | {"made1": "needs:first", "made2": "needs:accumulate2_before",
                                         "made3": "needs:accumulate3_before"}
    assert config.phases[0].mixture is None


def test_the_chain_of_needed_runs_is_whole_and_equal_to_the_arms():
    study = collapse.study
    assert set(study.needed_by("replace4")) == {"first", "replace2_before", "replace3_before"}
    assert set(study.needed_by("accumulate4")) == {"first", "accumulate2_before", "accumulate3_before"}
    for need, arm in {"replace3_before": "replace3", "first": "real"}.items():
        assert to_json(study.needs[need]) == to_json(study.arms[arm])


def test_a_run_s_samples_are_documents_for_training_by_its_own_draws(tiny, monkeypatch):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(strong(tiny), NamedSharding(mesh, PartitionSpec()))
    config = train.Config(model=replace(tiny, vocab=Bytes().vocab))
    runs = {"it": config, "other": replace(config, seed=1)}
    monkeypatch.setattr(collapse, "load", lambda run: (params, runs[run], Bytes(), None))

    def texts(run="it", **how):
        made = list(collapse.sampled(run, number=5, tokens=6, **how))
        assert [d.path for d in made] == [f"sampled/{i}" for i in range(5)]
        assert {d.split for d in made} == {"train"} and all(len(d.text) <= 6 for d in made)
        return [d.text for d in made]

    first = texts(batch=5)
    assert first == texts(batch=2)  # whatever the batch
    assert first != texts(batch=5, seed=1) and len({*first}) > 1
    assert first != texts("other", batch=5)  # of another seed


def test_the_slope_is_that_of_a_line_through_the_generations():
    figures = {"real": {"bpb": np.array([2.0, 2.2])}}
    for n in (2, 3, 4):
        figures[f"replace{n}"] = {"bpb": np.array([2.0, 2.2]) + 0.1 * (n - 1)}
        figures[f"accumulate{n}"] = {"bpb": np.array([2.1, 2.1])}
    found = collapse.slope(figures)
    assert found["replace"] == pytest.approx(0.1)
    assert found["accumulate"] == pytest.approx(0.0, abs=1e-9)
