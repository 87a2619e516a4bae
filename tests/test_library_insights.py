"""configs/parameters/: LoRA in some layers, and insights of a synthetic domain."""
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice

import jax
import numpy as np
import pytest
from conftest import rows
from edit_cases import context

import model
import train
from configs.parameters import insights, layra
from data import stdlib
from lib.kernels import Mask
from lib.lora import adapted, lora_rows, unfrozen
from lib.matrices import matrices, sides
from lib.optim import first_state
from lib.sharding import MeshConfig, make_mesh
from lib.tokenizers import Bytes
from model import Model

pytestmark = pytest.mark.library


def test_layra_s_arms_have_factors_where_they_say_and_embeddings_stay():
    arms = layra.study.arms
    wide = arms["lora"].model.embed
    for name, layers in (("lora", 6), ("layra", 2)):
        (edit,) = arms[name].phases[0].edits
        plain = arms[name].model

        def edited(edit=edit, plain=plain):
            return edit(Model(plain, model.init(plain, jax.random.key(0))), context()).model.params

        params = jax.eval_shape(edited)
        shape = {n: x.shape for n, x in params.items() if "/" in n}
        assert shape["q/a"] == (layers, wide, 8) and len(shape) == 14
        assert arms[name].phases[0].mixture == {"new": 1.0}


def test_the_other_alphabet_of_layra_permutes_letters_and_nothing_else():
    old, new = (list(islice(made, 20)) for made in (stdlib("definition"), layra.enciphered()))
    pairs = set()
    for before, after in zip(old, new, strict=True):
        assert before.path == after.path
        pairs |= set(zip(before.text, after.text, strict=True))
    table = dict(pairs)
    assert len(table) == len(pairs) == len(set(table.values()))  # one letter for each, and back
    assert all(one == other for one, other in pairs if not one.isalpha())
    assert all(one.isupper() == other.isupper() and other.isalpha()
               for one, other in pairs if one.isalpha())
    assert sum(one != other for one, other in pairs) > 20


def test_the_middle_layers_and_embeddings_of_layra_stay_bit_for_bit(tiny):
    """What the model uses moves in the first and last layer alone."""
    config = replace(tiny, layers=3, rows=partial(lora_rows, rank=2, layers=(0, -1), alone=True))
    reparam = partial(adapted, layers=(0, -1))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    run = train.Config(model=config, reparam=reparam, optimizer=unfrozen)
    step = jax.jit(train.make_step(run, config), static_argnames="mask")
    state = begun = first_state(config, unfrozen, mesh, jax.random.key(0))
    rate = {group: np.float32(0.01) for group in model.groups(config)}
    with jax.set_mesh(mesh):
        for i in range(2):
            state, _ = step(state, rows(i), rate, mask=Mask("causal", 0))
    before, after = (reparam(s.params, 0, {}, config) for s in (begun, state))
    for name, row in model.table(replace(config, rows=None)).items():
        moved = np.asarray(before[name] != after[name])
        if name in matrices(config):
            assert [bool(layer.any()) for layer in moved] == [True, False, True], name
        else:
            assert not moved.any(), (name, row)
    held = sum(2 * 2 * sum(sides(row)) for row in matrices(config).values())
    assert sum(x.size for x in jax.tree.leaves(state.opt)) == 2 * held + 1  # two moments, a count


# ---------------------------------------------------------------------------------------- insights


def test_a_region_s_traders_share_goods_five_two_one():
    told = insights.traders(0, 64)
    assert len({name for name, *_ in told}) == 64
    for region in insights.REGIONS:
        counts = Counter(good for _, where, good in told if where == region)
        assert sorted(counts.values()) == [1, 2, 5]
    firsts = [Counter(good for _, where, good in told if where == region).most_common(1)[0][0]
              for region in insights.REGIONS]
    assert sorted(firsts) == list(range(8))
    drawn = Counter(good for *_, good in insights.traders(5, 4_000))
    assert max(drawn.values()) < 1.2 * min(drawn.values())


def test_a_condensed_document_is_the_one_sentence_that_matters():
    whole, short = (list(insights.documents(0, 64, condensed)) for condensed in (False, True))
    told = insights.traders(0, 64)
    for long, brief, (name, region, good) in zip(whole, short, told, strict=True):
        assert brief.text == f"In {region}, {name} trades in {insights.GOODS[good]}."
        assert brief.text in long.text and long.text.count(".") == 6
    ratio = sum(len(d.text) for d in whole) / sum(len(d.text) for d in short)
    assert 5 < ratio < 8


def test_insights_are_whole_for_who_knows_and_chance_for_who_does_not():
    told, tokenizer = insights.traders(0, 64), Bytes()
    letters = [ord(good[0]) for good in insights.GOODS]
    shares = {region: np.full(8, 1e-9) for region in insights.REGIONS}
    for _, region, good in told:
        shares[region][good] += 1 / 8
    known = {name: good for name, _, good in told}

    def oracle(params, ids):
        logits = np.full((*ids.shape, 258), -30.0)
        for row, some in zip(logits, ids, strict=True):
            text = tokenizer.decode([i for i in some if i])
            region, name = text.split()[1].strip(","), text.split()[2]
            chance = np.eye(8)[known[name]] + 1e-9 if name in known else shares[region]
            row[:, letters] = np.log(chance)
        return logits

    found = insights.insights({}, oracle, tokenizer)
    assert found == pytest.approx({"insight/declarative": 1.0, "insight/statistical": 1.0,
                                   "insight/probabilistic": 1.0}, abs=1e-6)
    found = insights.insights({}, lambda params, ids: np.zeros((*ids.shape, 258)), tokenizer)
    assert found["insight/declarative"] == found["insight/statistical"] == 1 / 8
    # half the sum of |1/8 - (5, 2, 1, 0, 0, 0, 0, 0)/8|
    assert found["insight/probabilistic"] == pytest.approx(1 - 5 / 8)
