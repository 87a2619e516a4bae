"""lib/families: models that transformers makes with random weights, in, out and changed.

    python tests/test_families.py      write the table of docs/models.md
"""
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import environment, first_cosine

import model
import train
from lib.config import ROOT, from_json, to_json
from lib.edits import reset_embeddings, stack
from lib.errors import InputError
from lib.families.family import written
from lib.hf import FAMILIES, family_of, read_params, read_shape
from lib.lora import FROZEN, adapted, add_lora
from lib.optim import adamw, state_like
from lib.prune import prune
from lib.sharding import MeshConfig, make_mesh
from lib.widen import widen
from model import ModelConfig
from tools import export

pytestmark = pytest.mark.library

torch = transformers = None  # see `libraries`

equal = np.testing.assert_array_equal
PAGE = ROOT / "docs/models.md"
NEAR = 1e-5  # how far logits may be apart, in float32
LENGTH = 512  # of rows


def libraries():
    """Imported where these tests run, for it takes seconds."""
    for name in ("torch", "transformers"):
        globals()[name] = pytest.importorskip(name)
    first_cosine(torch)


@pytest.fixture(autouse=True, scope="module")
def imported():
    libraries()


class Case(NamedTuple):
    """A model that transformers makes."""

    kind: str
    words: str  # what is odd about it
    fields: dict  # of its config, besides those of `made`
    dtype: str = "float32"
    shard: str = "1GB"


SMALL = dict(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    initializer_range=0.05,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=2e4,
    factor=4.0,
    original_max_position_embeddings=64,
)
TIED = dict(tie_word_embeddings=True)
GEMMA = dict(
    num_hidden_layers=4,
    head_dim=20,
    query_pre_attn_scalar=24,
    sliding_window=33,
    sliding_window_pattern=3,
)
FULL = dict(rope_type="linear", rope_theta=5e4, factor=8.0)
GRANITE = dict(
    embedding_multiplier=6.0,
    attention_multiplier=0.2,
    residual_multiplier=0.4,
    logits_scaling=3.0,
)
MHA = dict(num_key_value_heads=4)
CASES = {
    "llama": Case("llama", "heads of 20", dict(head_dim=20)),
    "qwen3": Case("qwen3", "heads of 20, tied", dict(head_dim=20) | TIED),
    "qwen3-16": Case("qwen3", "16 bits, shards", dict(head_dim=12), "bfloat16", "20KB"),
    "mistral": Case("mistral", "a window of 37", dict(sliding_window=37)),
    "mistral-whole": Case("mistral", "no window", dict(sliding_window=None, head_dim=16)),
    "qwen2": Case("qwen2", "", {}),
    "qwen2-tied": Case("qwen2", "tied, 16 bits", TIED, "bfloat16"),
    "granite": Case("granite", "tied", GRANITE | TIED),
    "smollm3": Case("smollm3", "tied", dict(num_hidden_layers=5) | TIED),
    "smollm3-list": Case("smollm3", "layers by a list", dict(no_rope_layers=[0, 1, 1])),
    "olmo2": Case("olmo2", "", {}),
    "olmo2-tied": Case("olmo2", "tied, a head each", TIED | MHA),
    "gemma3": Case("gemma3_text", "tied, windows of 33", GEMMA | TIED),
    "gemma3-linear": Case(
        "gemma3_text",
        "RoPE scaled, layers by a list, 16 bits",
        GEMMA | dict(
            num_hidden_layers=3,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(
                full_attention=FULL,
                sliding_attention=dict(rope_type="default", rope_theta=3e3),
            ),
        ),
        "bfloat16",
    ),
    "gpt_neox": Case("gpt_neox", "", {}),
    "gpt_neox-tied": Case(
        "gpt_neox",
        "tied, one block after the other",
        TIED | dict(use_parallel_residual=False, rotary_pct=0.5),
    ),
    "gpt2": Case("gpt2", "tied", TIED),
    "gpt2-shards": Case("gpt2", "shards, 16 bits", {}, "bfloat16", "20KB"),
    "yarn": Case("llama", "YaRN", dict(rope_parameters=YARN)),
    "yarn-qwen3": Case(
        "qwen3",
        "YaRN with all its fields",
        dict(
            head_dim=32,
            rope_parameters=YARN | dict(beta_fast=16, beta_slow=2, attention_factor=0.9),
        ),
    ),
}


def made(directory: Path, case: Case) -> str:
    """hf:DIR of a case's model, with gains and biases moved too."""
    torch.manual_seed(0)
    fields = SMALL | case.fields
    for field in FAMILIES[case.kind].unsaid:
        fields.pop(field, None)
    config = transformers.AutoConfig.for_model(case.kind, **fields)
    one = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for x in one.parameters():
            x.add_(0.03 * torch.randn(x.shape))
    one.to(getattr(torch, case.dtype)).save_pretrained(directory, max_shard_size=case.shard)
    return f"hf:{directory}"


IDS = np.random.default_rng(0).integers(0, 300, (2, LENGTH)).astype(np.int32)


def theirs(directory: Path) -> np.ndarray:
    """The logits of transformers, in float32."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def ours(shape: ModelConfig, params: dict) -> np.ndarray:
    """Our logits."""
    return np.asarray(jax.jit(partial(model.apply, config=shape))(params, IDS))


def read(name: str, mesh: MeshConfig | None = None) -> tuple[ModelConfig, dict]:
    """(shape, parameters) of hf:DIR, on one device or a mesh."""
    shape = read_shape(name)
    where = make_mesh(mesh) if mesh else make_mesh(MeshConfig(), jax.devices()[:1])
    like = state_like(shape, adamw, where)
    return shape, read_params(name, shape, like.params)


def write(directory: Path, shape: ModelConfig, params: dict) -> str:
    """hf:DIR of a model, as `export` writes what has no tokenizer."""
    directory.mkdir()
    fields = {"max_position_embeddings": 1024, "dtype": "float32"}
    fields |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    fields |= written(family_of(shape), shape, params)
    (directory / "config.json").write_text(json.dumps(fields))
    export.check_model(shape)
    export.write_params(directory, params, shape, "float32", 3e4)
    return f"hf:{directory}"


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of logits."""
    return float(np.abs(a - b).max())


class Parity(NamedTuple):
    """How far our logits are from those of transformers."""

    into: float
    out: float


def parity(case: Case, here: Path) -> Parity:
    """Of a model read, and of the same written and read by transformers."""
    name = made(here / "in", case)
    shape, params = read(name)
    mine = ours(shape, params)
    assert np.abs(mine).max() > 0.5
    write(here / "out", shape, params)
    return Parity(apart(mine, theirs(here / "in")), apart(mine, theirs(here / "out")))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_in_and_out(name, tmp_path):
    found = parity(CASES[name], tmp_path)
    print(f"\n{name}: {found.into:.1e} in, {found.out:.1e} out")
    assert max(found) < NEAR
    kind = json.loads((tmp_path / "out/config.json").read_text())["model_type"]
    # without a window a Mistral is a Llama
    assert kind == ("llama" if name == "mistral-whole" else CASES[name].kind)


# ---------------------------------------------------------------------------------- what is changed

KINDS = {case.kind: case for case in reversed(CASES.values()) if case.dtype == "float32"}


def changed(model_: model.Model, order: tuple[int, ...]) -> model.Model:
    """A model with its layers in another order, a narrower MLP and new embeddings."""
    for number, edit in enumerate((
        partial(stack, layers=order),
        partial(prune, mlp=56),
        partial(reset_embeddings, head=True),
    )):
        context = model.Context(jax.random.key(number), 0, None, None, None)
        model_ = edit(model_, context).model
    return model_


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_grown_pruned_and_forgotten_is_of_its_family_still(kind, tmp_path):
    """Also where layers are of two kinds, which growth carries along in any order."""
    shape, params = read(made(tmp_path / "in", KINDS[kind]))
    last = shape.layers - 1
    after = changed(model.Model(shape, params), (1, 0, 0, last, last - 1))
    write(tmp_path / "out", *after)
    mine = ours(*after)  # new embeddings make larger logits
    assert apart(mine, theirs(tmp_path / "out")) < NEAR * max(1, np.abs(mine).max())
    again, back = read(f"hf:{tmp_path / 'out'}")
    assert again.layers == 5 and again.mlp == 56
    for name, x in after.params.items():
        np.testing.assert_allclose(back[name], x, atol=family_of(shape).gain * 1e-6)


@pytest.mark.parametrize("kind", ["gemma3_text", "smollm3", "olmo2", "gpt2"])
def test_identity_layers_change_nothing_between_layers_of_two_kinds(kind, tmp_path):
    shape, params = read(made(tmp_path, KINDS[kind]))
    context = model.Context(jax.random.key(0), 0, None, None, None)
    layers = (-1, 0, -1, *range(1, shape.layers))
    grown = stack(model.Model(shape, params), context, layers=layers, new="identity")
    assert grown.preserves
    assert apart(ours(*grown.model), ours(shape, params)) < NEAR


@pytest.mark.parametrize("kind", KINDS)
def test_widening_says_truly_whether_it_preserves_the_function(kind, tmp_path):
    shape, params = read(made(tmp_path, KINDS[kind]))
    context = model.Context(jax.random.key(0), 0, None, None, None)
    wide = widen(model.Model(shape, params), context, embed=96, mlp=2 * shape.mlp)
    plain = kind in ("llama", "qwen3", "mistral", "qwen2", "granite", "smollm3")
    assert wide.preserves == plain
    if plain:
        assert apart(ours(*wide.model), ours(shape, params)) < 10 * NEAR


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_neox", "gpt2", "olmo2"])
def test_adapters_train_beside_a_family_s_rows_and_are_merged_into_its_layout(kind, tmp_path):
    """LoRA: nothing changes at first; what is exported computes what the adapted model does."""
    shape, params = read(made(tmp_path / "in", KINDS[kind]))
    context = model.Context(jax.random.key(0), 0, None, None, None)
    edit = partial(add_lora, rank=2, alone=True)
    config, both = edit(model.Model(shape, params), context).model
    again = to_json(from_json(ModelConfig, json.loads(json.dumps(to_json(config)))))
    assert json.dumps(again) == json.dumps(to_json(config))
    rows = model.table(config)
    assert rows.keys() == both.keys() and params.keys() < both.keys()
    assert {row.group for name, row in rows.items() if name in params} == {FROZEN}

    def used(params):
        return model.reparametrised(adapted, params, 0, {}, config)

    equal(ours(config, used(both)), ours(shape, params))
    for name in both.keys() - params.keys():
        both[name] = both[name] + 0.02 * jax.random.normal(context.key, both[name].shape)
    mine = ours(config, used(both))
    assert apart(mine, ours(shape, params)) > 0.01
    run = train.Config(model=config, reparam=adapted)
    write(tmp_path / "out", config, export.llama_params(run, both, 0))
    assert apart(mine, theirs(tmp_path / "out")) < NEAR * max(1, np.abs(mine).max())


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "olmo2", "qwen2", "gemma3"])
def test_each_device_gets_its_part_of_a_tensor_that_parameters_share(name, tmp_path):
    fields = CASES[name].fields | dict(num_key_value_heads=4)
    start = made(tmp_path, CASES[name]._replace(fields=fields))
    _, whole = read(start)
    _, parts = read(start, MeshConfig(data=2, fsdp=2, tensor=2))
    for parameter, x in whole.items():
        equal(parts[parameter], x)


def test_a_gradient_leaves_the_kinds_of_layers_alone(tmp_path):
    """A step of Adam: what is not trained stays, and all else moves."""
    shape, params = read(made(tmp_path, KINDS["gemma3_text"]))
    batch = model.whole(jnp.asarray(IDS[:, :64])) | {"targets": jnp.asarray(IDS[:, 1:65])}

    def loss(params):
        return model.losses(params, batch, model.CAUSAL, shape).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    assert not np.any(gradient["local"])
    for name in params.keys() - {"local"}:
        assert np.all(np.isfinite(gradient[name])) and np.any(gradient[name]), name


# ------------------------------------------------------------------------------------ files as found


def change(directory: Path, **fields):
    """Write fields of a config.json; None takes one out."""
    file = directory / "config.json"
    found = json.loads(file.read_text()) | fields
    kept = {name: value for name, value in found.items() if value is not None}
    file.write_text(json.dumps(kept))


def test_a_gpt2_is_read_as_the_hub_has_it(tmp_path):
    """Without the prefix, without a head, with the constants of attention."""
    import safetensors.numpy

    start = made(tmp_path, CASES["gpt2"])
    _, params = read(start)
    file = tmp_path / "model.safetensors"
    held = safetensors.numpy.load_file(file)
    bare = {name.removeprefix("transformer."): x for name, x in held.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    safetensors.numpy.save_file(bare, file)
    _, again = read(start)
    for name, x in params.items():
        equal(again[name], x)


def test_a_gemma_is_read_as_transformers_4_wrote_it(tmp_path):
    fields = dict(CASES["gemma3"].fields)
    shape = read_shape(made(tmp_path, CASES["gemma3"]))
    change(
        tmp_path,
        rope_parameters=None,
        layer_types=None,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        sliding_window_pattern=3,
        tie_word_embeddings=None,
    )
    assert read_shape(f"hf:{tmp_path}") == shape
    assert shape.forward.keywords["window"] == fields["sliding_window"]


def test_a_pythia_is_read_as_transformers_4_wrote_it(tmp_path):
    shape = read_shape(made(tmp_path, CASES["gpt_neox"]))
    change(tmp_path, rope_parameters=None, rotary_pct=0.25, rotary_emb_base=10_000)
    assert read_shape(f"hf:{tmp_path}") == shape


@pytest.mark.parametrize("kind,fields,words", [
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window.*True.*False"),
    ("qwen3", dict(model_type="gemma3"), "model_type.*load it as a Gemma3ForCausalLM"),
    ("qwen3", dict(model_type="lfm2"), "'lfm2'; allowed are llama, qwen3.*docs/models.md"),
    ("qwen3", dict(quantization_config={"bits": 4}), "quantization_config.*dequantize"),
    ("qwen3", dict(rope_parameters=dict(rope_type="longrope")), "rope_type.*'longrope'.*yarn"),
    ("qwen3", dict(model_type="llama"), "do not belong to the LlamaForCausalLM.*k_norm"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("gpt2", dict(activation_function="relu"), "activation_function.*'relu'.*'gelu_new'"),
    ("gpt_neox", dict(attention_bias=False), "attention_bias.*False.*True"),
    ("gemma3_text", dict(final_logit_softcapping=30.0), "final_logit_softcapping.*30.0.*None"),
    ("mistral", dict(num_hidden_layers=4), "MistralForCausalLM.*layers.3"),
    ("olmo2", dict(head_dim=16), r"q_proj.*\[48, 48\].*\[64, 48\]"),
], ids=str)
def test_what_a_family_has_not_is_refused_by_its_field(kind, fields, words, tmp_path):
    start = made(tmp_path, KINDS[kind])
    change(tmp_path, **fields)
    with pytest.raises(InputError, match=words):
        read(start)


def test_a_directory_of_other_files_is_told_how_to_make_these(tmp_path):
    start = made(tmp_path, CASES["qwen2"])
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="no model.safetensors; load it by transformers and save"):
        read(start)


def test_rows_longer_than_the_positions_of_a_gpt2_are_refused(tmp_path):
    start = made(tmp_path, CASES["gpt2"]._replace(fields=dict(max_position_embeddings=256)))
    shape, params = read(start)
    with pytest.raises(InputError, match="512 tokens.*256 positions"):
        ours(shape, params)


@pytest.mark.parametrize("kind,fields,words", [
    ("gpt2", dict(embed=96), "heads that fill the stream"),
    ("llama", dict(embed=50), "a multiple of model.heads"),
    ("qwen2", dict(qk_norm=True), "model.qk_norm is True.*layout of qwen2"),
    ("qwen2", dict(outputs=changed), "model.outputs is changed.*no family"),
    ("qwen2", dict(forward=changed), "model.forward is changed.*no family.*docs/models.md"),
], ids=["gpt2-embed", "llama-embed", "qwen2-qk_norm", "qwen2-outputs", "qwen2-forward"])
def test_what_no_family_has_a_layout_for_is_not_exported(kind, fields, words, tmp_path):
    shape = read_shape(made(tmp_path, KINDS[kind]))
    with pytest.raises(InputError, match=words):
        export.check_model(replace(shape, **fields))


# ------------------------------------------------------------------------------ a whole run of each

GROWN = """
import sys
from functools import partial

from data import DataConfig, Source, text
from lib.edits import stack
from lib.sharding import MeshConfig
from train import Config, Phase


def config(start: str, texts: str) -> Config:
    source = Source(partial(text, path=texts))
    data = DataConfig(sources={"corpus": source}, tokenizer="bytes", dev=0.1, test=0.1)
    phase = Phase(steps=10, batch=4, seq=64)
    grown = Phase(steps=10, batch=4, seq=64, edits=(stack,))
    return Config(data=data, init_from=start, phases=(phase, grown), mesh=MeshConfig(fsdp=2),
                  overlap=8, eval_tokens=500, prompts=("the tree",), sample_tokens=4)
"""


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_a_model_is_grown_trained_on_two_devices_exported_and_loaded(kind, corpus, tmp_path):
    """Twenty steps, `stack` after ten."""
    start = made(tmp_path / "in", KINDS[kind]._replace(
        fields=KINDS[kind].fields | dict(vocab_size=258, num_hidden_layers=3)))
    (tmp_path / "grow.py").write_text(GROWN)

    def call(*words):
        command = [sys.executable, "train.py", *map(str, words)]
        found = subprocess.run(
            command, cwd=ROOT, env=environment(2), capture_output=True, text=True)
        assert found.returncode == 0, found.stderr[-2000:]

    call(tmp_path / "grow.py", "--start", start, "--texts", corpus, "--runs", tmp_path)
    run, out = tmp_path / "grow", tmp_path / "mine"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]
    assert len(losses) == 20 and np.all(np.isfinite(losses))

    call("export", run, out, "--license", "apache-2.0")
    params, config, _, _ = train.load(str(run))
    assert config.model.layers == 6
    ids = IDS % 258
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded).__name__ == family_of(config.model).architecture
    with torch.no_grad():
        logits = loaded(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    apply = jax.jit(partial(model.apply, config=config.model))
    assert apart(np.asarray(apply(params, ids)), logits) < NEAR

    card = (out / "README.md").read_text()
    assert "# mine\n" in card and "license: apache-2.0\n" in card
    assert str(tmp_path) not in card and str(corpus) not in card
    assert {oct(file.stat().st_mode & 0o777) for file in out.iterdir()} == {"0o644"}
    several = transformers.pipeline("text-generation", model=str(out))
    texts = several(["the tree", "a"], batch_size=2, max_new_tokens=3)
    assert len(texts) == 2


# ------------------------------------------------------------------------------------- the table

BEGIN, END = "<!-- python tests/test_families.py -->\n", "<!-- end -->\n"


def table_of(found: dict[str, Parity]) -> str:
    """The table of docs/models.md."""
    lines = [
        "| `model_type` | class of transformers | what its block has besides Llama's | a model of 512 "
        "tokens a row | in | out |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        family = FAMILIES[case.kind]
        words = case.words or "as it is"
        cells = [f"`{case.kind}`", family.architecture, family.own, words]
        cells += [f"{x:.0e}" for x in found[name]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_page_lists_every_family_with_its_parity():
    """The words are these; the figures are those of the last `python tests/test_families.py`."""
    shown = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    figures = re.findall(r"\d\.?\d*e-\d\d", shown)
    assert len(figures) == 2 * len(CASES)
    assert all(0 < float(figure) < NEAR for figure in figures)
    numbers = iter(figures)
    again = {name: Parity(float(next(numbers)), float(next(numbers))) for name in CASES}
    assert table_of(again) == shown
    assert {case.kind for case in CASES.values()} == set(FAMILIES)


def write_page():
    """The parity of every case, into docs/models.md."""
    libraries()
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as here:
            found[name] = parity(case, Path(here))
        print(f"{name}: {found[name].into:.1e} in, {found[name].out:.1e} out", flush=True)
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table_of(found) + END + after, "utf-8")


if __name__ == "__main__":
    write_page()
