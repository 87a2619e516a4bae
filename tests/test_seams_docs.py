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
from data import DataConfig, Source
from lib import seams
from lib.config import ROOT, from_json, to_json
from lib.kernels import Mask
from lib.optim import state_like
from lib.sharding import MeshConfig, make_mesh
from lib.study import Study
from lib.tokenizers import Bytes

GUIDE = (ROOT / "docs/extending.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"(?ms)^#### (.*?)$.*?^```python\n(.*?)^```", GUIDE))
HELD = train.Config, train.Phase, train.Edit, train.Schedule, DataConfig, Source, model.ModelConfig, Study
# Where a function is given that no field of these has the seam of.
BESIDES = {"Param.init": seams.INIT, "Study.measures": seams.MEASURE, "Study.charts": seams.CURVES}
RENAMED = {"Edit.apply": "Phase.repeat"}  # what the page shows in its place


@pytest.fixture(scope="module")
def one():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def seams_in(hint) -> set:
    """The extension points that a field's annotation holds, also within its parts."""
    found = {part for part in getattr(hint, "__metadata__", ()) if isinstance(part, seams.Seam)}
    inner = () if isinstance(hint, type) else getattr(hint, "__args__", ())
    return found.union(*map(seams_in, inner))


def places() -> dict[str, seams.Seam]:
    """{"Class.field": the extension point} of every field that holds a function."""
    found = dict(BESIDES)
    for made in HELD:
        for field, hint in made.__annotations__.items():
            for point in seams_in(hint):
                name = f"{made.__name__}.{field}"
                found[RENAMED.get(name, name)] = point
    return found


def test_the_page_has_every_extension_point_that_the_core_knows_with_its_call():
    """In a table with all that it is given and may ask for, and in the heading or text of code."""
    known = places()
    every = {point for point in vars(seams).values() if isinstance(point, seams.Seam)}
    assert set(known.values()) == every
    rows = re.findall(r"(?m)^\| .*`\w+\.\w+`.* \|$", GUIDE)
    headings = re.findall(r"(?ms)^####? ([^\n]*)\n(?:(?!^#).)*?^```python$", GUIDE)
    code = "".join(re.findall(r"(?ms)^```python\n(.*?)^```", GUIDE))
    for name, point in known.items():
        own = [row for row in rows if f"`{name}`" in row]
        alike = [row for row in rows if any(f"`{other}`" in row for other in known if known[other] == point)]
        assert own, name
        told = {*point.given, *point.asked}
        assert any(told <= set(re.findall(r"\w+", row)) for row in alike), (name, told)
        field = name.removeprefix("Study.")
        shown = any(f"`{name}`" in heading for heading in headings)
        used = rf"(?m)^    {field}=[\[{{].*[:=] ?[a-z_]+[,}}]"
        assert shown or field != name and re.search(used, code), name


def test_there_is_an_example_for_every_field_of_the_table():
    listed = re.findall(r"(?m)^\| `((?:ModelConfig|Param)\.\w+)` \| ", GUIDE)
    shown = [point for name in EXAMPLES for point in re.findall(r"`((?:ModelConfig|Param)\.\w+)`", name)]
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
