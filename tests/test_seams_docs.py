"""docs/extending.md, the section on a model of one's own: each example makes a step."""
import json
import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from conftest import rows as random_rows

import model
import train
from lib.config import ROOT, from_json, to_json
from lib.kernels import Mask
from lib.optim import state_like
from lib.sharding import MeshConfig, make_mesh
from lib.tokenizers import Bytes

GUIDE = (ROOT / "docs/extending.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"(?ms)^#### (.*?)$.*?^```python\n(.*?)^```", GUIDE))


@pytest.fixture(scope="module")
def one():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_there_is_an_example_for_every_field_of_the_table():
    listed = re.findall(r"(?m)^\| `(ModelConfig\.\w+)` \| ", GUIDE)
    shown = [point for name in EXAMPLES for point in re.findall(r"`(ModelConfig\.\w+)`", name)]
    assert sorted(listed) == sorted(shown) and len(EXAMPLES) == 5


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_makes_a_step(name, tmp_path, one):
    """Its steps, of each phase and after its edits, are traced; its evals run."""
    file = tmp_path / f"{''.join(filter(str.isalpha, name))}.py"
    file.write_text(EXAMPLES[name])
    config = train.load_config(str(file))
    train.check(config)
    written = json.loads(json.dumps(to_json(config)))
    assert json.loads(json.dumps(to_json(from_json(train.Config, written)))) == written
    changed = [field for field in ("rows", "forward", "outputs", "flops")
               if getattr(config.model, field) != getattr(model.ModelConfig(), field)]
    assert changed == [field for field in ("rows", "forward", "outputs", "flops")
                       if f"`ModelConfig.{field}`" in name]
    shape = replace(config.model, layers=2, vocab=258, unroll=1)
    context = model.Context(jax.random.key(0), 0, Bytes(), None, None)
    batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in random_rows().items()}
    for phase in config.phases:
        for edit in phase.edits:
            shape = train.make_plan(
                replace(config, model=shape, phases=(replace(phase, edits=(edit,)),)), context).models[0]
        state = state_like(shape, config.optimizer, one)
        lr = {group: np.float32(0) for group in model.groups(shape)}
        step = partial(train.make_step(config, shape, phase), mask=Mask("causal", 0))
        after, metrics = jax.eval_shape(step, state, batch, lr)
        assert after.params.keys() == model.table(shape).keys()
        assert metrics["train/loss"].shape == () and shape.flops(shape, 32) > 0
    own = replace(config, model=shape)
    for evaluate in config.evals:
        found = evaluate(model.init(shape, jax.random.key(0)), None, Bytes(), own)
        assert len(found) == shape.layers and all(np.isfinite(x) for x in found.values())
