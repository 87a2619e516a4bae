"""Evaluation and generation of models with functions of their own."""
import importlib.util
import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import strong

import model
import train
from data import DataConfig, Loader, Source, causal, text
from lib.config import ROOT, from_json, load_file, to_json
from lib.continuations import continuations, continue_prompts
from lib.corpus import assemble
from lib.errors import InputError
from lib.evals import generate, held_out, own_evals, sharded_apply
from lib.evaluate import Setting, dev_figures, evaluators, open_source
from lib.generate import CHUNK, sampling
from lib.generate import generate as generate_ids
from lib.generate import prepare as prepared
from lib.hf import tensors
from lib.kernels import Mask
from lib.own_loss import batches, is_plain, own_losses, summing
from lib.packing import one_per_row
from lib.plain import computes_llama, predicts_pieces
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.tokenizers import Bytes
from train import Config, Phase

equal = np.testing.assert_array_equal
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
PROMPTS = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (5, 1, 33, 40)]
prepare = jax.jit(prepared, static_argnames="config")


# ------------------------------------------------------------------- models with functions of their own


def wrapped(params, batch, mask, config):
    """The plain Llama under another name, which keeps no cache."""
    return model.llama(params, batch, mask, config)


def one_number(params, states, batch, config):
    """Outputs of a regression: one number a position."""
    return states[..., :1]


def of_numbers(params, batch, mask, config):
    """A forward pass that reads an array which only an objective makes."""
    x = model.embedded(params, batch, config) + batch["numbers"]
    return model.stream(params, x, batch, mask, config)[0]


def low_rank(config, rows):
    """Rows of a model whose `down` is a product of two smaller matrices, beside the rows of the others."""
    layers, mlp, embed = rows["down"].shape
    left = model.Param(("layers", "mlp", "rank"), (layers, mlp, 4), 0.3)
    right = model.Param(("layers", "rank", "embed"), (layers, 4, embed), 0.3)
    return {name: row for name, row in rows.items() if name != "down"} | {"left": left, "right": right}


def adapted(config, rows):
    """Rows of an adapter, beside all of the plain ones."""
    return rows | {"left": low_rank(config, rows)["left"], "right": low_rank(config, rows)["right"]}


def multiplied(params, step, batch):
    """The plain Llama's `down` of the two matrices, which stay."""
    return params | {"down": params["left"] @ params["right"]}


def partly(params, step, batch):
    """A reparam that leaves out the row it should make."""
    return dict(params)


def made(params, config, **more):
    """20 ids after each prompt, drawn by seeds 0, 1, ..."""
    how = more.pop("how", sampling(1.0))
    more = dict(tokens=20, eos=-1) | more
    weights = prepare(params, config=config)
    return generate_ids(weights, PROMPTS, seeds=[*range(4)], how=how, config=config, **more)


def mesh_of(devices: int):
    """A mesh of so many devices, all for rows."""
    return make_mesh(MeshConfig(), jax.devices()[:devices])


def on_mesh(params, config, devices: int = 1):
    """Parameters as a run of a config on such a mesh has them."""
    return jax.device_put(params, shardings(model.table(config), mesh_of(devices)))


# ------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("how", [sampling(0.0), sampling(1.0), sampling(0.8, 40, 0.9)], ids=["0", "1", "few"])
def test_without_a_cache_the_same_ids_are_made(tiny, how):
    """Of prompts on both sides of a width, with draws, ends and rows that a caller ends."""
    own, params = replace(tiny, forward=wrapped), strong(tiny)
    assert computes_llama(tiny) and not computes_llama(own)
    plain = made(params, tiny, how=how)
    equal(made(params, own, how=how), plain)
    equal(made(params, own, how=how, pace=3), plain)
    eos = int(plain[0, 7])
    equal(made(params, own, how=how, eos=eos), made(params, tiny, how=how, eos=eos))
    heed = partial(np.equal, 2)  # not called with ids but to end rows by their number

    def third(ids):
        return heed(np.arange(4)) & (ids.shape[1] >= CHUNK)

    ended = made(params, own, how=how, heed=third)
    equal(ended, made(params, tiny, how=how, heed=third))
    assert (ended[2, CHUNK:] == -1).all() and (ended[1] == plain[1]).all()


def test_without_a_cache_on_eight_devices(tiny):
    own, params = replace(tiny, forward=wrapped), strong(tiny)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    placed = jax.device_put(params, shardings(model.table(own), mesh))
    with jax.set_mesh(mesh):
        found = made(placed, own)
    equal(found, made(params, tiny))


def test_stored_rows_that_become_a_llama_keep_the_cache(tiny):
    """What `reparam` makes is read by the plain table's names; the rows that it leaves are not."""
    config = Config(model=replace(tiny, rows=low_rank), reparam=multiplied)
    params = model.init(config.model, jax.random.key(0))
    assert computes_llama(config.model)
    plain = {n: x for n, x in multiplied(params, 0, None).items() if n in model.plain_table(tiny)}
    how = sampling(0.7)
    found = [continue_prompts(on_mesh(p, c.model), c, Bytes(), 3, ["def f", "x"], how, 24, 5)
             for p, c in ((params, config), (plain, Config(model=tiny)))]
    assert found[0] == found[1] and len({one.text for one in found[0]}) == 2


def test_prompts_are_texts_or_ids(tiny):
    params, config = on_mesh(strong(tiny), tiny), Config(model=tiny)
    setting = Setting(config, config.phases[0], {}, Bytes(), None)
    ids = [Bytes.bos, *b"tree"]
    texts = generate(params, 1, setting, ["tree", ids, np.array(ids)], tokens=9)
    assert texts[0] == texts[1] == texts[2] != ""
    stop = texts[0][3:5]
    assert generate(params, 1, setting, ["tree"], 9, stops=[stop]) == [texts[0][:texts[0].find(stop)]]
    warm = [generate(params, 1, setting, ["a", "b"], 9, 1.0, seed=seed) for seed in (4, 5)]
    assert warm[0][1] == generate(params, 1, setting, ["b"], 9, 1.0, seed=5)[0] and warm[0] != warm[1]
    assert generate(params, 1, setting, []) == []
    assert len(generate(params, 1, replace_config(setting, sample_tokens=2), [[1]])[0].encode()) <= 8
    with pytest.raises(InputError, match="no ids"):
        generate(params, 1, setting, [[]])


def replace_config(setting: Setting, **fields) -> Setting:
    """A setting with other fields in its config."""
    return setting._replace(config=replace(setting.config, **fields))


def test_what_predicts_no_pieces_is_not_sampled_or_measured(tiny, cache, data_config):
    """Neither fails: they are left out. A user who asks for samples is told why there are none."""
    params = strong(tiny)
    for fields in (dict(outputs=one_number), dict(forward=of_numbers)):
        shape = replace(tiny, **fields)
        config = Config(model=shape, data=data_config, phases=(Phase(seq=32),))
        assert not predicts_pieces(None, shape, 32)
        assert continuations(params, config, Bytes(), 1, ["a"]) == ""
        with pytest.raises(InputError, match="nothing can be sampled"):
            continue_prompts(params, config, Bytes(), 1, ["a"], sampling(0), 4)
        setting = Setting(config, config.phases[0], {"corpus": cache}, Bytes(), None)
        assert dev_figures(None, params, 1, setting) == {}
    assert predicts_pieces(None, tiny, 32) and predicts_pieces(None, replace(tiny, forward=wrapped), 32)
    assert predicts_pieces(multiplied, replace(tiny, rows=low_rank, forward=wrapped), 32)


# --------------------------------------------------------------------------------- what evals are told


@pytest.mark.parametrize("devices", [1, 8])
def test_apply_takes_ids_batches_and_masks(tiny, devices):
    """Rows that the mesh does not divide are filled up; a mask and segments change what is seen."""
    params, rng = strong(tiny), np.random.default_rng(0)
    ids = rng.integers(0, 256, (3, 12)).astype(np.int32)
    mesh = mesh_of(devices)
    apply = sharded_apply(evaluators(None, tiny, mesh)[1], 1, mesh)
    placed = on_mesh(params, tiny, devices)
    plain = model.apply(params, ids, tiny)
    close(apply(placed, ids), plain)
    close(apply(placed, ids.tolist()), plain)
    close(apply(placed, {"tokens": ids}), plain)
    both = Mask("bidirectional", 0)
    close(apply(placed, ids, both), model.apply(params, ids, tiny, both))
    assert np.abs(apply(placed, ids, both) - plain).max() > 1e-2
    halves = dict(tokens=ids, segments=np.repeat([[1, 2]], 6, 1).repeat(3, 0),
                  positions=np.tile(np.arange(6), 2)[None].repeat(3, 0))
    found = apply(placed, halves)
    close(found[:, 6:], model.apply(params, ids[:, 6:], tiny))
    prefix = np.tile(np.arange(12) < 5, (3, 1)).astype(np.int32)
    seen = apply(placed, dict(tokens=ids, prefix=prefix), Mask("prefix", 0))
    close(seen, model.apply(params, dict(tokens=jnp.asarray(ids), prefix=jnp.asarray(prefix)), tiny,
                            Mask("prefix", 0)))
    assert np.abs(seen - plain).max() > 1e-2


def asks(params, apply, tokenizer, config, generate, held_out, source: str = "corpus"):
    """An evals that asks for everything."""
    counted = sum((document >= 0).sum() for _, document in held_out(source).batches())
    read = held_out(source, "train", most=500)
    texts = [one.decode() for one in read.texts()]
    first = generate([texts[0][:4]], tokens=3)[0]
    logits = apply(params, [[tokenizer.bos, *tokenizer.encode(texts[0][:4])]], Mask("causal", 2))
    return {"counted": float(counted), "texts": len(texts), "chars": len(first),
            "layers": config.model.layers, "logits": float(logits.sum())}


def test_evals_are_told_what_they_ask_for(tiny, cache, corpus, data_config):
    config = Config(model=tiny, data=data_config, phases=(Phase(batch=3, seq=64),), overlap=8,
                    evals=(asks, lambda params, apply: {"plain": 1.0}))
    mesh = mesh_of(1)
    setting = Setting(config, config.phases[0], {"corpus": cache}, Bytes(), mesh)
    params = on_mesh(strong(tiny), tiny)
    found = own_evals(evaluators(None, tiny, mesh)[1], params, 2, setting)
    dev = held_out(setting, "corpus")
    sizes = [(corpus / path).stat().st_size + 1 for path in dev.paths]
    assert found["counted"] == sum(sizes) and found["plain"] == 1 and found["layers"] == 2
    assert found["texts"] == len(held_out(setting, "corpus", "train", 500).paths) > 0
    assert (dev.seq, dev.batch, dev.overlap) == (64, 3, 8)
    for wrong, said in ((dict(source="corps"), "allowed are corpus"), (dict(source="corpus", split="all"),
                        "allowed are train, dev, test")):
        with pytest.raises(InputError, match=said):
            held_out(setting, **wrong)


# ------------------------------------------------------------------------------ the loss that is trained


def also_causal(row, rng, share: float = 0.0):
    """Equal to `causal`, but not the same function: what a partial of it comes to."""
    assert not share
    return causal(row, rng)


def every_third(row, rng, tokenizer, progress):
    """Loss on a random third of the positions, and a number that the row is scaled by."""
    chosen = rng.random(len(row["tokens"])) < 1 / 3
    scale = np.full(len(chosen), 1 + rng.random() * (tokenizer.vocab > 2), np.float32)
    assert 0 <= progress < 1
    return row | dict(weights=row["weights"] * chosen, scale=scale), dict(kind="causal", window=0)


def scaled(logits, batch, extras):
    """Nats times the scale of the row, and the stored count of steps."""
    return model.cross_entropy(logits, batch, extras) * batch["scale"] + 0 * extras["step"]


def squares(losses, batch, extras):
    """A mean by squared weights, with a metric."""
    weights = batch["weights"] ** 2 * 2
    largest = jnp.max(jnp.where(weights > 0, losses, 0))
    return (jnp.sum(losses * weights), jnp.sum(weights)), {"own/most": largest}


def trained(data_config, tiny, devices: int = 1, caches=None, **phase):
    """(own losses, batches of them, setting, params) of a run of one phase."""
    fields = dict(steps=8, batch=8, seq=64, packing=one_per_row) | phase
    config = Config(model=tiny, data=data_config, phases=(Phase(**fields),), overlap=8, eval_tokens=4_000)
    config, tokenizer, found = assemble(config)
    mesh = mesh_of(devices)
    caches = caches or found
    setting = Setting(config, config.phases[0], caches, tokenizer, mesh)
    loader = Loader(caches, config.phases, config.data, tokenizer, config.seed)
    loss = train.loss_of(config, config.model, setting.phase)
    params = on_mesh(strong(tiny), tiny, devices)
    if is_plain(loss, setting.phase, caches):
        return {}, [], setting, params
    own = own_losses(summing(loss, mesh), params, 3, 3, setting, loader)
    return own, [*batches(setting, loader, 0, 3)], setting, params


def test_the_own_loss_is_the_same_sum_over_dev_rows(data_config, tiny):
    """By hand: rows as the phase packs them, their draws by (seed, source, row), the phase's functions."""
    fields = dict(objective=every_third, token_loss=scaled, reduce=squares)
    own, made_, setting, params = trained(data_config, tiny, **fields)
    assert 2 <= len(made_) <= 4_000 // 64 // 8
    top, bottom, most = 0.0, 0.0, []
    dev = b"".join(held_out(setting, "corpus").texts()).decode()
    for number, (arrays, mask) in enumerate(made_):
        assert mask == Mask("causal", 0)
        for r in range(8):
            rng = np.random.default_rng([0, 0, 8 * number + r])
            chosen = rng.random(64) < 1 / 3
            assert not arrays["weights"][r][~chosen].any()
            assert arrays["scale"][r, 0] == np.float32(1 + rng.random())
            real = arrays["segments"][r] > 0
            piece = Bytes().decode([i for i in arrays["tokens"][r][real] if i < 256])
            assert piece.strip("\ufffd") in dev
        each = model.losses(params, arrays, mask, tiny) * arrays["scale"]
        weights = 2 * arrays["weights"] ** 2
        top, bottom = top + float((each * weights).sum()), bottom + float(weights.sum())
        most.append(float(np.where(weights > 0, each, 0).max()))
    assert own == {"eval/corpus/own": pytest.approx(top / bottom, rel=1e-5),
                   "eval/corpus/own/most": pytest.approx(np.mean(most), rel=1e-5)}


def test_the_own_loss_does_not_change_with_the_mesh_or_the_parts(data_config, tiny):
    fields = dict(objective=every_third, token_loss=scaled)
    one, rows, _, _ = trained(data_config, tiny, 1, **fields)
    eight, same, _, _ = trained(data_config, tiny, 8, **fields)
    assert one == {name: pytest.approx(value, rel=1e-5) for name, value in eight.items()}
    for (a, _), (b, _) in zip(rows, same, strict=True):
        assert all((a[name] == b[name]).all() for name in a)
    parts, halves, _, _ = trained(data_config, tiny, accumulate=2, **fields)
    assert len(halves) >= 2 * len(rows) and halves[0][0]["tokens"].shape == (4, 64)
    assert [*parts] == [*one]


def test_where_it_says_what_bits_per_byte_say_it_is_the_same_figure(tiny, tmp_path):
    """With documents that fit a row; the plain loss is not measured twice."""
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"a short text of number {i} " + "tree " * (i % 7))
    source = Source(partial(text, path=str(tmp_path)))
    data = DataConfig(sources={"corpus": source}, tokenizer="bytes", dev=0.4, test=0.1)
    assert trained(data, tiny)[0] == {}
    own, rows, setting, params = trained(data, tiny, objective=partial(also_causal, share=0.0), batch=1)
    losses, _ = evaluators(None, tiny, setting.mesh)
    dev = dev_figures(losses, params, 3, setting)
    assert len(rows) == len(open_source(setting, "corpus", "dev").places) > 9
    assert own == {"eval/corpus/own": pytest.approx(dev["eval/corpus/loss"], rel=1e-6)}
    z = trained(data, tiny, token_loss=partial(model.cross_entropy, z=1e-4), batch=1)[0]
    assert z["eval/corpus/own"] > own["eval/corpus/own"]


def test_a_source_without_dev_documents_is_left_out(data_config, tiny):
    source = data_config.sources["corpus"]
    both = replace(data_config, sources={"corpus": source, "drills": replace(source, split="train")})
    own, _, setting, params = trained(both, tiny, objective=dict(corpus=every_third))
    assert [*own] == ["eval/corpus/own"]
    losses, _ = evaluators(None, tiny, setting.mesh)
    assert {name.split("/")[1] for name in dev_figures(losses, params, 3, setting)} == {"corpus"}
    few = trained(data_config, tiny, objective=every_third, batch=1024)[1]
    tokens = few[0][0]["tokens"]
    assert len(few) == 1 and len(tokens) == 1024  # less than one batch: the rows come again
    there = 4_000 // 64
    equal(tokens[there:2 * there], tokens[:there])


# ---------------------------------------------------------------------------------------- runs, export


def steered(progress, log, least: str = "eval/corpus/own"):
    """A mixture that the whole row decides on."""
    return {"corpus": 1.0 + (log[-1][least] if log else 0.0)}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, data_config):
    """A run of a model with a forward pass of its own on eight devices, by an objective of its own."""
    phase = Phase(steps=4, batch=8, seq=32, objective=every_third, mixture=steered, steer=2,
                  reduce=squares)
    config = Config(
        name="own", runs=str(tmp_path_factory.mktemp("runs")), model=replace(tiny, forward=wrapped),
        overlap=8, data=data_config, phases=(phase,), eval_every=2, eval_tokens=600, evals=(asks,),
        sample_tokens=6,
        eval_at=(0,), prompts=("a",), save_every=2)
    train.check(config)
    train.train(config, __file__)
    return config


def test_a_run_reports_its_own_loss_and_the_log_holds_the_row(run):
    lines = (train.Path(run.runs) / "own/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "eval/corpus/own" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    wanted = {"eval/corpus/bpb", "eval/corpus/own/most", "counted", "logits"}
    assert all(wanted <= row.keys() for row in rows)
    again = train.prepare(run, __file__)
    with train.opened(again):
        train.resume(again)
    log, = again.loader.log
    names = [name for name in rows[1] if "/own" in name or name == "counted"]
    assert len(log) == 1 and len(names) == 3 and all(log[0][name] == rows[1][name] for name in names)


def test_a_run_of_a_forward_pass_of_its_own_is_loaded_sampled_and_evaluated(run, capsys):
    directory = str(train.Path(run.runs) / "own")
    params, config, tokenizer, apply = train.load(directory)
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    close(apply(params, ids), model.apply(params, ids, replace(config.model, forward=model.llama)))
    both = Mask("bidirectional", 0)
    close(apply(params, {"tokens": ids}, both), model.apply(params, ids, config.model, both))
    assert (train.Path(directory) / "samples.txt").read_text().startswith("a")
    assert train.main(["sample", directory, "--prompt", "x", "--tokens", "4", "--temperature", "0"]) == 0
    capsys.readouterr()
    assert train.main(["eval", directory]) == 0
    found = json.loads((train.Path(directory) / "eval.json").read_text())
    assert {"eval/corpus.test/bpb", "counted", "texts"} <= found.keys()
    assert train.main(["export", directory, directory + "/hf"]) == 2
    assert "model.forward is wrapped" in capsys.readouterr().err
    assert computes_llama(from_json(model.ModelConfig, json.loads(json.dumps(to_json(model.ModelConfig())))))


def test_only_a_plain_llama_is_exported(tiny):
    """Adapters that a reparam merges go; what no reparam makes plain is refused in one sentence."""
    if importlib.util.find_spec("safetensors") is None:
        pytest.skip("export needs safetensors")
    export = load_file(ROOT / "tools/export.py")
    refused = (
        (dict(forward=wrapped), None, "model.forward is wrapped"),
        (dict(outputs=partial(one_number)), None, "model.outputs is one_number"),
        (dict(rows=adapted), None, r"model.rows stores other .*\(left, right\)"),
        (dict(rows=low_rank), None, r"\(down, left, right\)"),
        (dict(rows=low_rank), partly, "reparam: partly of .* down with the shape"))
    for fields, reparam, said in refused:
        config = Config(model=replace(tiny, **fields), reparam=reparam)
        params = model.init(config.model, jax.random.key(0))
        with pytest.raises(InputError, match=said):
            export.llama_params(config, params, 1)
    for rows in (adapted, low_rank):
        config = Config(model=replace(tiny, rows=rows), reparam=multiplied)
        params = model.init(config.model, jax.random.key(0))
        used = export.llama_params(config, params, 1)
        assert [*used] == [*model.plain_table(tiny)]
        close(used["down"], params["left"] @ params["right"])
        assert tensors(config.model) == tensors(tiny)
        assert export.size_of(config.model) == model.count(tiny)
