"""Generation: a batch against its rows, a cache against recomputing, draws against closed form."""
import io
import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import strong
from hypothesis import given, settings
from hypothesis import strategies as st

import model
import train
from lib import generate as generation
from lib.continuations import continuations, read_text, settled
from lib.generate import CHUNK, Sampling, generate, padded, pick, prefill
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.tokenizers import Bytes

equal = np.testing.assert_array_equal
GREEDY, WARM = Sampling(np.float32(0)), Sampling(np.float32(1))
FEW = Sampling(np.float32(0.8), np.float32(40), np.float32(0.9))
PROMPTS = [np.random.default_rng(n).integers(0, 256, n).tolist() for n in (5, 1, 33, 40)]
narrow = jax.jit(generation.narrow)
prepare = jax.jit(generation.prepare, static_argnames="config")


@pytest.fixture(scope="module")
def untied(tiny):
    return replace(tiny, tied=False, qk_norm=True)


@pytest.fixture(scope="module")
def params(untied):
    """Of the tiny model, with an untied head and QK-norm."""
    return strong(untied)


def made(params, config, prompts, tokens=20, how=WARM, seeds=None, eos=-1, **others):
    """`generate` with these parameters; rows draw by seeds 0, 1, ..."""
    weights = prepare(params, config=config)
    seeds = range(len(prompts)) if seeds is None else seeds
    return generate(weights, prompts, tokens, [*seeds], how, eos, config, **others)


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_generation_equals_recomputing_everything(tiny, untied, params, monkeypatch, tied):
    """Each id is the likeliest by the whole model without a cache, which grows on the way to 40 tokens."""
    monkeypatch.setattr(generation, "ROOM", 64)
    config, tokens = (tiny, 20) if tied else (untied, 40)
    apply = jax.jit(model.apply, static_argnames="config")
    used = {name: params[name] for name in model.table(config)}
    got = made(used, config, PROMPTS[:2], tokens, GREEDY)
    for prompt, row in zip(PROMPTS, got, strict=False):
        ids = np.zeros((1, 64), np.int32)
        ids[0, :len(prompt) + tokens] = [*prompt, *row]  # right of what is asked, nothing matters
        best = np.argmax(apply(used, ids, config=config)[0], -1)
        equal(best[len(prompt) - 1:len(prompt) + tokens - 1], row)
    assert tied or len(np.unique(got)) > 4  # not one id for ever, which would hide much


@pytest.mark.parametrize("how", [GREEDY, WARM, FEW], ids=["greedy", "warm", "few"])
def test_a_batch_is_its_rows_alone(untied, params, how):
    """Of lengths on both sides of a width, each with its own seed, in any order."""
    whole = made(params, untied, PROMPTS, how=how)
    for i, prompt in enumerate(PROMPTS):
        equal(made(params, untied, [prompt], how=how, seeds=[i])[0], whole[i])
    equal(made(params, untied, PROMPTS[::-1], how=how, seeds=range(4)[::-1]), whole[::-1])


def test_draws_depend_on_the_seed_and_the_place_alone(untied, params):
    """Another seed draws otherwise; a longer generation continues a shorter one, at any pace."""
    whole = made(params, untied, PROMPTS[:2])
    assert np.any(whole != made(params, untied, PROMPTS[:2], seeds=[5, 6])) and whole.max() < 258
    equal(made(params, untied, PROMPTS[:2], 1), whole[:, :1])
    equal(made(params, untied, PROMPTS[:2], pace=3), whole)


def test_a_row_ends_at_eos_and_the_batch_with_its_last_row(untied, params):
    """After eos comes eos; other rows do not notice; nothing is made once all rows have ended."""
    plain = made(params, untied, PROMPTS[:2])
    first = next(i for i, id in enumerate(plain[0]) if i > 5 and id not in [*plain[0, :i], *plain[1]])
    eos = int(plain[0, first])
    ended = made(params, untied, PROMPTS[:2], eos=eos)
    equal(ended[0], [*plain[0, :first], *[eos] * (20 - first)])
    equal(ended[1], plain[1])
    assert made(params, untied, PROMPTS[:1], 32, eos=eos).shape == (1, CHUNK)
    equal(made(params, untied, PROMPTS[:2], 32, heed=lambda ids: np.array([True, True])), plain[:, :CHUNK])
    half = made(params, untied, PROMPTS[:2], heed=lambda ids: np.array([True, False]))
    equal(half[1], plain[1])
    assert (half[0, CHUNK:] == -1).all()  # eos as `made` has it


def test_eight_devices_give_what_one_does(untied, params):
    """By the table's rules: parts of weights and of the cache live on each device, and ids are the same."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    one = {how: made(params, untied, PROMPTS, how=how) for how in (GREEDY, WARM, FEW)}
    placed = jax.device_put(params, shardings(model.table(untied), mesh))
    with jax.set_mesh(mesh):
        weights = prepare(placed, config=untied)
        for rows in (4, 3):  # the second is one that data and fsdp do not divide
            for how in one:
                got = generate(weights, PROMPTS[:rows], 20, [*range(rows)], how, -1, untied)
                equal(got, one[how][:rows])
        ids, pad = padded(PROMPTS, 0)
        cache = prefill(weights, ids[:, :-1], pad, 128, untied)
    parts = {n: x[0].addressable_shards[0].data.shape for n, x in weights[1][0].items()}
    assert parts["gate"] == (16, 24) and parts["q"] == (16, 1, 2, 8) and parts["down"] == (24, 16)
    assert weights[0]["embed"].addressable_shards[0].data.shape == (129, 16)
    assert cache[0][0].addressable_shards[0].data.size * 8 == cache[0][0].size


def kept(shares, top_k=np.inf, top_p=np.inf):
    """Which of these probabilities `narrow` leaves."""
    scores = jnp.log(jnp.asarray([shares], jnp.float32))
    out = narrow(scores, np.float32(top_k), np.float32(top_p))[0]
    return np.flatnonzero(np.isfinite(out)).tolist()


def test_top_k_and_top_p_on_a_made_distribution():
    made = [0.1, 0.4, 0.05, 0.3, 0.15]
    assert kept(made) == [0, 1, 2, 3, 4] and kept(made, 1) == [1] and kept(made, 3) == [1, 3, 4]
    assert kept(made, top_p=0.39) == [1] and kept(made, top_p=0.41) == kept(made, top_p=0.69) == [1, 3]
    assert kept(made, top_p=0.71) == [1, 3, 4] and kept(made, top_p=0.96) == [0, 1, 2, 3, 4]
    assert kept(made, 3, 0.81) == [1, 3]  # of what is left, 0.82: top_k comes first
    assert kept([0.2, 0.3, 0.3, 0.2], 1) == [1, 2] and kept(made, 99) == [0, 1, 2, 3, 4]
    assert kept([0.5, 0.0, 0.5], 3, 0.99) == [0, 2]


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0.01, 0.99))
def test_no_fewer_would_do(seed, top_k, top_p):
    """What is kept is a beginning of the sorted list, reaches the share, and without its last does not."""
    scores = np.random.default_rng(seed).normal(size=50).astype(np.float32) * 3
    share = np.sort(np.exp(scores) / np.exp(scores).sum())[::-1]
    assert sorted(kept(np.exp(scores), top_k)) == sorted(np.argsort(-scores)[:top_k].tolist())
    n = len(found := kept(np.exp(scores), top_p=top_p))
    assert sorted(found) == sorted(np.argsort(-scores)[:n].tolist())
    assert share[:n].sum() > top_p - 1e-5 and share[:n - 1].sum() < top_p + 1e-5


def test_draws_follow_the_distribution():
    """Of 4,000 rows with a key each, a token's share is its probability at that temperature, of the few."""
    made, rows = np.array([0.1, 0.4, 0.05, 0.3, 0.15]), 4000
    keys = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(jnp.arange(rows))
    scores = jnp.tile(jnp.log(made).astype(jnp.float32), (rows, 1))
    for how in (Sampling(1.0), Sampling(0.5), Sampling(2.0, 3.0), Sampling(1.0, 4.0, 0.8)):
        left = np.zeros(5)
        left[kept(made ** (1 / how.temperature), how.top_k, how.top_p)] = 1
        expected = left * made ** (1 / how.temperature)
        drawn = np.bincount(pick(scores, keys, 3, how), minlength=5) / rows
        np.testing.assert_allclose(drawn, expected / expected.sum(), atol=0.04)
        assert not drawn[left == 0].any()
    equal(pick(scores, keys, 3, Sampling(0.0)), np.ones(rows))


def test_text_ends_before_the_first_stop_or_eos():
    tokenizer, ids = Bytes(), np.array([*b"one. two; three", 257, *b"! four"])
    assert read_text(ids, tokenizer, []) == ("one. two; three", "eos")
    assert read_text(ids, tokenizer, [";", ". "]) == ("one", "stop")
    assert read_text(ids, tokenizer, ["!"]) == ("one. two; three", "eos")
    assert read_text(ids[:6], tokenizer, ["two"]) == ("one. t", "length")


@settings(max_examples=60)
@given(st.lists(st.one_of(st.text(st.sampled_from("aé樹😀\x10ebc ")), st.binary(max_size=3)), max_size=8),
       st.lists(st.sampled_from(["a", "é樹", "ab", "  ", "樹a"]), max_size=2))
def test_what_is_shown_while_streaming_stays(pieces, parts, stops):
    """After any number of tokens it is a beginning of the text that comes out; cut characters wait."""
    raw = b"".join(p.encode() if isinstance(p, str) else p for p in parts)
    text = raw.decode("utf-8", "replace")
    for tokenizer, ids in ((Bytes(), list(raw)), (pieces, pieces.encode(text))):
        whole = read_text(np.array(ids, int), tokenizer, stops)[0]
        for n in range(len(ids) + 1):
            text, why = read_text(np.array(ids[:n], int), tokenizer, stops)
            shown = settled(text, stops)
            assert whole.startswith(shown), (shown, whole)
            if why == "stop":
                assert text == whole
                break


# ------------------------------------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def run(tiny, data_config, tmp_path_factory):
    """The directory of a run of two steps."""
    root = tmp_path_factory.mktemp("sample")
    config = train.Config(name="two", runs=str(root), model=tiny, data=data_config, overlap=8,
                          phases=(train.Phase(steps=2, batch=8, seq=32),), eval_tokens=200, sample_tokens=4)
    train.train(config)
    return root / "two"


@pytest.fixture
def said(run, capsys):
    """What `sample RUN ...` prints."""
    def go(*arguments, code=0) -> str:
        assert train.main(["sample", str(run), *map(str, arguments)]) == code
        out, err = capsys.readouterr()
        return err if code else out
    return go


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_rows_are_numbered_and_each_can_be_made_again(run, said, tmp_path):
    """--json: a line a continuation, its seed; alone with that seed the text is the same."""
    (tmp_path / "p.jsonl").write_text('"the roots"\n\n{"prompt": "in\\nspring", "id": 3}\n')
    (tmp_path / "p.txt").write_text("the roots\n\nin spring, a shoot\n")
    rows = objects(said("--prompt", "the tree", "--prompts", tmp_path / "p.jsonl", "--n", 2, "--seed", 7,
                        "--tokens", 12, "--top-k", 30, "--top-p", 0.95, "--json"))
    assert [r["prompt"] for r in rows] == ["the tree"] * 2 + ["the roots"] * 2 + ["in\nspring"] * 2
    assert [r["seed"] for r in rows] == [*range(7, 13)] and len({r["text"] for r in rows}) == 6
    alone = objects(said("--prompt", rows[5]["prompt"], "--seed", 12, "--tokens", 12, "--top-k", 30,
                         "--top-p", 0.95, "--json"))
    assert alone == rows[5:]
    lines = objects(said("--prompts", tmp_path / "p.txt", "--tokens", 1, "--json"))
    assert [r["prompt"] for r in lines] == ["the roots", "in spring, a shoot"]
    assert (run / "samples.txt").read_text() == said("--prompt", "").split("\n", 1)[1].removesuffix("\n")


def test_the_end_of_a_run_continues_its_prompts_without_the_command(run):
    """`continuations` gives what samples.txt holds; several prompts are told apart; none give nothing."""
    params, config, tokenizer, _ = train.load(str(run))
    given = params, config, tokenizer, 2
    assert continuations(*given, config.prompts) == (run / "samples.txt").read_text()
    both = continuations(*given, ["the tree", "a"])
    assert both.startswith("the tree") and "\n\n----\n\na" in both and both.endswith("\n")
    assert continuations(*given, ()) == ""


def test_eight_devices_say_what_one_does(said):
    """--mesh.* loads the parameters onto a mesh, here of simulated devices."""
    arguments = ["--prompt", "the tree", "--prompt", "a", "--tokens", 12]
    assert said(*arguments, "--mesh.fsdp", 2, "--mesh.tensor", 2) == said(*arguments)


def test_a_stop_string_is_not_shown(said):
    plain = objects(said("--prompt", "the", "--tokens", 24, "--json"))[0]
    assert plain["ended"] in ("length", "eos")
    stop = plain["text"][9:11]
    cut = objects(said("--prompt", "the", "--tokens", 24, "--stop", "no such", "--stop", stop, "--json"))[0]
    assert cut == plain | dict(text=plain["text"][:plain["text"].index(stop)], ended="stop")


class Terminal(io.StringIO):
    """A terminal that remembers what each flush showed."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def isatty(self):
        return True

    def flush(self):
        self.shown.append(self.getvalue())


def test_text_appears_as_it_is_made_on_a_terminal(said, monkeypatch):
    """One continuation grows on the screen and is in the end what a file would get; --stream forces it."""
    arguments = ["--prompt", "the tree", "--tokens", 24, "--seed", 3]
    plain = said(*arguments)
    assert said(*arguments, "--stream") == plain
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal := Terminal())
        said(*arguments)
    assert terminal.getvalue() == plain
    begun = [s for s in dict.fromkeys(terminal.shown) if "the tree" in s]
    assert len(begun) > 6 and all(plain.startswith(s) for s in begun)


def test_mistakes_are_one_sentence(said, tmp_path):
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"text": "x"}\n')
    (tmp_path / "none.txt").write_text("\n")
    for arguments, *words in [
            (["--top-p", 0], "--top-p", "0.0"), (["--top-p", "nan"], "nan"), (["--top-k", -1], "-1"),
            (["--n", 0], "--n", "0"), (["--temperature", -1], "-1"), (["--stop", ""], "--stop"),
            (["--prompts", tmp_path / "bad.jsonl"], '{"text": "x"}'),
            (["--prompts", tmp_path / "no"], "--prompts", "no such"),
            (["--prompts", tmp_path / "none.txt"], "--prompts"), (["--stream", "--json"], "--stream", "json"),
            (["--mesh.tensor", 3], "tensor 3", "8 devices"), (["--mesh.tensor", 8], "vocab", "258", "8")]:
        err = said(*arguments, code=2)
        assert err.count("\n") == 1 and all(w.lower() in err.lower() for w in words), (arguments, err)


@pytest.mark.parametrize("of_run", [False, True])
def test_generation_can_be_timed(run, capsys, of_run):
    """`bench --generate`, of a shape or of a run's model."""
    given = ["--init_from", str(run)] if of_run else ["--layers", "1", "--embed", "32", "--mlp", "48"]
    assert train.main(["bench", "--generate", "--batch", "2", "--seq", "5", "--sample_tokens", "20",
                       "--seconds", "0", *given]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["runs"] >= 3 and row["tokens_per_s"] == pytest.approx(2 * 20 / row["ms"] * 1e3, rel=0.1)
    assert row["params"] == model.count(train.load(str(run))[1].model) or not of_run
