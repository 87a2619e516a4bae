"""tools/export.py: Hugging Face directories out and in, against transformers itself."""
import itertools
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_cosine
from hypothesis import example, given, settings

import model
import train
from data import InputError
from lib.cache import build
from lib.hf import read_params, read_shape
from lib.kernels import Mask
from lib.log import Log
from lib.optim import adamw, state_like
from lib.schedule import Schedule
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.tokenizers import (
    SentencePiece,
    Tokenizer,
    load_tokenizer,
    read_hf_tokenizer,
    train_bpe,
)
from model import ModelConfig
from tools import export
from train import Config, Phase

torch = transformers = tokenizers = None  # see `libraries`

equal = np.testing.assert_array_equal
close = np.testing.assert_allclose
LLAMA3 = (8.0, 1.0, 4.0, 32.0)  # slow, between and fast frequencies all occur
SCALED = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", factor=4.0)


@pytest.fixture(autouse=True, scope="module")
def libraries():
    """Imported where these tests run, for it takes seconds."""
    for name in ("torch", "transformers", "tokenizers"):
        globals()[name] = pytest.importorskip(name)
    first_cosine(torch)


def ids_of(vocab: int, length: int = 512) -> np.ndarray:
    """Two rows of random ids."""
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab, (2, length)).astype(np.int32)


def theirs(directory: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of transformers, in float32."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def ours(params, ids: np.ndarray, shape: ModelConfig) -> np.ndarray:
    """Our logits."""
    apply = jax.jit(partial(model.apply, config=shape))
    return np.asarray(apply(params, ids))


def config_of(data_config, tmp_path, name: str = "tiny", **fields) -> Config:
    """A config of two steps in rows of 64."""
    config = Config(
        name=name,
        runs=str(tmp_path / "runs"),
        data=data_config,
        phases=(Phase(steps=2, batch=8, seq=64),),
        overlap=8,
        eval_tokens=500,
        schedule=Schedule(shape="constant", warmup=0),
        prompts=(),
    )
    return replace(config, **fields)


def moved(params: dict) -> dict:
    """Parameters moved at random, gains too."""
    rng = np.random.default_rng(1)
    out = {}
    for name, x in params.items():
        noise = 0.1 * rng.standard_normal(x.shape).astype(x.dtype)
        out[name] = jax.device_put(x + noise, x.sharding)
    return out


def run_of(config: Config) -> tuple[str, dict]:
    """(run directory, parameters) of a run that has taken no step; its parameters are random."""
    run = train.prepare(config)
    metrics = run.directory / "metrics.jsonl"
    with train.opened(run), Log(metrics, 0, run.plan, config.max_skipped) as log:
        state, _ = train.resume(run)
        train.lay_out(run)
        state = state.replace(params=moved(state.params))
        train.save(run, state, 1, log)
    params = {name: np.asarray(x) for name, x in state.params.items()}
    return str(run.directory), params


def read(name: str, mesh: MeshConfig | None = None) -> tuple[ModelConfig, dict]:
    """(shape, parameters) of hf:DIR, on one device or a mesh."""
    shape = read_shape(name)
    where = make_mesh(mesh) if mesh else make_mesh(MeshConfig(), jax.devices()[:1])
    like = state_like(shape, adamw, where)
    return shape, read_params(name, shape, like.params)


# ------------------------------------------------------------------------------------------- export


class Exported(NamedTuple):
    """A run and what was exported of it."""

    run: str
    params: dict
    shape: ModelConfig
    out: Path
    tokenizer: Tokenizer
    fast: object  # the tokenizer that transformers reads


def export_of(config: Config, out: Path, *flags: str) -> Exported:
    """Make a run and export it."""
    run, params = run_of(config)
    export.main([run, str(out), *flags])
    tokenizer = train.load(run)[2]
    fast = transformers.AutoTokenizer.from_pretrained(out)
    return Exported(run, params, config.model, out, tokenizer, fast)


@pytest.fixture(scope="module")
def exported(tiny, data_config, pieces, tmp_path_factory) -> dict[str, Exported]:
    """Two exported runs: bytes, tied, in one file; pieces, of another shape, in shards."""
    root = tmp_path_factory.mktemp("exported")
    file = root / "pieces.model"
    file.write_bytes(pieces.model)
    other = replace(
        tiny,
        vocab=320,
        tied=False,
        kv_heads=4,
        embed=24,
        layers=3,
        norm_eps=1e-5,
        rope_scaling=LLAMA3,
        rope_theta=5e5,
    )
    in_bytes = config_of(data_config, root, name="bytes", model=tiny)
    in_pieces = config_of(
        replace(data_config, tokenizer=str(file)), root, name="pieces", model=other)
    return {
        "bytes": export_of(in_bytes, root / "bytes"),
        "pieces": export_of(in_pieces, root / "pieces", "--shard-mb", "0.02"),
    }


KINDS = pytest.mark.parametrize("kind", ["bytes", "pieces"])


@KINDS
def test_transformers_computes_the_logits_of_an_exported_run(exported, kind):
    run = exported[kind]
    ids = ids_of(run.shape.vocab)
    expected = ours(run.params, ids, run.shape)
    assert np.abs(expected).max() > 1
    close(theirs(run.out, ids), expected, atol=1e-4)


def test_a_small_model_is_in_one_file(exported):
    files = [file.name for file in exported["bytes"].out.glob("*.safetensors")]
    assert files == ["model.safetensors"]


def test_shards_are_listed_in_an_index(exported):
    run = exported["pieces"]
    files = {file.name for file in run.out.glob("*.safetensors")}
    index = json.loads((run.out / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert {*index["weight_map"].values()} == files
    assert index["metadata"]["total_size"] == 4 * model.count(run.shape)


@KINDS
def test_the_tokenizer_lies_beside_the_weights(exported, kind):
    run = exported[kind]
    bos, eos = run.tokenizer.bos, run.tokenizer.eos
    ends = transformers.GenerationConfig.from_pretrained(run.out)
    assert (ends.bos_token_id, ends.eos_token_id) == (bos, eos)
    assert (run.fast.bos_token_id, run.fast.eos_token_id) == (bos, eos)
    assert len(run.fast) == run.tokenizer.vocab == run.shape.vocab
    assert (run.out / "tokenizer.model").read_bytes() == run.tokenizer.model


@KINDS
def test_the_card_says_how_large_the_model_is_and_what_it_read(exported, data_config, kind):
    run = exported[kind]
    cache = build("corpus", data_config, run.tokenizer, 0)
    card = (run.out / "README.md").read_text()
    assert f"{model.count(run.shape):,}" in card
    assert cache.total["fingerprint"] in card


def test_weights_in_bfloat16_are_the_nearest(exported, tmp_path):
    run = exported["bytes"]
    out = tmp_path / "out"
    export.main([run.run, str(out), "--dtype", "bfloat16"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    weights = loaded.state_dict()
    embed = weights["model.embed_tokens.weight"].float().numpy()

    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    equal(embed, run.params["embed"].astype("bfloat16"))


@KINDS
def test_an_exported_run_is_a_start_too(exported, kind):
    """Its shape and its parameters."""
    run = exported[kind]
    shape, params = read(f"hf:{run.out}")
    assert shape == run.shape
    for name, x in run.params.items():
        equal(params[name], x)


@KINDS
def test_an_exported_tokenizer_gives_the_same_ids(exported, kind):
    run = exported[kind]
    text = "the tree \u2581\n<s>樹木"

    tokenizer = read_hf_tokenizer(f"hf:{run.out}")

    ids = tokenizer.encode(text)
    assert ids == list(run.tokenizer.encode(text))
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
    assert (tokenizer.bos, tokenizer.eos) == (run.tokenizer.bos, run.tokenizer.eos)
    assert tokenizer.vocab == run.shape.vocab


@KINDS
def test_without_tokenizer_json_an_exported_tokenizer_is_the_run_s_own(exported, kind, tmp_path):
    run = exported[kind]
    for file in ("config.json", "tokenizer.model"):
        shutil.copy(run.out / file, tmp_path)
    assert read_hf_tokenizer(f"hf:{tmp_path}").model == run.tokenizer.model


AWKWARD = [
    *(" ", "  ", "\n", "\r\n", "\t", "\x00"),
    *("\x10", "\x10e", "\x10b", "\x10c", "\u2581", "\u2585"),
    *("<s>", "</s>", "<unk>", "<0x0A>"),
    *("é", "e\u0301", "木", "🌳", "\ufeff", "the ", "\U0010ffff"),
]
anything = st.one_of(
    st.text(),
    st.lists(st.sampled_from(AWKWARD)).map("".join),
    st.text(st.sampled_from("\x10ebc\u2581\u2585 the\n")),
)


@KINDS
@settings(max_examples=300)
@given(text=anything)
@example("")
@example("\u2581 \x10b\u2585\x10<s>")
def test_the_fast_tokenizer_gives_our_ids_for_every_text(exported, kind, text):
    mine, fast = exported[kind].tokenizer, exported[kind].fast
    ids = [int(i) for i in mine.encode(text)]
    whole = [mine.bos, *ids, mine.eos]
    assert fast(text, add_special_tokens=False)["input_ids"] == ids
    assert fast(text)["input_ids"] == [mine.bos, *ids]
    assert fast.decode(whole, skip_special_tokens=True) == text


def fast_with(made: dict, merges: list):
    """A tokenizer of tokenizers with the merges in another order."""
    described = made | {"model": made["model"] | {"merges": merges}}
    return tokenizers.Tokenizer.from_str(json.dumps(described))


@pytest.mark.parametrize("letters,size", [("ab", 300), ("a", 272), ("abc", 330)])
def test_ties_between_merges_are_broken_as_sentencepiece_does(letters, size):
    """All short texts of few letters, and long ones, of pieces that overlap in many ways.

    A merge of tokenizers has a rank, and no place. So any order of a piece's cuts has to give the
    same.
    """
    rng = np.random.default_rng(len(letters))

    def drawn(n):
        return "".join(rng.choice(list(letters), n))

    if len(letters) > 1:
        texts = [drawn(40) for _ in range(300)]
    else:
        texts = ["a" * n for n in range(1, 60)]
    mine = SentencePiece(train_bpe(texts, size))
    made = export.fast_tokenizer(mine)[0]

    tried = []
    for n in range(9):
        tried += ["".join(each) for each in itertools.product(letters, repeat=n)]
    tried += [drawn(200) for _ in range(500)]
    expected = mine.encode_batch(tried)

    merges = made["model"]["merges"]
    pieces = dict.fromkeys(a + b for a, b in merges)
    rank = {piece: i for i, piece in enumerate(pieces)}
    other_cuts_first = sorted(reversed(merges), key=lambda pair: rank["".join(pair)])
    for order in (merges, other_cuts_first):
        got = fast_with(made, order).encode_batch(tried, add_special_tokens=False)
        assert [each.ids for each in got] == expected


def scaled_at(params, step, batch, by: float = 1.0):
    """A `reparam` that no batch is needed for."""
    return params | {"down": params["down"] * (by + 0.1 * step)}


def by_batch(params, step, batch):
    """A `reparam` that Llama has no place for."""
    return params | {"down": params["down"] * batch["tokens"].mean()}


def low_rank(params, step, batch):
    """A `reparam` with parameters of other names."""
    return params | {"more": params["down"]}


def test_reparametrised_weights_are_exported_as_they_are_used(tiny, data_config, tmp_path):
    reparam = partial(scaled_at, by=2.0)
    config = config_of(data_config, tmp_path, model=tiny, reparam=reparam)
    params = model.init(tiny, jax.random.key(0))
    used = export.llama_params(config, params, 3)
    equal(used["down"], params["down"] * 2.3)
    assert used["up"] is params["up"]


@pytest.mark.parametrize("shape,fields,word", [
    (dict(embed=30), {}, "model.embed"),
    ({}, dict(reparam=by_batch), "function of the batch"),
    ({}, dict(reparam=low_rank), "reparam gives"),
], ids=["embed", "batch", "names"])
def test_what_is_not_llama_is_refused(tiny, data_config, tmp_path, shape, fields, word):
    config = config_of(data_config, tmp_path, model=replace(tiny, **shape), **fields)
    params = model.init(config.model, jax.random.key(0))
    with pytest.raises(InputError, match=word):
        export.llama_params(config, params, 1)


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not empty"):
        export.main(["nowhere", str(tmp_path)])


# ------------------------------------------------------------------------------------------- import


def llama(directory: Path, dtype="float32", shard: str = "1GB", rope=None, **fields) -> str:
    """hf:DIR of a model with random weights that transformers made."""
    torch.manual_seed(0)
    default = dict(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0} | (rope or {}),
        bos_token_id=256,
        eos_token_id=257,
    )
    config = transformers.LlamaConfig(**default | fields)
    made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for x in made.parameters():
            x.add_(0.1 * torch.randn(x.shape))
    made.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    return f"hf:{directory}"


def old_llama(directory: Path, dtype="float32", rope=None, **fields) -> str:
    """The same with a config.json as of transformers 4."""
    name = llama(directory, dtype, rope=rope, **fields)
    change(
        directory,
        rope_parameters=None,
        dtype=None,
        torch_dtype=dtype,
        rope_theta=20_000.0,
        rope_scaling=rope,
    )
    return name


def change(directory: Path, **fields):
    """Write fields of a config.json; None takes one out."""
    file = directory / "config.json"
    written = json.loads(file.read_text()) | fields
    kept = {name: value for name, value in written.items() if value is not None}
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize("make,fields,files", [
    (llama, {}, 1),
    (old_llama, {}, 1),
    (llama, dict(rope=SCALED), 1),
    (old_llama, dict(rope=SCALED, dtype="bfloat16", shard="20KB"), None),
    (llama, dict(rope=LINEAR, tie_word_embeddings=True), 1),
    (old_llama, dict(rope=LINEAR, num_key_value_heads=4, head_dim=16), 1),
    (llama, dict(tie_word_embeddings=True, dtype="bfloat16", num_key_value_heads=1), 1),
], ids=["plain", "old", "llama3", "old llama3 in shards", "linear", "old linear", "tied"])
def test_an_imported_model_has_the_logits_of_transformers(tmp_path, make, fields, files):
    name = make(tmp_path, **fields)
    shape, params = read(name)
    if files:
        assert len(list(tmp_path.glob("*.safetensors"))) == files

    ids = ids_of(shape.vocab)
    expected = theirs(tmp_path, ids)
    assert np.abs(expected).max() > 1
    close(ours(params, ids, shape), expected, atol=1e-4)


def test_each_device_of_a_mesh_gets_its_part(tmp_path):
    name = llama(tmp_path)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    shape, whole = read(name)
    _, parts = read(name, mesh)
    where = shardings(model.table(shape), make_mesh(mesh))
    for name, x in whole.items():
        equal(parts[name], x)
        assert parts[name].sharding == where[name]
        assert parts[name].dtype == jnp.float32


@pytest.mark.parametrize("fields,word", [
    (dict(model_type="lfm2"), "model_type.*'lfm2'.*llama"),
    (dict(hidden_act="gelu"), "hidden_act"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias"),
    (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "rope_type.*'dynamic'.*'llama3'"),
    (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (dict(quantization_config={}), "quantization_config"),
    (dict(hidden_size=None), "hidden_size"),
    (dict(rope_parameters=dict(rope_type="linear")), "factor"),
    (dict(intermediate_size=81), r"mlp.*\[80, 48\].*\[81, 48\]"),
    (dict(num_hidden_layers=3), "layers.2"),
    (dict(num_hidden_layers=1), "layers.1"),
], ids=str)
def test_another_architecture_is_refused_by_its_field(tmp_path, fields, word):
    name = llama(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(InputError, match=word):
        read(name)


def test_what_is_no_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="no local Hugging Face directory"):
        read(f"hf:{tmp_path}")


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    name = llama(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        read(name)


@pytest.mark.parametrize("scaling", [
    (1.0, 2.0),
    (0.0,),
    (8.0, 4.0, 4.0, 32.0),
    (8.0, 1.0, 4.0, float("inf")),
])
def test_a_rope_scaling_that_is_none_is_refused(tiny, data_config, tmp_path, scaling):
    config = config_of(data_config, tmp_path, model=replace(tiny, rope_scaling=scaling))
    with pytest.raises(InputError, match="model.rope_scaling"):
        train.check(config)


@pytest.mark.parametrize("scaling", [(), (2.0,), LLAMA3])
def test_a_rope_scaling_is_accepted(tiny, data_config, tmp_path, scaling):
    config = config_of(data_config, tmp_path, model=replace(tiny, rope_scaling=scaling))
    train.check(config)


# --------------------------------------------------------------------------------- their tokenizers


class ByteLevelBPE:
    """A byte-level BPE tokenizer as Llama 3 and SmolLM2 have one, trained on the corpus."""

    def __init__(self, corpus: Path):
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=["<|endoftext|>", "<|turn|>"],
            show_progress=False,
            initial_alphabet=byte_level.alphabet(),
        )
        self.made = tokenizers.Tokenizer(tokenizers.models.BPE())
        self.made.pre_tokenizer = byte_level(add_prefix_space=False)
        self.made.decoder = tokenizers.decoders.ByteLevel()
        self.made.train([str(file) for file in corpus.rglob("*.txt")], trainer)
        self.made.enable_truncation(4)
        self.size = self.made.get_vocab_size()

    def save(self, directory: Path, bos: str | None = None, eos: str | None = "<|endoftext|>",
             **config) -> str:
        """hf:DIR of it beside a config.json, with these fields."""
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=self.made, bos_token=bos, eos_token=eos)
        fast.save_pretrained(directory)
        file = directory / "config.json"
        if not file.exists():
            file.write_text(json.dumps({"vocab_size": 300}))
        change(directory, bos_token_id=None, eos_token_id=None)
        change(directory, **config)
        return f"hf:{directory}"


@pytest.fixture(scope="module")
def bpe(corpus) -> ByteLevelBPE:
    return ByteLevelBPE(corpus)


@pytest.mark.parametrize("bos,config,ends", [
    (None, {}, (0, 0)),
    ("<|turn|>", {}, (1, 0)),
    (None, dict(eos_token_id=[1, 0]), (1, 1)),
    ("<|turn|>", dict(bos_token_id=0, eos_token_id=1), (0, 1)),
], ids=["none", "by name", "several", "by id"])
def test_the_ends_of_a_document_are_found(bpe, tmp_path, bos, config, ends):
    tokenizer = read_hf_tokenizer(bpe.save(tmp_path, bos, **config))
    assert (tokenizer.bos, tokenizer.eos) == ends
    assert tokenizer.vocab == 300


TEXTS = ["", "the tree is cut back", "été 樹木 🌳\n\n  x", "<|endoftext|> and <|turn|>"]


def test_their_tokenizer_is_kept_in_one_file(bpe, tmp_path):
    """With more rows than tokens, and without truncation."""
    tokenizer = read_hf_tokenizer(bpe.save(tmp_path))
    file = tmp_path / "tokenizer.model"
    file.write_bytes(tokenizer.model)

    again = load_tokenizer(file)

    assert bpe.size < again.vocab == 300
    assert again.model == tokenizer.model
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    batch = again.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, batch, strict=True):
        assert ids == again.encode(text)
        assert ids == tokenizer.encode(text)
        asked = fast(text, add_special_tokens=False, truncation=False)
        assert ids == asked["input_ids"]


def test_what_spells_a_special_token_is_text_and_special_tokens_are_none(bpe, tmp_path):
    tokenizer = read_hf_tokenizer(bpe.save(tmp_path))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert not {0, 1} & {*ids}
        whole = [tokenizer.bos, *np.array(ids, np.int32), tokenizer.eos, 299]
        assert tokenizer.decode(whole) == text


def test_a_tokenizer_of_more_tokens_than_rows_is_refused(bpe, tmp_path):
    rows = bpe.size - 1
    name = bpe.save(tmp_path, vocab_size=rows)
    with pytest.raises(InputError, match=f"{bpe.size} tokens.*{rows} rows"):
        read_hf_tokenizer(name)


def test_a_tokenizer_without_an_end_is_refused(bpe, tmp_path):
    name = bpe.save(tmp_path, eos=None)
    with pytest.raises(InputError, match="eos_token_id"):
        read_hf_tokenizer(name)


def test_a_tokenizer_json_is_refused_as_a_file(bpe, tmp_path):
    bpe.save(tmp_path)
    with pytest.raises(InputError, match="hf:DIRECTORY"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_broken_tokenizer_json_is_refused(bpe, tmp_path):
    name = bpe.save(tmp_path, eos_token_id=0)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        read_hf_tokenizer(name)


# ---------------------------------------------------------------------------------- runs from there


def losses(run) -> list[float]:
    """The losses of a run's steps."""
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def trained(config: Config):
    """A run that has been trained."""
    run = train.prepare(config)
    steps = sum(phase.steps for phase in config.phases)
    assert train.train(config)["step"] == steps
    return run


class Begun(NamedTuple):
    """A run that began from a Hugging Face directory, and what was there."""

    config: Config
    run: object
    hub: Path
    shape: ModelConfig
    params: dict


@pytest.fixture(scope="module")
def begun(bpe, data_config, tmp_path_factory) -> Begun:
    root = tmp_path_factory.mktemp("begun")
    name = llama(root / "hub", rope=SCALED)
    bpe.save(root / "hub")
    plain = replace(data_config, tokenizer="bpe")
    config = config_of(plain, root, init_from=name, model=ModelConfig(remat="elementwise"))
    shape, params = read(name)
    return Begun(config, trained(config), root / "hub", shape, params)


def test_a_run_that_starts_from_a_directory_has_its_shape_and_tokenizer(begun):
    run = begun.run
    assert run.config.model == replace(begun.shape, remat="elementwise")
    assert run.tokenizer.vocab == 300
    assert run.tokenizer.eos == 0


def test_a_run_that_starts_from_a_directory_has_its_loss(begun):
    batch = begun.run.loader.batch(1).arrays
    each = model.losses(begun.params, batch, Mask("causal", 0), begun.shape)
    mean = float(np.average(each, weights=batch["weights"]))
    assert losses(begun.run)[0] == pytest.approx(mean, rel=1e-5)


def test_a_run_that_starts_from_a_directory_on_a_mesh_has_the_same_losses(begun):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    meshed = trained(replace(begun.config, name="meshed", mesh=mesh))
    close(losses(begun.run), losses(meshed), rtol=1e-4)


def test_a_run_resumes_without_its_directory_and_can_be_exported(begun, tmp_path):
    """The last test of `begun`: it moves the directory."""
    shutil.move(begun.hub, tmp_path / "elsewhere")
    four_steps = replace(begun.config.phases[0], steps=4)

    longer = trained(replace(begun.config, phases=(four_steps,)))

    assert longer.tokenizer.model == begun.run.tokenizer.model
    with pytest.raises(InputError, match="no local Hugging Face directory"):
        train.prepare(replace(begun.config, name="anew"))

    back = tmp_path / "back"
    export.main([str(longer.directory), str(back)])
    shape, params = read(f"hf:{back}")
    assert shape == begun.shape
    for name, x in train.load(str(longer.directory))[0].items():
        equal(params[name], x)
    assert read_hf_tokenizer(f"hf:{back}").model == begun.run.tokenizer.model


def test_a_directory_has_no_optimiser(data_config, tmp_path):
    config = config_of(data_config, tmp_path, init_from=f"hf:{tmp_path}", init_with="all")
    with pytest.raises(InputError, match='init_with is "all".*"params"'):
        train.prepare(config)
