"""configs/objectives: lexicon_masking.py, drbert.py and self_pretraining.py; what is hidden from whom."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong

import model
from lib.config import ROOT, load_file
from lib.kernels import Mask
from lib.objectives import BIDIRECTIONAL
from lib.packing import best_fit, fill
from lib.tokenizers import Bytes, Numbers
from model import Context, Model

pytestmark = pytest.mark.library
lexicon, drbert, own = (load_file(ROOT / f"configs/objectives/{name}.py") for name in (
    "lexicon_masking", "drbert", "self_pretraining"))
MASK = Mask("bidirectional", 0)


def test_the_words_of_a_lexicon_are_hidden_before_others():
    text = "if ink: return in_x; " * 4 + "is"  # 86 bytes; the words are four of if, of return, one of is
    ids = np.array([*text.encode(), Bytes.eos, *b"island of or not", Bytes.bos], np.int32)
    words = np.array([*[*[1] * 2, *[0] * 6, *[1] * 6, *[0] * 7] * 4, 1, 1, *[0] * 11, 1, 1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(lexicon.of_lexicon(ids), words > 0)
    n, number = len(ids), words.sum()
    row = dict(tokens=np.full(n, 65, np.int32), targets=ids, weights=np.ones(n, np.float32))
    for seed in range(5):
        made, mask = lexicon.lexicon_masked(row, np.random.default_rng(seed), Bytes(), share=0.4)
        hidden = made["weights"] > 0
        assert mask == BIDIRECTIONAL and hidden.sum() == round(0.4 * n) and hidden[words > 0].all()
        np.testing.assert_array_equal(made["lexicon"], words)
        few, _ = lexicon.lexicon_masked(row, np.random.default_rng(seed), Bytes(), share=0.05)
        assert few["weights"].sum() == round(0.05 * n) and not few["weights"][words == 0].any()
    counts = []
    for seed in range(50):
        made, _ = lexicon.lexicon_masked(row, np.random.default_rng(seed), Bytes(), guided=False)
        counts.append(made["weights"][words > 0].sum())
    assert np.mean(counts) == pytest.approx(0.2 * number, abs=5 * (0.16 * number / 50) ** 0.5)
    batch = {"weights": jnp.array([[1.0, 1.0, 0.0]]), "lexicon": jnp.array([[1, 0, 1]])}
    (total, count), metrics = lexicon.on_lexicon(jnp.array([[2.0, 4.0, 8.0]]), batch)
    assert (float(total), float(count), float(metrics["lexicon"])) == (6.0, 2.0, 2.0)


def test_a_decoder_is_told_what_is_hidden_and_leaves_the_encoder_as_it_was(tiny):
    config = replace(tiny, layers=3, forward=drbert.with_decoder)
    params = strong(config)
    batch = {name: jnp.asarray(x) for name, x in rows().items()}
    plain = replace(config, forward=model.llama)
    states, _ = model.forward(params, batch, MASK, config)
    np.testing.assert_allclose(states, model.forward(params, batch, MASK, plain)[0], atol=1e-5)
    unmarked = batch | {"mark": jnp.full_like(batch["tokens"], -1)}
    np.testing.assert_array_equal(states, model.forward(params, unmarked, MASK, config)[0])
    made, mask = drbert.masked_here({name: np.asarray(x[0]) for name, x in batch.items()},
                                    np.random.default_rng(0), Bytes())
    assert mask == BIDIRECTIONAL
    np.testing.assert_array_equal(made["mark"], np.where(made["weights"] > 0, Bytes.bos, -1))
    marked = {name: jnp.asarray(x)[None] for name, x in made.items()}
    x, _ = model.stream(params, model.embedded(params, marked, config), marked, MASK, plain, last=2)
    told = jnp.where(marked["mark"][..., None] >= 0, params["embed"][Bytes.bos], 0)
    want, _ = model.stream(params, x + told, marked, MASK, plain, first=2)
    want = model.rms_norm(want, params["norm"], config.norm_eps)
    np.testing.assert_allclose(model.forward(params, marked, MASK, config)[0], want, atol=1e-5)

    edited = drbert.drop_decoder(Model(config, params), Context(jax.random.key(0), 0, None, None, None))
    kept = edited.model
    assert kept.config == replace(plain, layers=2) and set(edited.policy.values()) == {
        edited.policy["matrix"]} and callable(edited.policy["matrix"])
    y, _ = model.stream(params, model.embedded(params, batch, config), batch, MASK, plain, last=2)
    y = model.rms_norm(y, params["norm"], config.norm_eps)
    np.testing.assert_allclose(model.forward(kept.params, batch, MASK, kept.config)[0], y, atol=1e-5)


def test_the_values_of_expressions():
    """By Python's own arithmetic, from the text."""
    names = {10: "min", 11: "max", 12: "med", 13: "sm"}
    functions = dict(min=lambda *x: min(x), max=lambda *x: max(x), med=lambda *x: int(np.median(x)),
                     sm=lambda *x: sum(x) % 10)
    values = []
    for document in own.listops(200):
        *ids, equals, value = map(int, document.text.split())
        assert equals == own.EQUALS and len(ids) <= 58
        assert ids.count(own.CLOSE) == sum(i in names for i in ids)
        said = "".join(f"{names[i]}(" if i in names else ")," if i == own.CLOSE else f"{i}," for i in ids)
        assert eval(said.rstrip(","), functions) == value
        values.append(value)
    assert len(set(values)) == 10 and max(np.bincount(values)) < 80


def packed(n=30):
    """A row of expressions, as a run packs them."""
    texts = [Numbers(16).encode(document.text) for document in own.listops(n)]
    plan = best_fit(np.array([len(text) + 1 for text in texts]), 128)
    row = fill(plan, np.array([0]), 128, lambda i: np.array(texts[i]), Numbers(16))
    return {name: x[0] for name, x in row.items() if name != "document"}


def test_answers_are_told_and_never_read():
    """What is asked is the value after each sign, which no input is and no other loss depends on."""
    row, tokenizer = packed(), Numbers(16)
    asked = row["tokens"] == own.EQUALS
    number = len(np.unique(row["segments"][row["segments"] > 0]))
    for mask in ("causal", "bidirectional"):
        made, given = own.answered(row, None, mask)
        assert given == {"kind": mask, "window": 0} and made["weights"].sum() == number == asked.sum()
        np.testing.assert_array_equal(made["weights"] > 0, asked)
        after = np.flatnonzero(asked) + 1
        assert (made["tokens"][after] == tokenizer.eos).all()  # in place of the value
        same = np.ones(128, bool)
        same[after] = False
        np.testing.assert_array_equal(made["tokens"][same], row["tokens"][same])
    changed = row | {"targets": np.where(asked, (row["targets"] + 1) % 10, row["targets"]).astype(np.int32)}
    for objective in (own.next_token, own.denoised):
        told = [] if objective is own.next_token else [tokenizer]
        one, two = (objective(each, np.random.default_rng(0), *told)[0] for each in (row, changed))
        np.testing.assert_array_equal(one["tokens"], two["tokens"])  # values make no difference
        weighed = one["weights"] > 0
        np.testing.assert_array_equal(one["targets"][weighed], two["targets"][weighed])
        assert not weighed[asked].any() and not (one["targets"][weighed] == tokenizer.eos).any()
    inside = own.next_token(row, None)[0]["weights"].sum()
    assert one["weights"].sum() == round(0.15 * inside) and inside == (row["weights"] > 0).sum() - 2 * number
