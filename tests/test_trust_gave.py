"""What a config's functions give that is not allowed: one sentence names the function and its file."""
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import rows
from data_cases import PLAIN, load

import model
import train
from data import DataConfig, Document, Skipped, Source
from lib import seams
from lib.cache import build
from lib.errors import InputError
from lib.evals import own_evals
from lib.kernels import Mask
from lib.packing import concat_and_split
from lib.schedule import Schedule, make_plan
from lib.tokenizers import Bytes, make_tokenizer
from model import Edited, Model, ModelConfig, Param
from train import Config, Phase

TINY = ModelConfig(layers=2, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=258)
CAUSAL = {"kind": "causal", "window": 0}
VALUE = {}  # what the functions below give


def gives(*asked):
    """What the test at hand wants given; called with what it was called with, where that is a function."""
    value = VALUE["it"]
    return value(*asked) if callable(value) else value


def documents():
    return gives()


def some():
    """Thirty short documents."""
    return [Document(f"a{i}", "a" * (1 + i % 20)) for i in range(30)]


def prepare(document, rng):
    return gives(document)


def score(document, tokens):
    return gives(document)


def score_many(documents, tokens):
    return gives(documents)


def packing(lengths, seq):
    return gives(lengths, seq)


def order(draw, rows, progress, key):
    return gives(rows)


def lengths(progress):
    return gives(progress)


def mixture(progress, log):
    return gives(progress)


def objective(row, rng):
    return gives(row)


def tokenizer():
    return gives()


def reparam(params, step, batch):
    return gives(params)


def forward(params, batch, mask, config):
    return gives(model.llama(params, batch, mask, config))


def outputs(params, states, batch, config):
    return gives(model.head_logits(params, states, batch, config))


def token_loss(logits, batch, extras):
    return gives(model.cross_entropy(logits, batch, extras))


def reduce(losses, batch):
    return gives(losses)


def gradient(gradient, params, batch, step):
    return gives(gradient(params, batch))


def optimizer(table):
    return gives(table)


def table_rows(config, rows):
    return gives(rows)


def flops(config, seq):
    return gives(seq)


def shape(share):
    return gives(share)


def evals(params, apply):
    return gives()


def edit(model, context):
    return gives(model)


def check(value, run, function, more: str = ""):
    """A run is refused for what a function gives, in a sentence that names the function and this file."""
    VALUE["it"] = value
    with pytest.raises(InputError) as caught:
        run()
    said = str(caught.value)
    assert f": {function.__name__} of " in said and "test_trust_gave.py gives " in said, said
    assert "; allowed is " in said and more in said and "\n" not in said
    return said


# ----------------------------------------------------------------------------------------------- host


def built(**functions):
    """Build the cache of a source."""
    source = Source(functions.pop("documents", some), **functions)
    return build("x", DataConfig(sources={"x": source}, tokenizer="bytes", dev=0, test=0), Bytes(), 0)


@pytest.mark.parametrize("value", [
    None, 3, "text", [None], ["text"], [("a", "b")], [Document("a", None)], [Document("a", b"x")],
    [Document(3, "x")], [Document("a", "x", None)], [Document("a", "x", marks=((1,),))],
    [Document("a", "x", prefix=None)], [Document("a", "x", split=2)]], ids=str)
def test_documents(value, home):
    check(value, lambda: built(documents=documents), documents,
    "an iterable of data.Document and data.Skipped")


def test_what_is_skipped_is_no_mistake(home):
    VALUE["it"] = [*some(), Skipped("b", "odd")]
    assert built(documents=documents).total["counts"]["skipped: odd"] == 1


@pytest.mark.parametrize("value", [
    None, "text", [None], ["text"], (Document("a", "x"),), Skipped("a", "odd")])
def test_prepare(value, home):
    check(value, lambda: built(prepare=prepare), prepare)


@pytest.mark.parametrize("value", [None, "high", math.nan, [1.0, math.nan], [[1.0]], {"a": 1}])
def test_score(value, home):
    check(value, lambda: built(score=score), score)


@pytest.mark.parametrize("value", [None, 3.0, [1.0], [math.nan] * 30, [[[1.0]]] * 30, ["a"] * 30])
def test_scores_of_many(value, home):
    check(value, lambda: built(score=score_many), score_many)


def changed(column: int, value: int, piece: int = 0):
    """A packing that is plain but for one number."""
    def pack(lengths, seq):
        plan = concat_and_split(lengths, seq)
        plan[piece, column] = value
        return plan
    return pack


@pytest.mark.parametrize("value, more", [
    (None, "integers [pieces, 6]"), ("plan", "integers"), ([[0, 1, 0]], "integers"), ([[0.5] * 6],
    "integers"),
    (changed(2, 30), "documents from 0 to 29"), (changed(2, -1), "documents from 0"),
    (changed(4, 5_000), "pieces within their documents"), (changed(3, -1), "pieces within"),
    (changed(4, 0), "pieces within"), (changed(0, 7), "rows from 0 without a gap"),
    (changed(0, 0, -1), "in the order of their rows"), (changed(5, -1), "QUIET from 0"),
    (changed(1, 0), "segments from 1"), (lambda n, seq: concat_and_split(n, 2 * seq), "rows of at most 32"),
])
def test_packing(value, more, home):
    check(value, lambda: load(some, replace(PLAIN, packing=packing)), packing, more)


@pytest.mark.parametrize("value", [None, "1", 0.5, -1, lambda rows: rows, lambda rows: [0]])
def test_order(value, home):
    check(value, lambda: load(some, replace(PLAIN, order=order)).batch(1), order)


@pytest.mark.parametrize("value", [
    None, {16: -1}, {16: 0}, {16: "1"}, {16: math.nan}, {8: 1.0},
    lambda progress: {8 if progress else 16: 1.0}])
def test_lengths(value, home):
    later = value if callable(value) else lambda progress: value if progress else {16: 1.0}
    check(later, lambda: load(some, replace(PLAIN, lengths=lengths)), lengths)


@pytest.mark.parametrize("value", [
    None, 1.0, {"x": -1}, {"x": "1"}, {"x": math.inf}, {"x": 0}, {"y": 1.0}, {}])
def test_mixture(value, home):
    check(value, lambda: load(some, replace(PLAIN, mixture=mixture)).batch(1), mixture)


def with_(**arrays):
    """An objective that is causal but for these arrays."""
    return lambda row: (row | {name: made(row["tokens"]) for name, made in arrays.items()}, CAUSAL)


@pytest.mark.parametrize("value", [
    None, {}, lambda row: row, lambda row: (row, None), lambda row: (row, {"kind": "causal"}),
    lambda row: (row, {"kind": "sideways", "window": 0}), lambda row: ({"tokens": row["tokens"]}, CAUSAL),
    lambda row: [row, CAUSAL], with_(tokens=lambda x: x[1:]), with_(mine=lambda x: 3), with_(mine=list),
    with_(tokens=lambda x: x + 1_000), with_(targets=lambda x: x - 999), with_(tokens=lambda x: x * 1.0),
    with_(weights=lambda x: np.full(len(x), math.nan, np.float32)),
])
def test_objective(value, home):
    check(value, lambda: load(some, replace(PLAIN, objective=objective)).batch(1), objective)


class Odd:
    """A tokenizer of a config, with what a test changes."""

    model, vocab, bos, eos = b"odd", 4, 2, 3

    def __init__(self, model=b"odd"):
        pass

    def encode(self, text):
        return [i % 2 for i in range(len(text))]

    def decode(self, ids):
        return "a" * len(ids)


@pytest.mark.parametrize("field, value", [
    ("vocab", None), ("vocab", 3), ("bos", -1), ("eos", "3"), ("model", "text"), ("encode", None)])
def test_tokenizer(field, value, home, monkeypatch):
    monkeypatch.setattr(Odd, field, value)
    check(Odd, lambda: make_tokenizer(DataConfig(tokenizer=tokenizer), 0), tokenizer)
    check(None, lambda: make_tokenizer(DataConfig(tokenizer=tokenizer), 0), tokenizer)


@pytest.mark.parametrize("value", [None, "ab", [0.5], [4], [-1], [[0]]])
def test_ids_of_a_tokenizer(value, home, monkeypatch):
    monkeypatch.setattr(Odd, "encode", lambda self, text: value)
    VALUE["it"] = Odd
    made = make_tokenizer(DataConfig(tokenizer=tokenizer), 0)
    made.inner = Odd()
    with pytest.raises(InputError, match="data.tokenizer: .*test_trust_gave.py gives .*ids from 0 to 3"):
        made.encode_batch(["tree"])


# ---------------------------------------------------------------------------------------------- in jit


def traced(**functions):
    """Trace one step of a config, and compute nothing."""
    shaped = {name: functions.pop(name) for name in ("forward", "outputs", "rows") if name in functions}
    config = Config(name="a", model=replace(TINY, **shaped), **functions)
    mesh = train.make_mesh(train.MeshConfig(), jax.devices()[:1])
    state = train.state_like(config.model, config.optimizer, mesh)
    lr = {group: np.float32(0) for group in model.groups(config.model)}
    step = train.make_step(config, config.model, Phase(batch=2, seq=24))
    jax.eval_shape(lambda *given: step(*given, Mask("causal", 0)), state, rows(), lr)


@pytest.mark.parametrize("value", [
    None, lambda params: list(params), lambda params: {}, lambda params: params | {"q": None},
    lambda params: params | {"q": params["q"][1:]}])
def test_reparam(value):
    check(value, lambda: traced(reparam=reparam), reparam)


@pytest.mark.parametrize("value", [
    None, lambda x: x[0], lambda x: (x,), lambda x: (x, None), lambda x: (x, {"a": 3}), lambda x: (x,
    {"a": x[0]})])
def test_forward(value):
    check(value, lambda: traced(forward=forward), forward, "where [b t] is (2, 24)")


def test_outputs():
    check(None, lambda: traced(outputs=outputs), outputs)


@pytest.mark.parametrize("value", [
    None, 0.0, lambda x: x.sum(), lambda x: x[:1], lambda x: x > 0, lambda x: x[..., None]])
def test_token_loss(value):
    check(value, lambda: traced(token_loss=token_loss), token_loss, "where [b c] is (2, 24)")
    phase = Phase(batch=2, seq=24, token_loss=token_loss)
    assert train.loss_of(Config(), TINY, phase).token_loss is token_loss


@pytest.mark.parametrize("value", [
    None, lambda x: x.sum(), lambda x: (x.sum(), x.sum()), lambda x: ((x, x.sum()), {}),
    lambda x: ((x.sum(), 1.0), None), lambda x: ((x.sum(), 1.0), {"a": x})])
def test_reduce(value):
    check(value, lambda: traced(reduce=reduce), reduce)


@pytest.mark.parametrize("value", [
    None, lambda found: found[1], lambda found: (found[0], {}), lambda found: (found[0], None),
    lambda found: (found[0], {name: x[:1] for name, x in found[1].items()})])
def test_gradient(value):
    check(value, lambda: traced(gradient=gradient), gradient)


@pytest.mark.parametrize("value", [
    None, optax.sgd(1.0), {"embed": None}, {"nowhere": optax.sgd(1.0)}])
def test_optimizer(value):
    check(value, lambda: traced(optimizer=optimizer), optimizer)


@pytest.mark.parametrize("value", [
    None, lambda rows: list(rows), lambda rows: rows | {"q": 3}, lambda rows: rows | {3: rows["q"]},
    lambda rows: rows | {"new": Param(("embed",), (16, 2), None)},
    lambda rows: rows | {"new": Param(("embed",), (0,), None)},
    lambda rows: rows | {"new": Param(("embed",), (1.5,), None)}])
def test_rows(value):
    check(value, lambda: traced(rows=table_rows), table_rows)


def odd_draw(key, shape, dtype):
    return gives()


@pytest.mark.parametrize("value", [None, 1.0, np.zeros(3)])
def test_init(value):
    VALUE["it"] = value
    param = Param(("embed",), (16,), odd_draw)
    with pytest.raises(InputError, match="odd_draw of .*test_trust_gave.py gives .*16"):
        model.draw("new", param, jax.random.key(0), jnp.float32)


# ---------------------------------------------------------------------------------- plans and evaluation


@pytest.mark.parametrize("value", [None, "1", math.nan, math.inf, -1.0, [1.0]])
def test_schedule_shape(value):
    check(value, lambda: make_plan(Config(model=TINY, schedule=Schedule(shape=shape)), None), shape)


@pytest.mark.parametrize("value", [None, "1", math.nan, math.inf, 0, -1.0])
def test_flops(value):
    check(value, lambda: make_plan(Config(model=replace(TINY, flops=flops)), None), flops)


@pytest.mark.parametrize("value", [
    None, lambda m: m, lambda m: Edited(m, None, True), lambda m: Edited(None, {}, True),
    lambda m: Edited(Model(m.config, None), {}, True), lambda m: Edited(Model(None, m.params), {}, True),
    lambda m: Edited(m, {"embed": "forget"}, True), lambda m: (m, {}, True)])
def test_edit(value):
    check(value, lambda: make_plan(Config(model=TINY, phases=(Phase(edits=(edit,)),)), None), edit)


@pytest.mark.parametrize("value", [None, 1.0, {"a": None}, {"a": "1"}, {3: 1.0}, {"a": np.zeros(2)}])
def test_evals(value):
    class Setting:
        config, tokenizer, mesh = Config(evals=(evals,)), None, None

    check(value, lambda: own_evals(None, {}, 0, Setting), evals)


# ------------------------------------------------------------------------------------------- sentences


def test_a_value_is_shown_in_few_words():
    assert seams.shown("x" * 1_000) == f"'{'x' * 79} ... (str)"
    assert seams.shown(np.zeros((2, 3), np.int32)) == "an array of shape (2, 3), int32"
    assert seams.shown({"a": np.zeros(1)}) == "{a: an array of shape (1,), float64}"
    assert seams.named(test_rows).endswith("tests/test_trust_gave.py")
    assert seams.named(optax.adam).startswith("adam of ") and seams.named(max) == "max"


def test_every_extension_point_is_tried_here():
    tried = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    known = {point.field.removeprefix("data.").replace(".", "_") for point in vars(seams).values()
             if isinstance(point, seams.Seam)}
    assert known - tried == {"init of a model_Param", "measures", "conclusions", "curves"}
