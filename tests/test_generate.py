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
narrow = jax.jit(generation.narrow)
prepare = jax.jit(generation.prepare, static_argnames="config")

GREEDY = Sampling(np.float32(0))
WARM = Sampling(np.float32(1))
FEW = Sampling(np.float32(0.8), np.float32(40), np.float32(0.9))
NO_EOS = -1  # an id that is never drawn


def random_ids(n: int) -> list[int]:
    """A prompt of n bytes."""
    return np.random.default_rng(n).integers(0, 256, n).tolist()


# Their lengths lie on both sides of the width of the shortest cache.
PROMPTS = [random_ids(n) for n in (5, 1, 33, 40)]
TWO = PROMPTS[:2]


@pytest.fixture(scope="module")
def untied(tiny):
    """The tiny model with a head of its own and QK-norm."""
    return replace(tiny, tied=False, qk_norm=True)


@pytest.fixture(scope="module")
def params(untied):
    """Parameters of the model with an untied head and QK-norm."""
    return strong(untied)


def made(params, config, prompts, tokens=20, how=WARM, seeds=None, eos=NO_EOS, **others):
    """`generate` with these parameters; rows draw by seeds 0, 1, ..."""
    weights = prepare(params, config=config)
    if seeds is None:
        seeds = range(len(prompts))
    return generate(weights, prompts, tokens, list(seeds), how, eos, config, **others)


# ------------------------------------------------------------------------------------ generated ids


def check_likeliest(params, config, prompts, rows):
    """Each id of the rows is the likeliest by the whole model, run without a cache."""
    apply = jax.jit(model.apply, static_argnames="config")
    for prompt, row in zip(prompts, rows, strict=True):
        first, end = len(prompt), len(prompt) + len(row)
        ids = np.zeros((1, 64), np.int32)  # right of what is asked, nothing matters
        ids[0, :end] = [*prompt, *row]
        logits = apply(params, ids, config=config)[0]
        best = np.argmax(logits, -1)
        equal(best[first - 1:end - 1], row)


def test_greedy_generation_with_a_tied_head_equals_recomputing_everything(
    tiny, params, monkeypatch
):
    monkeypatch.setattr(generation, "ROOM", 64)
    tied = {name: params[name] for name in model.table(tiny)}
    rows = made(tied, tiny, TWO, 20, GREEDY)
    assert rows.shape == (2, 20)
    check_likeliest(tied, tiny, TWO, rows)


def test_greedy_generation_equals_recomputing_everything_while_the_cache_grows(
    untied, params, monkeypatch
):
    monkeypatch.setattr(generation, "ROOM", 64)
    rows = made(params, untied, TWO, 40, GREEDY)
    assert rows.shape == (2, 40)
    assert len(np.unique(rows)) > 4  # not one id for ever, which would hide much
    check_likeliest(params, untied, TWO, rows)


@pytest.mark.parametrize("how", [GREEDY, WARM, FEW], ids=["greedy", "warm", "few"])
def test_a_batch_is_its_rows_alone_in_any_order(untied, params, how):
    """Each row has a seed of its own."""
    whole = made(params, untied, PROMPTS, how=how)
    for i, prompt in enumerate(PROMPTS):
        alone = made(params, untied, [prompt], how=how, seeds=[i])
        equal(alone[0], whole[i])
    backwards = made(params, untied, PROMPTS[::-1], how=how, seeds=[3, 2, 1, 0])
    equal(backwards, whole[::-1])


@pytest.fixture(scope="module")
def plain(untied, params):
    """20 ids after each of the two shortest prompts, drawn by the seeds 0 and 1 without an end."""
    return made(params, untied, TWO)


def test_draws_depend_on_the_seed(untied, params, plain):
    others = made(params, untied, TWO, seeds=[5, 6])
    assert np.any(plain != others)
    assert plain.max() < 258


def test_a_longer_generation_continues_a_shorter_one_at_any_pace(untied, params, plain):
    equal(made(params, untied, TWO, 1), plain[:, :1])
    equal(made(params, untied, TWO, pace=3), plain)


def first_appearance(plain) -> int:
    """A place after 5 where the first row has an id that is new to it and not in the second."""
    for i, token in enumerate(plain[0]):
        if i > 5 and token not in plain[0, :i] and token not in plain[1]:
            return i
    raise AssertionError("every id appears before or in the other row")


def test_after_eos_comes_eos_and_other_rows_do_not_notice(untied, params, plain):
    first = first_appearance(plain)
    eos = int(plain[0, first])

    ended = made(params, untied, TWO, eos=eos)

    equal(ended[0, :first], plain[0, :first])
    equal(ended[0, first:], np.full(20 - first, eos))
    equal(ended[1], plain[1])


def test_nothing_is_made_once_all_rows_have_ended(untied, params, plain):
    eos = int(plain[0, first_appearance(plain)])
    assert made(params, untied, TWO[:1], 32, eos=eos).shape == (1, CHUNK)


def test_a_watcher_ends_the_rows_that_it_names(untied, params, plain):
    def all_end(ids):
        return np.array([True, True])

    def first_ends(ids):
        return np.array([True, False])

    equal(made(params, untied, TWO, 32, heed=all_end), plain[:, :CHUNK])
    half = made(params, untied, TWO, heed=first_ends)
    equal(half[1], plain[1])
    assert half[0, CHUNK:].tolist() == [NO_EOS] * (20 - CHUNK)


# ------------------------------------------------------------------------------------- many devices


@pytest.fixture(scope="module")
def placed(untied, params):
    """(a mesh of eight devices, the weights prepared on it by the table's rules)."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    spread = jax.device_put(params, shardings(model.table(untied), mesh))
    with jax.set_mesh(mesh):
        return mesh, prepare(spread, config=untied)


@pytest.mark.parametrize("how", [GREEDY, WARM, FEW], ids=["greedy", "warm", "few"])
def test_eight_devices_give_what_one_does(untied, params, placed, how):
    """Also for three rows, which data and fsdp do not divide."""
    mesh, weights = placed
    one = made(params, untied, PROMPTS, how=how)
    with jax.set_mesh(mesh):
        for rows in (4, 3):
            seeds = list(range(rows))
            got = generate(weights, PROMPTS[:rows], 20, seeds, how, NO_EOS, untied)
            equal(got, one[:rows])


def shape_on_a_device(x) -> tuple[int, ...]:
    """The shape of the part of x that lives on the first device."""
    return x.addressable_shards[0].data.shape


def test_each_device_holds_a_part_of_the_weights_and_of_the_cache(untied, placed):
    mesh, weights = placed
    others, layers = weights
    ids, pad = padded(PROMPTS, 0)
    with jax.set_mesh(mesh):
        cache = prefill(weights, ids[:, :-1], pad, 128, untied)

    first = layers[0]
    assert shape_on_a_device(first["gate"][0]) == (16, 24)
    assert shape_on_a_device(first["q"][0]) == (16, 1, 2, 8)
    assert shape_on_a_device(first["down"][0]) == (24, 16)
    assert shape_on_a_device(others["embed"]) == (129, 16)
    keys, _ = cache[0]
    assert keys.addressable_shards[0].data.size * 8 == keys.size


# ------------------------------------------------------------------------------------------- draws

SHARES = [0.1, 0.4, 0.05, 0.3, 0.15]
ALL = [0, 1, 2, 3, 4]


def kept(shares, top_k=np.inf, top_p=np.inf) -> list[int]:
    """Which of these probabilities `narrow` leaves."""
    scores = jnp.log(jnp.asarray([shares], jnp.float32))
    out = narrow(scores, np.float32(top_k), np.float32(top_p))[0]
    return np.flatnonzero(np.isfinite(out)).tolist()


@pytest.mark.parametrize("top_k, left", [
    (np.inf, ALL),
    (99, ALL),
    (3, [1, 3, 4]),
    (1, [1]),
])
def test_top_k_leaves_the_likeliest(top_k, left):
    assert kept(SHARES, top_k) == left


@pytest.mark.parametrize("top_p, left", [
    (0.39, [1]),
    (0.41, [1, 3]),
    (0.69, [1, 3]),
    (0.71, [1, 3, 4]),
    (0.96, ALL),
])
def test_top_p_leaves_the_fewest_that_reach_the_share(top_p, left):
    assert kept(SHARES, top_p=top_p) == left


def test_top_p_is_a_share_of_what_top_k_leaves():
    """Of three tokens that sum to 0.85, the first two have 0.82."""
    assert kept(SHARES, 3, 0.81) == [1, 3]


def test_a_token_as_likely_as_the_last_stays_too():
    assert kept([0.2, 0.3, 0.3, 0.2], 1) == [1, 2]


def test_a_token_without_probability_is_left_out():
    assert kept([0.5, 0.0, 0.5], 3, 0.99) == [0, 2]


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0.01, 0.99))
def test_no_fewer_tokens_would_do(seed, top_k, top_p):
    """What is kept begins the sorted list, reaches the share, and without its last does not."""
    scores = np.random.default_rng(seed).normal(size=50).astype(np.float32) * 3
    weights = np.exp(scores)
    likeliest = np.argsort(-scores)
    shares = np.sort(weights / weights.sum())[::-1]

    of_k = kept(weights, top_k)
    of_p = kept(weights, top_p=top_p)

    assert set(of_k) == set(likeliest[:top_k].tolist())
    n = len(of_p)
    assert set(of_p) == set(likeliest[:n].tolist())
    assert shares[:n].sum() > top_p - 1e-5
    assert shares[:n - 1].sum() < top_p + 1e-5


ROWS = 4000


@pytest.fixture(scope="module")
def many_rows():
    """(scores, keys) of 4,000 rows of the same distribution, with a key each."""
    row = jnp.log(np.array(SHARES)).astype(jnp.float32)
    keys = jax.vmap(jax.random.key)(jnp.arange(ROWS))
    return jnp.tile(row, (ROWS, 1)), jax.random.key_data(keys)


@pytest.mark.parametrize("how", [
    Sampling(1.0),
    Sampling(0.5),
    Sampling(2.0, 3.0),
    Sampling(1.0, 4.0, 0.8),
], ids=["plain", "cold", "hot, of three", "of four, 0.8"])
def test_draws_follow_the_distribution_at_their_temperature(many_rows, how):
    """A token's part of the rows is its probability among those that are left."""
    weights = np.array(SHARES) ** (1 / how.temperature)
    left = np.zeros(5)
    left[kept(weights, how.top_k, how.top_p)] = 1
    expected = left * weights

    ids = pick(*many_rows, 3, how)

    drawn = np.bincount(ids, minlength=5) / ROWS
    np.testing.assert_allclose(drawn, expected / expected.sum(), atol=0.04)
    assert not drawn[left == 0].any()


def test_at_temperature_0_the_likeliest_is_drawn(many_rows):
    equal(pick(*many_rows, 3, Sampling(0.0)), np.ones(ROWS))


# ------------------------------------------------------------------------------------------- texts

THREE_WORDS = np.array([*b"one. two; three", 257, *b"! four"])


@pytest.mark.parametrize("stops, text, ended", [
    ([], "one. two; three", "eos"),
    ([";", ". "], "one", "stop"),
    (["!"], "one. two; three", "eos"),
])
def test_text_ends_before_the_first_stop_or_eos(stops, text, ended):
    assert read_text(THREE_WORDS, Bytes(), stops) == (text, ended)


def test_text_without_stop_and_eos_ends_by_its_length():
    assert read_text(THREE_WORDS[:6], Bytes(), ["two"]) == ("one. t", "length")


def check_what_is_shown_stays(tokenizer, ids, stops):
    """After any number of tokens, what is shown is a beginning of the text that comes out."""
    whole, _ = read_text(np.array(ids, int), tokenizer, stops)
    for n in range(len(ids) + 1):
        text, why = read_text(np.array(ids[:n], int), tokenizer, stops)
        shown = settled(text, stops)
        assert whole.startswith(shown), (shown, whole)
        if why == "stop":
            assert text == whole
            break


some_text = st.text(st.sampled_from("aé樹😀\x10ebc "))
text_or_bytes = st.one_of(some_text.map(str.encode), st.binary(max_size=3))
some_stops = st.lists(st.sampled_from(["a", "é樹", "ab", "  ", "樹a"]), max_size=2)


@settings(max_examples=60)
@given(st.lists(text_or_bytes, max_size=8), some_stops)
def test_what_is_shown_while_streaming_stays(pieces, parts, stops):
    """Characters that are cut wait."""
    raw = b"".join(parts)
    text = raw.decode("utf-8", "replace")
    check_what_is_shown_stays(Bytes(), list(raw), stops)
    check_what_is_shown_stays(pieces, pieces.encode(text), stops)


# ------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def run(tiny, data_config, tmp_path_factory):
    """The directory of a run of two steps."""
    root = tmp_path_factory.mktemp("sample")
    config = train.Config(
        name="two",
        runs=str(root),
        model=tiny,
        data=data_config,
        overlap=8,
        phases=(train.Phase(steps=2, batch=8, seq=32),),
        eval_tokens=200,
        sample_tokens=4,
    )
    train.train(config)
    return root / "two"


@pytest.fixture
def said(run, capsys):
    """What `sample RUN ...` prints."""
    def go(*arguments) -> str:
        assert train.main(["sample", str(run), *map(str, arguments)]) == 0
        return capsys.readouterr().out
    return go


@pytest.fixture
def rows_of(said):
    """The rows that `sample RUN ... --json` prints."""
    def go(*arguments) -> list[dict]:
        out = said(*arguments, "--json")
        return [json.loads(line) for line in out.splitlines()]
    return go


def test_rows_are_numbered_over_prompts_and_each_can_be_made_again(rows_of, tmp_path):
    """Alone, with the seed that its row had, a continuation is the same."""
    file = tmp_path / "p.jsonl"
    file.write_text('"the roots"\n\n{"prompt": "in\\nspring", "id": 3}\n')
    how = ["--tokens", 12, "--top-k", 30, "--top-p", 0.95]

    rows = rows_of("--prompt", "the tree", "--prompts", file, "--n", 2, "--seed", 7, *how)

    twice_each = ["the tree", "the tree", "the roots", "the roots", "in\nspring", "in\nspring"]
    assert [row["prompt"] for row in rows] == twice_each
    assert [row["seed"] for row in rows] == [7, 8, 9, 10, 11, 12]
    assert len({row["text"] for row in rows}) == 6
    assert rows_of("--prompt", rows[5]["prompt"], "--seed", 12, *how) == rows[5:]


def test_a_line_of_a_text_file_is_a_prompt(rows_of, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("the roots\n\nin spring, a shoot\n")
    rows = rows_of("--prompts", file, "--tokens", 1)
    assert [row["prompt"] for row in rows] == ["the roots", "in spring, a shoot"]


def test_samples_txt_holds_what_the_command_prints_below_its_heading(run, said):
    heading, text = said("--prompt", "").split("\n", 1)
    assert str(run) in heading
    assert (run / "samples.txt").read_text() == text.removesuffix("\n")


def test_the_end_of_a_run_continues_its_prompts_without_the_command(run):
    """Several prompts are told apart; none give nothing."""
    params, config, tokenizer, _ = train.load(str(run))

    def continued(prompts) -> str:
        return continuations(params, config, tokenizer, 2, prompts)

    assert continued(config.prompts) == (run / "samples.txt").read_text()
    both = continued(["the tree", "a"])
    assert both.startswith("the tree")
    assert "\n\n----\n\na" in both
    assert both.endswith("\n")
    assert continued(()) == ""


def test_a_mesh_of_devices_says_what_one_device_does(said):
    """--mesh.* loads the parameters onto a mesh, here of simulated devices."""
    arguments = ["--prompt", "the tree", "--prompt", "a", "--tokens", 12]
    assert said(*arguments, "--mesh.fsdp", 2, "--mesh.tensor", 2) == said(*arguments)


def test_a_stop_string_is_not_shown(rows_of):
    arguments = ["--prompt", "the", "--tokens", 24]
    plain = rows_of(*arguments)[0]
    assert plain["ended"] in ("length", "eos")
    stop = plain["text"][9:11]
    before, _, _ = plain["text"].partition(stop)

    cut = rows_of(*arguments, "--stop", "no such", "--stop", stop)[0]

    assert cut == plain | dict(text=before, ended="stop")


class Terminal(io.StringIO):
    """A terminal that remembers what each flush showed."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def isatty(self):
        return True

    def flush(self):
        self.shown.append(self.getvalue())


STREAMED = ["--prompt", "the tree", "--tokens", 24, "--seed", 3]


def test_stream_prints_the_same_text_as_it_is_made(said):
    assert said(*STREAMED, "--stream") == said(*STREAMED)


def test_text_appears_as_it_is_made_on_a_terminal(said, monkeypatch):
    """One continuation grows on the screen, and is in the end what a file would get."""
    plain = said(*STREAMED)
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        said(*STREAMED)

    assert terminal.getvalue() == plain
    states = dict.fromkeys(terminal.shown)  # each once
    begun = [text for text in states if "the tree" in text]
    assert len(begun) > 6
    assert all(plain.startswith(text) for text in begun)


def test_of_several_texts_the_first_appears_as_it_is_made(said, monkeypatch):
    """The others follow at its end."""
    several = [*STREAMED, "--n", 2]
    plain = said(*several)
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        said(*several)

    assert terminal.getvalue() == plain
    assert plain.count("the tree") >= 2
    first = plain.partition("\n\n----")[0]
    begun = [text for text in dict.fromkeys(terminal.shown) if text in first and "the tree" in text]
    assert len(begun) > 6


MISTAKES = [
    (["--top-p", 0], ["--top-p", "0.0"]),
    (["--top-p", "nan"], ["nan"]),
    (["--top-k", -1], ["-1"]),
    (["--n", 0], ["--n", "0"]),
    (["--temperature", -1], ["-1"]),
    (["--stop", ""], ["--stop"]),
    (["--prompts", "bad.jsonl"], ['{"text": "x"}']),
    (["--prompts", "no"], ["--prompts", "no such"]),
    (["--prompts", "none.txt"], ["--prompts"]),
    (["--stream", "--json"], ["--stream", "json"]),
    (["--mesh.tensor", 3], ["tensor 3", "8 devices"]),
    (["--mesh.tensor", 8], ["vocab", "258", "8"]),
]


@pytest.mark.parametrize("arguments, words", MISTAKES, ids=str)
def test_a_mistake_is_one_sentence_that_names_it(
    run, capsys, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"text": "x"}\n')
    (tmp_path / "none.txt").write_text("\n")

    code = train.main(["sample", str(run), *map(str, arguments)])

    sentence = capsys.readouterr().err
    assert code == 2
    assert sentence.count("\n") == 1
    for word in words:
        assert word.lower() in sentence.lower()


@pytest.fixture
def timed(capsys):
    """The last line that `bench --generate` prints; it is timed for 20 tokens of 2 prompts."""
    shape = ["--batch", "2", "--seq", "5", "--sample_tokens", "20", "--seconds", "0"]

    def go(*arguments) -> dict:
        assert train.main(["bench", "--generate", *shape, *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    return go


def check_times(row: dict):
    """Three rounds or more were timed, and the figures of time agree."""
    assert row["runs"] >= 3
    assert row["tokens_per_s"] == pytest.approx(2 * 20 / row["ms"] * 1e3, rel=0.1)


def test_generation_by_a_shape_can_be_timed(timed):
    row = timed("--layers", "1", "--embed", "32", "--mlp", "48")
    check_times(row)


def test_generation_by_the_model_of_a_run_can_be_timed(run, timed):
    row = timed("--init_from", str(run))
    check_times(row)
    _, config, _, _ = train.load(str(run))
    assert row["params"] == model.count(config.model)
