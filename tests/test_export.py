"""tools/export.py: Hugging Face directories out and in, against transformers itself."""
import itertools
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from lib.tokenizers import SentencePiece, load_tokenizer, read_hf_tokenizer, train_bpe
from model import ModelConfig
from tools import export
from train import Config, Phase

torch = transformers = tokenizers = None

equal = np.testing.assert_array_equal
LLAMA3 = (8.0, 1.0, 4.0, 32.0)  # slow, between and fast frequencies all occur
SCALED = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)


@pytest.fixture(autouse=True, scope="module")
def libraries():
    """Imported where these tests run, for it takes seconds."""
    globals().update({name: pytest.importorskip(name) for name in ("torch", "transformers", "tokenizers")})


def ids_of(vocab: int, length: int = 512) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (2, length)).astype(np.int32)


def theirs(directory: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of transformers, in float32."""
    net = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return net(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def ours(params, ids: np.ndarray, shape: ModelConfig) -> np.ndarray:
    return np.asarray(jax.jit(partial(model.apply, config=shape))(params, ids))


def config_of(data_config, tmp_path, name: str = "tiny", **fields) -> Config:
    """A config of two steps in rows of 64."""
    return Config(name=name, runs=str(tmp_path / "runs"), **dict(
        data=data_config, phases=(Phase(steps=2, batch=8, seq=64),), overlap=8, eval_tokens=500,
        schedule=Schedule(shape="constant", warmup=0), prompts=()) | fields)


def run_of(config: Config) -> tuple[str, dict]:
    """(run directory, parameters) of a run that has taken no step; gains too are drawn at random."""
    run = train.prepare(config)
    rng = np.random.default_rng(1)
    with train.opened(run), Log(run.directory / "metrics.jsonl", 0, run.plan, config.max_skipped) as log:
        state, _ = train.resume(run)
        train.lay_out(run)
        state = state.replace(params={n: jax.device_put(x + 0.1 * rng.standard_normal(x.shape).astype(
            x.dtype), x.sharding) for n, x in state.params.items()})
        train.save(run, state, 1, log)
    return str(run.directory), {n: np.asarray(x) for n, x in state.params.items()}


def read(name: str, mesh: MeshConfig | None = None, **fields) -> tuple[ModelConfig, dict]:
    """(shape, parameters) of hf:DIR, on one device or a mesh."""
    shape = replace(read_shape(name), **fields)
    mesh = make_mesh(mesh) if mesh else make_mesh(MeshConfig(), jax.devices()[:1])
    return shape, read_params(name, shape, state_like(shape, adamw, mesh).params)


# ----------------------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def exported(tiny, data_config, pieces, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """Two exported runs: bytes, tied, in one file; and pieces, all else than in `tiny`, in shards."""
    root, out = tmp_path_factory.mktemp("exported"), {}
    (root / "pieces.model").write_bytes(pieces.model)
    other = replace(tiny, vocab=320, tied=False, kv_heads=4, embed=24, layers=3, norm_eps=1e-5,
                    rope_scaling=LLAMA3, rope_theta=5e5)
    for kind, tokenizer, shape, flags in (("bytes", "bytes", tiny, []), (
            "pieces", str(root / "pieces.model"), other, ["--shard-mb", "0.02"])):
        config = config_of(replace(data_config, tokenizer=tokenizer), root, name=kind, model=shape)
        run, params = run_of(config)
        export.main([run, str(root / kind), *flags])
        out[kind] = SimpleNamespace(
            run=run, params=params, shape=shape, out=root / kind, tokenizer=train.load(run)[2],
            fast=transformers.AutoTokenizer.from_pretrained(root / kind))
    return out


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_transformers_computes_the_logits_of_an_exported_run(exported, kind):
    e = exported[kind]
    ids = ids_of(e.shape.vocab)
    expected = ours(e.params, ids, e.shape)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(theirs(e.out, ids), expected, atol=1e-4)


def test_what_lies_beside_the_weights(exported, data_config):
    for kind, e in exported.items():
        files = sorted(file.name for file in e.out.glob("*.safetensors"))
        if kind == "pieces":
            index = json.loads((e.out / "model.safetensors.index.json").read_text())
            assert len(files) > 3 and {*index["weight_map"].values()} == {*files}
            assert index["metadata"]["total_size"] == 4 * model.count(e.shape)
        else:
            assert files == ["model.safetensors"]
        ends = transformers.GenerationConfig.from_pretrained(e.out)
        assert (ends.bos_token_id, ends.eos_token_id) == (e.tokenizer.bos, e.tokenizer.eos)
        assert (e.fast.bos_token_id, e.fast.eos_token_id) == (e.tokenizer.bos, e.tokenizer.eos)
        assert len(e.fast) == e.tokenizer.vocab == e.shape.vocab
        assert (e.out / "tokenizer.model").read_bytes() == e.tokenizer.model
        cache = build("corpus", data_config, e.tokenizer, 0)
        card = (e.out / "README.md").read_text()
        assert f"{model.count(e.shape):,}" in card and cache.total["fingerprint"] in card


def test_weights_in_bfloat16_are_the_nearest(exported, tmp_path):
    e = exported["bytes"]
    export.main([e.run, str(tmp_path / "out"), "--dtype", "bfloat16"])
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert {x.dtype for x in got.values()} == {torch.bfloat16}
    equal(got["model.embed_tokens.weight"].float().numpy(), e.params["embed"].astype("bfloat16"))


def test_an_exported_run_is_a_start_too(exported, tmp_path):
    """Its shape, parameters and ids; without the tokenizer.json, its very tokenizer."""
    for kind, e in exported.items():
        shape, back = read(f"hf:{e.out}")
        assert shape == e.shape
        for n, x in e.params.items():
            equal(back[n], x)
        tokenizer, text = read_hf_tokenizer(f"hf:{e.out}"), "the tree \u2581\n<s>樹木"
        assert tokenizer.encode(text) == list(e.tokenizer.encode(text)) and tokenizer.decode(
            [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]) == text
        assert (tokenizer.bos, tokenizer.eos) == (e.tokenizer.bos, e.tokenizer.eos)
        assert tokenizer.vocab == shape.vocab
        for file in ("config.json", "tokenizer.model"):
            (tmp_path / kind).mkdir(exist_ok=True)
            shutil.copy(e.out / file, tmp_path / kind)
        assert read_hf_tokenizer(f"hf:{tmp_path / kind}").model == e.tokenizer.model


AWKWARD = [" ", "  ", "\n", "\r\n", "\t", "\x00", "\x10", "\x10e", "\x10b", "\x10c", "\u2581", "\u2585",
           "<s>", "</s>", "<unk>", "<0x0A>", "é", "e\u0301", "木", "🌳", "\ufeff", "the ", "\U0010ffff"]
anything = st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join),
                     st.text(st.sampled_from("\x10ebc\u2581\u2585 the\n")))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@settings(max_examples=300)
@given(text=anything)
@example("")
@example("\u2581 \x10b\u2585\x10<s>")
def test_the_fast_tokenizer_gives_our_ids_for_every_text(exported, kind, text):
    mine, fast = exported[kind].tokenizer, exported[kind].fast
    ids = [int(i) for i in mine.encode(text)]
    assert fast(text, add_special_tokens=False)["input_ids"] == ids
    assert fast(text)["input_ids"] == [mine.bos, *ids]
    assert fast.decode([mine.bos, *ids, mine.eos], skip_special_tokens=True) == text


@pytest.mark.parametrize("letters,size", [("ab", 300), ("a", 272), ("abc", 330)])
def test_ties_between_merges_are_broken_as_sentencepiece_does(letters, size):
    """All short texts of few letters, and long ones, under pieces that overlap themselves in many ways.

    A merge of tokenizers has a rank, and no place: here any order of a piece's cuts has to give the same.
    """
    rng = np.random.default_rng(len(letters))

    def drawn(n):
        return "".join(rng.choice(list(letters), n))

    texts = [drawn(40) for _ in range(300)] if len(letters) > 1 else ["a" * n for n in range(1, 60)]
    mine = SentencePiece(train_bpe(texts, size))
    made = export.fast_tokenizer(mine)[0]
    tried = ["".join(t) for n in range(9) for t in itertools.product(letters, repeat=n)]
    tried += [drawn(200) for _ in range(500)]
    score = {p: i for i, p in enumerate(dict.fromkeys(a + b for a, b in made["model"]["merges"]))}
    back = sorted(reversed(made["model"]["merges"]), key=lambda pair: score["".join(pair)])
    for order in (made["model"]["merges"], back):
        fast = tokenizers.Tokenizer.from_str(json.dumps(made | {"model": made["model"] | {"merges": order}}))
        got = fast.encode_batch(tried, add_special_tokens=False)
        assert [e.ids for e in got] == mine.encode_batch(tried)


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
    config = config_of(data_config, tmp_path, model=tiny, reparam=partial(scaled_at, by=2.0))
    params = model.init(tiny, jax.random.key(0))
    used = export.llama_params(config, params, 3)
    equal(used["down"], params["down"] * 2.3)
    assert used["up"] is params["up"]


@pytest.mark.parametrize("fields,word", [
    (dict(model=dict(qk_norm=True)), "model.qk_norm"), (dict(model=dict(embed=30)), "model.embed"),
    (dict(reparam=by_batch), "function of the batch"), (dict(reparam=low_rank), "reparam gives")],
    ids=["qk_norm", "embed", "batch", "names"])
def test_what_is_not_llama_is_refused(tiny, data_config, tmp_path, fields, word):
    fields = fields | dict(model=replace(tiny, **fields.get("model", {})))
    config = config_of(data_config, tmp_path, **fields)
    with pytest.raises(InputError, match=word):
        export.llama_params(config, model.init(config.model, jax.random.key(0)), 1)


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not empty"):
        export.main(["nowhere", str(tmp_path)])


# ---------------------------------------------------------------------------------------------------- import


def llama(directory: Path, dtype="float32", old: bool = False, shard: str = "1GB", **fields) -> str:
    """hf:DIR of a model with random weights that transformers made; old: config.json as of transformers 4."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 20_000.0} | fields.pop("rope", {})
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dict(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, rope_parameters=rope,
        bos_token_id=256, eos_token_id=257) | fields))
    with torch.no_grad():
        for x in net.parameters():
            x.add_(0.1 * torch.randn(x.shape))
    net.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    if old:
        rope = dict(rope)
        theta = rope.pop("rope_theta")
        change(directory, rope_parameters=None, dtype=None, torch_dtype=dtype, rope_theta=theta,
               rope_scaling=None if rope["rope_type"] == "default" else rope)
    return f"hf:{directory}"


def change(directory: Path, **fields):
    """Write fields of a config.json; None takes one out."""
    file = directory / "config.json"
    written = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in written.items() if v is not None}))


@pytest.mark.parametrize("fields", [
    dict(), dict(old=True), dict(rope=SCALED), dict(rope=SCALED, old=True, dtype="bfloat16", shard="20KB"),
    dict(rope=dict(rope_type="linear", factor=4.0), tie_word_embeddings=True),
    dict(rope=dict(rope_type="linear", factor=4.0), old=True, num_key_value_heads=4, head_dim=16),
    dict(tie_word_embeddings=True, dtype="bfloat16", num_key_value_heads=1)],
    ids=lambda fields: " ".join(map(str, fields)) or "plain")
def test_an_imported_model_has_the_logits_of_transformers(tmp_path, fields):
    name = llama(tmp_path, **fields)
    shape, params = read(name)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or "shard" in fields
    ids = ids_of(shape.vocab)
    expected = theirs(tmp_path, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours(params, ids, shape), expected, atol=1e-4)


def test_each_device_of_a_mesh_gets_its_part(tmp_path):
    name = llama(tmp_path)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    (shape, whole), (_, parts) = read(name), read(name, mesh)
    where = shardings(model.table(shape), make_mesh(mesh))
    for n, x in whole.items():
        equal(parts[n], x)
        assert parts[n].sharding == where[n] and parts[n].dtype == jnp.float32


@pytest.mark.parametrize("fields,word", [
    (dict(model_type="mistral"), "model_type.*'mistral'.*'llama'"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "rope_type.*'yarn'.*'llama3'"),
    (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (dict(quantization_config={}), "quantization_config"), (dict(hidden_size=None), "hidden_size"),
    (dict(rope_parameters=dict(rope_type="linear")), "factor"),
    (dict(intermediate_size=81), r"mlp.*\[80, 48\].*\[81, 48\]"), (dict(num_hidden_layers=3), "layers.2"),
    (dict(num_hidden_layers=1), "layers.1")], ids=str)
def test_another_architecture_is_refused_by_its_field(tmp_path, fields, word):
    name = llama(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(InputError, match=word):
        read(name)


def test_what_is_no_directory_or_is_cut_short_is_refused(tmp_path):
    with pytest.raises(InputError, match="no local Hugging Face directory"):
        read(f"hf:{tmp_path}")
    name = llama(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        read(name)


def test_the_rope_scaling_of_a_config_is_checked(tiny, data_config, tmp_path):
    for scaling in ((1.0, 2.0), (0.0,), (8.0, 4.0, 4.0, 32.0), (8.0, 1.0, 4.0, float("inf"))):
        with pytest.raises(InputError, match="model.rope_scaling"):
            train.check(config_of(data_config, tmp_path, model=replace(tiny, rope_scaling=scaling)))
    for scaling in ((), (2.0,), LLAMA3):
        train.check(config_of(data_config, tmp_path, model=replace(tiny, rope_scaling=scaling)))


# ------------------------------------------------------------------------------------------- their tokenizers


@pytest.fixture(scope="module")
def bpe(corpus) -> SimpleNamespace:
    """Makes a byte-level BPE tokenizer as Llama 3 and SmolLM2 have one, in a directory with a config.json."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train([str(file) for file in corpus.rglob("*.txt")], tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>", "<|turn|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    made.enable_truncation(4)

    def save(directory: Path, bos: str | None, eos: str | None = "<|endoftext|>", **config) -> str:
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos)
        fast.save_pretrained(directory)
        if not (directory / "config.json").exists():
            (directory / "config.json").write_text(json.dumps({"vocab_size": 300}))
        change(directory, bos_token_id=None, eos_token_id=None)
        change(directory, **config)
        return f"hf:{directory}"

    return SimpleNamespace(save=save, size=made.get_vocab_size())


@pytest.mark.parametrize("bos,config,ends", [
    (None, {}, (0, 0)), ("<|turn|>", {}, (1, 0)), (None, dict(eos_token_id=[1, 0]), (1, 1)),
    ("<|turn|>", dict(bos_token_id=0, eos_token_id=1), (0, 1))], ids=["none", "by name", "several", "by id"])
def test_the_ends_of_a_document_are_found(bpe, tmp_path, bos, config, ends):
    tokenizer = read_hf_tokenizer(bpe.save(tmp_path, bos, **config))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab) == (*ends, 300)


def test_their_tokenizer_is_kept_in_one_file(bpe, tmp_path):
    """With more rows than tokens; what spells special tokens is text, they are nothing; not truncated."""
    tokenizer = read_hf_tokenizer(bpe.save(tmp_path, None))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    again = load_tokenizer(tmp_path / "tokenizer.model")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert bpe.size < again.vocab == 300 and again.model == tokenizer.model
    texts = ["", "the tree is cut back", "été 樹木 🌳\n\n  x", "<|endoftext|> and <|turn|>"]
    batch = again.encode_batch(texts)
    assert batch == [again.encode(t) for t in texts] == [tokenizer.encode(t) for t in texts]
    assert batch == [fast(t, add_special_tokens=False, truncation=False)["input_ids"] for t in texts]
    for text, ids in zip(texts, batch, strict=True):
        assert again.decode([again.bos, *np.array(ids, np.int32), again.eos, 299]) == text
        assert not {0, 1} & {*ids}


def test_tokenizers_that_do_not_fit_are_refused(bpe, tmp_path):
    with pytest.raises(InputError, match=f"{bpe.size} tokens.*{bpe.size - 1} rows"):
        read_hf_tokenizer(bpe.save(tmp_path, None, vocab_size=bpe.size - 1))
    with pytest.raises(InputError, match="eos_token_id"):
        read_hf_tokenizer(bpe.save(tmp_path, None, None))
    with pytest.raises(InputError, match="hf:DIRECTORY"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    change(tmp_path, eos_token_id=0)
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        read_hf_tokenizer(f"hf:{tmp_path}")


# -------------------------------------------------------------------------------------------- runs from there


def test_a_run_starts_from_a_directory_and_resumes_without_it(bpe, data_config, tmp_path):
    """Also on a mesh, to the same losses. A round trip through export leaves each bit of an untrained one."""
    name = llama(tmp_path / "hub", rope=SCALED)
    bpe.save(tmp_path / "hub", None)
    plain = replace(data_config, tokenizer="bpe")
    config = config_of(plain, tmp_path, init_from=name, model=ModelConfig(remat="elementwise"))
    begun = train.prepare(config)
    assert begun.config.model == replace(read_shape(name), remat="elementwise")
    assert begun.tokenizer.vocab == 300 and begun.tokenizer.eos == 0
    assert train.train(config)["step"] == 2
    on_mesh = replace(config, name="meshed", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    meshed = train.prepare(on_mesh)
    assert train.train(on_mesh)["step"] == 2

    def losses(run):
        rows = map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
        return [row["train/loss"] for row in rows if "train/loss" in row]

    np.testing.assert_allclose(losses(begun), losses(meshed), rtol=1e-4)
    shape, params = read(name)
    batch = begun.loader.batch(1).arrays
    first = model.losses(params, batch, Mask("causal", 0), shape)
    assert losses(begun)[0] == pytest.approx(float(np.average(first, weights=batch["weights"])), rel=1e-5)

    shutil.move(tmp_path / "hub", tmp_path / "elsewhere")
    more = replace(config, phases=(replace(config.phases[0], steps=4),))
    longer = train.prepare(more)
    assert train.train(more)["step"] == 4 and longer.tokenizer.model == begun.tokenizer.model
    with pytest.raises(InputError, match="no local Hugging Face directory"):
        train.prepare(replace(config, name="anew"))
    export.main([str(longer.directory), str(tmp_path / "back")])
    end, trained = read(f"hf:{tmp_path / 'back'}")
    assert end == shape
    for n, x in train.load(str(longer.directory))[0].items():
        equal(trained[n], x)
    assert read_hf_tokenizer(f"hf:{tmp_path / 'back'}").model == begun.tokenizer.model


def test_a_directory_has_no_optimiser(data_config, tmp_path):
    with pytest.raises(InputError, match='init_with is "all".*"params"'):
        train.prepare(config_of(data_config, tmp_path, init_from=f"hf:{tmp_path}", init_with="all"))
