"""data.py: mixtures, order, row lengths, steering, held-out rows, batch(step)."""
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
from corpora import Points, files, many, points, stars, token_count, with_many
from hypothesis import given

import data
from data import DataConfig, Document, InputError, Source
from lib.cache import Shard, build
from lib.evaluate import bits_per_byte, held_out
from lib.packing import ROW, SEGMENT
from lib.prefetch import prefetch
from lib.sources import SPLITS, split_of
from lib.tokenizers import Bytes

equal = np.testing.assert_array_equal


# ------------------------------------------------------------------------------------------------- the loader


def moons():
    """Forty documents of 1 to 90 code points."""
    return points(0x20000, 40, 90)


SKY = DataConfig(sources={"stars": Source(stars), "moons": Source(moons)}, dev=0.1, test=0.1, shard_tokens=1,
                 window=2)


def phase(**changes):
    """A phase as the Loader needs it."""
    return SimpleNamespace(**dict(
        steps=5_000, batch=4, seq=32, mixture=None, lengths=None, steer=0, order=data.shuffled,
        packing=data.concat_and_split, objective=data.causal) | changes)


@pytest.fixture(scope="module")
def caches():
    """The caches of SKY, of three shards and of one."""
    out = {name: build(name, SKY, Points(), 0) for name in SKY.sources}
    assert [cache.total["shards"] for cache in out.values()] == [3, 1]
    return out


@pytest.fixture(scope="module")
def loader(caches):
    """Makes a Loader over the caches of SKY, or of the named sources of it."""
    return lambda *phases, names=("stars", "moons"), seed=0: data.Loader(
        {name: caches[name] for name in names}, phases, SKY, Points(), seed)


def training(documents):
    """{target: (path, place, token before it)} of all positions that are trained on, but for ends."""
    out = {}
    for d in documents():
        if split_of(d.path, 0.1, 0.1) == 0:
            for place, char in enumerate(d.text):
                out[ord(char)] = (d.path, place, ord(d.text[place - 1]) if place else Points.bos)
    return out


def pieces_of(arrays):
    """(tokens, targets, positions, sources) of every segment of a batch's rows, in order."""
    for r, row in enumerate(arrays["segments"]):
        for segment in range(1, row.max() + 1):
            where = row == segment
            yield tuple(arrays[k][r, where].tolist() for k in ("tokens", "targets", "positions", "source"))


def test_targets_are_the_documents_next_tokens(loader):
    """Every token of a batch against the documents themselves, and the figures that go with it."""
    before = training(stars) | training(moons)
    ends = {ord(d.text[-1]) for documents in (stars, moons) for d in documents()}
    made, seen = loader(phase()), 0
    for step in range(1, 20):
        batch = made.batch(step)
        assert batch.mask == dict(kind="causal", window=0)
        assert set(batch.arrays) == {"tokens", "targets", "segments", "positions", "weights", "source"}
        assert all(x.shape == (4, 32) for x in batch.arrays.values())
        cut = 0
        for tokens, targets, positions, sources in pieces_of(batch.arrays):
            assert positions == list(range(len(tokens))) and tokens[1:] == targets[:-1]
            for token, target, source in zip(tokens, targets, sources, strict=True):
                if target == Points.eos:
                    assert token in ends and token in before
                else:
                    assert before[target][2] == token
                known = target if target != Points.eos else token
                assert source == (known >= 0x20000)
            cut, seen = cut + (targets[-1] != Points.eos), seen + 1
        equal(batch.arrays["weights"], batch.arrays["segments"] > 0)
        assert batch.metrics["data/waste"] == pytest.approx(np.mean(batch.arrays["segments"] == 0))
        assert batch.metrics["data/truncated"] == pytest.approx(cut / len(list(pieces_of(batch.arrays))))
        assert batch.metrics["data/segments"] == len(list(pieces_of(batch.arrays))) / 4
    assert seen > 200


@pytest.mark.parametrize("seq", [32, 7, 500])
def test_an_epoch_visits_every_position_once(loader, seq):
    """For documents in three shards and two windows, in each of two epochs, which differ in order."""
    made = loader(phase(batch=1, seq=seq), names=("stars",))
    epoch, expected, orders = made.rows[0][0][0].epoch, training(stars), []
    documents = len({path for path, _, _ in expected.values()})
    assert epoch >= (len(expected) + documents) / seq
    for first in (1, 1 + epoch):
        targets = [t for step in range(first, first + epoch) for r in [made.batch(step).arrays]
                   for t in r["targets"][r["weights"] > 0].tolist()]
        counts = Counter(targets)
        assert counts.pop(Points.eos) == documents and counts == Counter(dict.fromkeys(expected, 1))
        orders.append(targets)
    assert orders[0] != orders[1]
    assert made.epochs(0) == dict(stars=0) and made.epochs(epoch) == dict(stars=1)


def test_documents_and_rows_are_shuffled_within_their_window(loader):
    """Of three shards in windows of two, the rows of the first window all come before those of the second."""
    made = loader(phase(batch=1), names=("stars",))
    rows = made.rows[0][0][0]
    epoch, size = rows.epoch, rows.ends[1]
    assert rows.ends == [0, size, epoch] and size < epoch
    first = {path for path, place, _ in training(stars).values() if int(path.split("/")[1]) < 512}
    where = {target: path for target, (path, _, _) in training(stars).items()}
    inside = [[where[t] in first for t in made.batch(step).arrays["targets"].ravel().tolist() if t in where]
              for step in range(1, rows.epoch + 1)]
    assert all(all(x) for x in inside[:size])
    assert not any(any(x) for x in inside[size:])
    between, within = [], []  # whether source order is kept from row to row, and from piece to piece
    for step in range(1, size + 1):
        tokens = [piece[1][0] for piece in pieces_of(made.batch(step).arrays) if piece[1][0] != Points.eos]
        between, within = between + tokens[:1], within + (np.diff(tokens) > 0).tolist()
    assert 0.3 < np.mean(np.diff(between) > 0) < 0.7 and 0.3 < np.mean(within) < 0.7


def test_batches_do_not_depend_on_what_was_asked_before(loader):
    phases = (phase(steps=9, mixture=dict(stars=0.7, moons=0.3)),
              phase(steps=8, seq=16, batch=3, mixture=rising))
    made, steps = loader(*phases), list(range(1, 18))
    first = {step: made.batch(step) for step in steps}
    random.Random(0).shuffle(steps)
    for step in steps + [1]:
        for one, other in ((made.batch(step), first[step]), (loader(*phases).batch(step), first[step])):
            assert one.metrics == other.metrics and one.mask == other.mask
            assert all(np.array_equal(one.arrays[k], other.arrays[k]) for k in other.arrays)
    assert first[9].arrays["tokens"].shape == (4, 32) and first[10].arrays["tokens"].shape == (3, 16)


def test_order_follows_the_seed(loader):
    one, other = (loader(phase(), seed=seed).batch(1).arrays["tokens"] for seed in (0, 1))
    assert np.mean(one == other) < 0.5


def test_loader_reads_pieces_of_words_too(corpus, data_config, pieces):
    """With a trained tokenizer: the text of every segment stands in a training document."""
    cache = build("corpus", data_config, pieces, 0)
    made = data.Loader({"corpus": cache}, [phase(seq=64)], data_config, pieces, 0)
    texts = [pieces.encode(d.text) for d in data.text(str(corpus)) if split_of(d.path, 0.1, 0.1) == 0]
    lines = [" ".join(map(str, [pieces.bos, *ids, pieces.eos])) for ids in texts]
    for step in (1, 2, 3):
        for tokens, targets, _, _ in pieces_of(made.batch(step).arrays):
            wanted = " ".join(map(str, [*tokens, targets[-1]]))
            assert any(f" {wanted} " in f" {line} " for line in lines)


# --------------------------------------------------------------------------------------------------- mixtures


def rising(progress, losses):
    """A mixture that moves from stars to moons."""
    assert losses == []
    return dict(stars=1 - progress, moons=progress)


def test_no_mixture_is_in_proportion_to_the_rows(loader):
    made = loader(phase(steps=500))
    stars, moons = (rows.epoch for rows in made.rows[0][0])
    equal(made.draws[0].after(500)[0].sum(), 2_000)
    assert made.draws[0].after(500)[0][1] == pytest.approx(2_000 * moons / (stars + moons), abs=1)


def test_a_rare_source_comes_as_often_as_it_should(loader):
    """With weight 0.001 in batches of 4: at every 250th step, give or take one, never two at once."""
    made = loader(phase(steps=10_000, mixture=dict(stars=0.999, moons=0.001)))
    counts = np.array([made.draws[0].after(step)[0] for step in range(10_001)])
    equal(counts.sum(1), 4 * np.arange(10_001))
    assert counts[-1, 1] == 40
    assert np.max(np.abs(counts[:, 1] - 0.004 * np.arange(10_001))) < 1
    rare = np.flatnonzero(np.diff(counts[:, 1])) + 1
    assert set(np.diff(rare).tolist()) <= {249, 250, 251} and np.max(np.diff(counts[:, 1])) == 1
    for step in (int(rare[0]) - 1, int(rare[0])):
        assert np.sum(np.any(made.batch(step).arrays["source"] == 1, axis=1)) == (step == rare[0])


@given(st.lists(st.integers(0, 1_000), min_size=2, max_size=2).filter(any), st.integers(1, 9))
def test_counts_keep_to_the_mixture(loader, weights, batch):
    made = loader(phase(batch=batch, mixture=dict(zip(("stars", "moons"), weights, strict=True))))
    counts = np.array([made.draws[0].after(step)[0] for step in range(60)])
    equal(counts.sum(1), batch * np.arange(60))
    assert np.all(np.diff(counts, axis=0) >= 0)
    due = np.arange(60)[:, None] * batch * np.array(weights) / sum(weights)
    assert np.all(np.abs(counts - due) < 1 + 1e-6)


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any), min_size=20, max_size=20),
       st.integers(1, 9))
def test_counts_keep_to_a_mixture_that_changes(caches, weights, batch):
    """Of four sources, as any function of progress gives them; and nothing is drawn less than no times."""
    shares = np.array(weights) / np.sum(weights, axis=1, keepdims=True)

    def mixture(progress, losses):
        return dict(zip("abcd", weights[round(progress * 20)], strict=True))

    phases = [phase(steps=20, batch=batch, mixture=mixture)]
    sources = dict.fromkeys("abcd", Source(moons))
    made = data.Loader(dict.fromkeys(sources, caches["moons"]), phases, replace(SKY, sources=sources),
                       Points(), 0)
    counts = np.array([made.draws[0].after(step)[0] for step in range(21)])
    equal(counts.sum(1), batch * np.arange(21))
    assert np.all(np.diff(counts, axis=0) >= 0)
    assert np.max(np.abs(counts[1:] - batch * np.cumsum(shares, axis=0))) < 2


def test_mixture_is_a_function_of_progress(loader):
    """Progress is 0 at a phase's first step; a source without weight does not come."""
    made = loader(phase(steps=3), phase(steps=100, mixture=rising))
    assert made.draws[1].shares(0).tolist() == [1, 0] and made.draws[1].shares(25).tolist() == [0.75, 0.25]
    assert made.draws[1].after(1)[0].tolist() == [4, 0] and \
        made.draws[1].after(100)[0][1] == pytest.approx(4 * 49.5, abs=1)
    assert not made.batch(4).arrays["source"].any() and made.batch(103).arrays["source"].all()


BAD = dict(unknown=dict(stars=1, suns=1), negative=dict(stars=-1, moons=2), nothing=dict(stars=0, moons=0),
           empty={}, function=lambda progress, losses: dict(suns=1), nan=dict(stars=math.nan, moons=1),
           infinite=dict(stars=math.inf, moons=1))


@pytest.mark.parametrize("mixture", BAD.values(), ids=BAD)
def test_bad_mixture_is_an_input_error(loader, mixture):
    with pytest.raises(InputError, match=r"phases\.1\.mixture .*stars, moons"):
        loader(phase(steps=2), phase(mixture=mixture)).batch(3)


def one_document():
    """A document of the dev split at its shares in `test_source_without_training_documents...`."""
    yield Document("a", "tree")


@pytest.mark.parametrize("mixture", [None, dict(one=1.0)])
def test_source_without_training_documents_is_an_input_error(home, mixture):
    config = DataConfig(sources={"one": Source(one_document)}, dev=0.5, test=0.5)
    caches = {"one": build("one", config, Bytes(), 0)}
    with pytest.raises(InputError, match="one"):
        data.Loader(caches, [phase(mixture=mixture)], config, Bytes(), 0).batch(1)


# ---------------------------------------------------------------------------------- phases, objective, thread


def test_phase_begins_where_the_last_one_ended(loader):
    """Rows drawn times seq, over the new seq: nothing is left out, and less than a row is seen again."""
    made = loader(phase(steps=5, batch=3, seq=32), phase(steps=4, batch=2, seq=20),
                  phase(steps=4, batch=2, seq=96), names=("stars",))
    drawn = [0, 5 * 3 * 32, 5 * 3 * 32 + 4 * 2 * 20]  # positions
    assert [made.draws[p].first()[0].tolist() for p in range(3)] == [[0], [drawn[1] // 20], [drawn[2] // 96]]
    for r, draw in enumerate((24, 25)):
        for key, value in made.rows[1][0][0].get(draw).arrays.items():
            equal(made.batch(6).arrays[key][r], value)
    assert [made.phase_of(step) for step in (1, 5, 6, 9, 10, 13)] == [0, 0, 1, 1, 2, 2]


def test_phases_of_one_length_share_an_epoch(loader):
    """Cut in two phases with other batches, an epoch still visits every position once."""
    epoch = loader(phase(), names=("stars",)).rows[0][0][0].epoch
    half = epoch // 3
    made = loader(phase(steps=half, batch=2), phase(steps=epoch - 2 * half, batch=1), names=("stars",))
    counts = Counter()
    for step in range(1, epoch - half + 1):
        counts.update(made.batch(step).arrays["targets"].ravel().tolist())
    del counts[Points.eos]
    assert counts == Counter(dict.fromkeys(training(stars), 1))


def test_sources_are_followed_each_by_its_own_count(loader):
    """In the second phase each source goes on where it was, whatever the mixture drew."""
    made = loader(phase(steps=5, mixture=dict(stars=3, moons=1)),
                  phase(steps=2, seq=16, mixture=dict(moons=1)))
    assert made.draws[0].after(5)[0].tolist() == [15, 5] and made.draws[1].first()[0].tolist() == [30, 10]
    rows = [made.rows[1][0][1].get(draw).arrays["tokens"] for draw in range(10, 14)]
    equal(made.batch(6).arrays["tokens"], rows)
    assert made.epochs(7) == {"stars": 30 / made.rows[1][0][0].epoch, "moons": 18 / made.rows[1][0][1].epoch}


def noisy(row, rng):
    """An objective with a key and a mask of its own."""
    return row | dict(noise=rng.integers(0, 2**31, len(row["tokens"]))), dict(kind="bidirectional", window=3)


def test_objective_has_its_say_and_a_generator_per_row(loader):
    made = [loader(phase(objective=noisy)).batch(step) for step in (1, 1, 2)]
    assert made[0].mask == dict(kind="bidirectional", window=3)
    equal(made[0].arrays["noise"], made[1].arrays["noise"])
    rows = np.concatenate([made[0].arrays["noise"], made[2].arrays["noise"]])
    assert rows.shape == (8, 32) and len({tuple(row) for row in rows.tolist()}) == 8


def mixed(row, rng):
    """An objective of masks by chance: one row in four is bidirectional."""
    return row, dict(kind="bidirectional" if rng.random() < 0.25 else "causal", window=0)


def mixed_and_declared(row, rng):
    return mixed(row, rng)


mixed_and_declared.masks = dict(kind="causal", window=0), dict(kind="bidirectional", window=0)


def by_source(row, rng):
    """An objective whose moons are read both ways, within a window that the stars do not have."""
    moon = bool(row["source"][0])
    return row, dict(kind="bidirectional" if moon else "causal", window=5 if moon else 0)


def test_unlike_masks_of_a_batch_become_one_prefix_mask(loader):
    """And not that of the first row. A batch whose rows agree has their mask, and no array more."""
    made, plain, kinds = loader(phase(objective=mixed)), loader(phase()), Counter()
    for step in range(1, 40):
        batch, expected = made.batch(step), plain.batch(step).arrays
        both = [np.random.default_rng([0, step, r]).random() < 0.25 for r in range(4)]
        kinds[batch.mask["kind"]] += 1
        if len(set(both)) == 1:
            assert batch.mask == dict(kind="bidirectional" if both[0] else "causal", window=0)
        else:
            assert batch.mask == dict(kind="prefix", window=0)
            equal(batch.arrays["prefix"], np.array(both)[:, None] & (expected["segments"] > 0))
            assert batch.arrays["prefix"].dtype == np.int32
        assert batch.arrays.keys() - {"prefix"} == expected.keys()
        assert all(np.array_equal(batch.arrays[key], expected[key]) for key in expected)
    assert kinds["prefix"] > 10 and kinds["causal"] > 5


@pytest.mark.parametrize("objective", [mixed, mixed_and_declared, partial(mixed_and_declared)])
def test_processes_agree_on_the_mask_of_a_batch(loader, objective):
    """Each makes its own rows alone, and all have the mask and the arrays of the whole."""
    made = loader(phase(objective=objective))
    for step in range(1, 20):
        whole = made.batch(step)
        for i in range(4):
            part = made.batch(step, lambda rows, i=i: np.arange(i, rows, 4))
            same(part, whole._replace(arrays={k: v[i::4] for k, v in whole.arrays.items()}))
        assert whole.mask["kind"] == "prefix" or objective is mixed


def test_masks_that_cannot_be_one_are_refused(loader):
    made = loader(phase(steps=2), phase(objective=by_source, mixture=dict(stars=1, moons=1)))
    with pytest.raises(InputError, match=r"phases\.1\.objective .*'causal', 'window': 0.*'window': 5"):
        made.batch(3)


def halves(sizes, seq):
    """A packing of one piece in a row, cut at half a row."""
    plan = data.concat_and_split(sizes, seq // 2)
    plan[:, ROW], plan[:, SEGMENT] = np.arange(len(plan)), 1
    return plan


def test_packing_is_the_phase_s_own(loader):
    made = loader(phase(steps=2), phase(steps=2, packing=halves))
    assert made.batch(2).arrays["segments"].max() > 1
    assert made.batch(3).arrays["segments"].max() == 1 and not made.batch(3).arrays["segments"][:, 16:].any()


def test_prefetch_keeps_the_order():
    assert list(prefetch(lambda step: step * step, range(1, 50))) == [s * s for s in range(1, 50)]
    assert list(prefetch(str, range(3, 3))) == []


def test_prefetch_raises_errors_in_their_turn():
    def make(step):
        if step == 3:
            raise InputError("step three")
        return step

    stream = prefetch(make, range(1, 10))
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(InputError, match="step three"):
        next(stream)


def test_prefetch_works_no_further_ahead_than_told():
    made = []
    stream = prefetch(lambda step: made.append(step) or step, range(100), depth=2)
    for step in stream:
        assert len(made) <= step + 1 + 2 + 1  # taken, waiting in the queue, in the worker's hand
        if step == 20:
            stream.close()
    assert len(made) < 30


def test_prefetch_ends_its_thread_when_closed():
    before = threading.active_count()
    stream = prefetch(lambda step: step, range(10**9))
    assert next(stream) == 0 and threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


# --------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("split", ["dev", "test", "train"])
def test_held_out_predicts_the_split_s_documents_once(cache, corpus, split):
    held = held_out(cache, split, Bytes(), seq=64, batch=3, overlap=16)
    sizes = {d.path: (corpus / d.path).stat().st_size for d in data.text(str(corpus))
             if SPLITS[split_of(d.path, 0.1, 0.1)] == split}
    assert set(held.paths) == set(sizes) and len(held.paths) == dict(dev=3, test=6, train=31)[split]
    assert held.bytes.tolist() == [sizes[p] for p in held.paths]
    assert list(held.texts()) == [(corpus / p).read_bytes() for p in held.paths]
    said, count = {d: [] for d in range(len(held.paths))}, np.zeros(len(held.paths), int)
    for arrays, whose in held.batches():
        assert set(arrays) == {"tokens", "targets", "segments", "positions", "weights", "source"}
        assert all(x.shape == (3, 64) for x in (*arrays.values(), whose))
        equal(whose >= 0, arrays["weights"] > 0)
        for d, target in zip(whose[whose >= 0].tolist(), arrays["targets"][whose >= 0].tolist(), strict=True):
            said[d].append(target)
    np.add.at(count, list(said), [len(x) for x in said.values()])
    equal(count, held.bytes + 1)
    for d, path in enumerate(held.paths):  # windows come in order, so do their targets
        assert bytes(said[d][:-1]) == (corpus / path).read_bytes() and said[d][-1] == Bytes.eos


def test_held_out_can_be_limited(cache):
    whole = held_out(cache, "test", Bytes(), 64, 3, 16)
    sizes = np.cumsum(whole.bytes + 1)
    for most, kept in ((int(sizes[2]), 3), (int(sizes[2]) - 1, 2), (1, 1), (10**9, len(sizes))):
        held = held_out(cache, "test", Bytes(), 64, 3, 16, most=most)
        assert held.paths == whole.paths[:kept]
        assert sum(int(np.sum(whose >= 0)) for _, whose in held.batches()) == sizes[kept - 1]


def test_held_out_of_nothing_is_nothing(home):
    config = DataConfig(sources={"one": Source(one_document)}, dev=0.0, test=0.0)
    for most in (None, 10):
        held = held_out(build("one", config, Bytes(), 0), "dev", Bytes(), 64, 3, 16, most)
        assert held.paths == [] and list(held.batches()) == [] and list(held.texts()) == []


def test_bits_per_byte_of_known_losses(cache):
    """Losses that depend on the target alone, summed here document by document."""
    held = held_out(cache, "test", Bytes(), 64, 3, 16)
    got = bits_per_byte(lambda arrays: arrays["targets"] / 100, held)
    nats = np.array([(sum(text) + Bytes.eos) / 100 for text in held.texts()])
    bpb = nats.sum() / math.log(2) / held.bytes.sum()
    assert got["loss"] == pytest.approx(nats.sum() / (held.bytes + 1).sum())
    assert got["bpb"] == pytest.approx(bpb)
    residual = nats / math.log(2) - bpb * held.bytes  # of a ratio estimator (Cochran 1977, 6.4)
    n = len(nats)
    assert got["bpb_se"] == pytest.approx(math.sqrt(residual @ residual / (n - 1) / n) / held.bytes.mean())
    one = bits_per_byte(lambda arrays: arrays["targets"] / 100,
                             held_out(cache, "test", Bytes(), 64, 3, 16, most=1))
    assert math.isnan(one["bpb_se"]) and one["bpb"] == pytest.approx(nats[0] / math.log(2) / held.bytes[0])


# --------------------------------------------------------- orders, row lengths, limits, steering, streaming


def backwards(draw, rows, progress, key):
    """An order: the plan's rows from the last to the first, from the middle on in the phase's second half."""
    return (rows - 1 - draw - (rows // 2 if progress >= 0.5 else 0)) % rows


def mostly_short(progress):
    return {16: 3.0 - 2 * progress, 64: 1.0}


def by_log(progress, log):
    """A mixture by the last losses; without any, the stars alone."""
    return log[-1] if log else {"stars": 1}


def same(one: data.Batch, other: data.Batch):
    assert one.arrays.keys() == other.arrays.keys() and one.mask == other.mask
    for key, value in one.arrays.items():
        equal(value, other.arrays[key], err_msg=key)


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_parts_of_a_batch_are_the_batch(loader, parts):
    made = loader(phase(batch=9, mixture=dict(stars=0.7, moons=0.3)))
    for step in (1, 5):
        whole, split = made.batch(step), [made.batch(step, lambda rows, i=i: np.arange(i, rows, parts))
                                          for i in range(parts)]
        assert {whole.rows, *(p.rows for p in split)} == {9}
        for i, part in enumerate(split):
            same(part, whole._replace(arrays={k: v[i::parts] for k, v in whole.arrays.items()}))


def test_order_is_told_the_draw_and_the_progress(loader):
    made, plain = (loader(phase(steps=steps, batch=1, order=order), names=("moons",)) for steps, order in
                   ((40, backwards), (400, lambda draw, rows, progress, key: draw % rows)))
    rows = made.rows[0][0][0].epoch
    for step in (1, 2, 20, 21, 40):
        draw = step - 1
        place = (rows - 1 - draw - (rows // 2 if draw >= 20 else 0)) % rows
        same(made.batch(step), loader(phase(steps=40, batch=1, order=lambda *_, at=place: at),
                                      names=("moons",)).batch(1))
    equal(plain.batch(rows + 1).arrays["tokens"], plain.batch(1).arrays["tokens"])


def test_row_lengths_keep_to_their_weights_and_batches_to_their_size(loader):
    made = loader(phase(steps=400, batch=2, seq=64, lengths=mostly_short), names=("stars",))
    shapes = [made.batch(step).arrays["tokens"].shape for step in range(1, 401)]
    assert {b * t for b, t in shapes} == {128} and {t for _, t in shapes} == {16, 64}
    due = np.cumsum([(3 - 2 * i / 400) / (4 - 2 * i / 400) for i in range(400)])
    assert np.max(np.abs(np.cumsum([t == 16 for _, t in shapes]) - due)) <= 1
    counts = made.draws[0].after(400)
    assert counts[:, 0].tolist() == [sum(b for b, t in shapes if t == length) for length in (16, 64)]
    for length in (16, 64):  # each length has rows of its own, none twice within an epoch
        first = [tuple(row) for step in range(1, 30) if shapes[step - 1][1] == length
                 for row in made.batch(step).arrays["targets"].tolist()]
        assert len(set(first)) == len(first) > 8


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), st.integers(1, 12),
       st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_apportion(weights, rows, left):
    owed = np.array(weights) / sum(weights) * rows
    left = np.array(left, float) if sum(left) >= rows else np.full(3, math.inf)
    whole = data.apportion(owed, rows, left)
    assert whole.sum() == rows and np.all(whole >= 0) and np.all(whole <= left)
    if np.all(left >= np.ceil(owed)):
        assert np.all(np.abs(whole - owed) < 1)


def test_a_source_that_ends_with_a_batch_stops_the_run_too(caches):
    """Exactly as many rows as whole batches want: the next step has none, and nobody takes over."""
    rows = data.Loader(caches, [phase()], SKY, Points(), 0).rows[0][0][1].epoch
    sources = {"stars": Source(stars), "moons": Source(moons, epochs=1.0)}
    made = data.Loader(caches, [phase(batch=10, mixture=dict(stars=0.9, moons=0.1))],
                       replace(SKY, sources=sources), Points(), 0)
    assert made.draws[0].after(rows)[0, 1] == rows
    with pytest.raises(InputError, match=f"moons: no rows left at step {rows} "):
        made.draws[0].after(rows + 1)


def test_two_threads_plan_and_draw_as_one(home):
    """Batches are made in one thread while another counts epochs: no window twice, no row lost."""
    config = with_many()
    cache = build("many", config, Bytes(), 0)

    def slow(lengths, seq):
        time.sleep(0.01)
        return data.concat_and_split(lengths, seq)

    config = replace(config, window=1)
    loaders = [data.Loader({"many": cache}, [phase(steps=400, seq=8)], config, Bytes(), 0) for _ in range(2)]
    loaders[1].rows[0][0][0].packing = slow
    threads = [threading.Thread(target=loaders[1].epochs, args=(400,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaders[1].epochs(400) == loaders[0].epochs(400)
    assert loaders[1].rows[0][0][0].ends == loaders[0].rows[0][0][0].ends


@pytest.mark.parametrize("after", ["stop", "renormalise"])
def test_a_source_comes_no_more_often_than_its_epochs_allow(caches, after):
    sources = {"stars": Source(stars), "moons": Source(moons, epochs=1.5, after=after)}
    made = data.Loader(caches, [phase(steps=20, batch=9, mixture=dict(stars=0.5, moons=0.5)),
                                phase(steps=80, batch=9, mixture=dict(stars=0.1, moons=0.9))],
                       replace(SKY, sources=sources), Points(), 0)
    most = int(made.rows[0][0][1].epoch * 1.5)
    if after == "stop":
        with pytest.raises(InputError, match="moons: no rows left at step"):
            made.batch(100)
        return
    counts = np.array([made.draws[1].after(step)[0] for step in range(81)]) + made.draws[1].first()[0]
    assert np.max(counts[:, 1]) == most and counts[-1].sum() == 9 * 100
    assert np.all(np.diff(counts, axis=0).sum(1) == 9)


def test_a_source_that_went_beyond_its_epochs_gives_no_rows(caches):
    """An epoch of the second phase has fewer rows, so that more than all of them were drawn in the first."""
    sources = {"stars": Source(stars), "moons": Source(moons, epochs=1.0, after="renormalise")}
    first = dict(packing=halves, batch=1, mixture=dict(moons=1))
    most = data.Loader(caches, [phase(**first)], SKY, Points(), 0).rows[0][0][1].epoch
    phases = [phase(steps=most, **first), phase(steps=4, mixture=dict(stars=1, moons=1))]
    made = data.Loader(caches, phases, replace(SKY, sources=sources), Points(), 0)
    assert made.draws[1].first()[0, 1] > made.rows[1][0][1].epoch
    assert made.draws[1].after(4).tolist() == [[16, 0]]
    assert made.batch(most + 1).rows == 4 and not made.batch(most + 1).arrays["source"].any()


def test_a_source_without_weight_does_not_stand_in(caches):
    sources = {"stars": Source(stars), "moons": Source(moons, epochs=0.5, after="renormalise")}
    made = data.Loader(caches, [phase(mixture=dict(moons=1))], replace(SKY, sources=sources), Points(), 0)
    with pytest.raises(InputError, match="no rows left"):
        made.batch(5_000)


def test_running_out_of_every_source_is_an_input_error(caches):
    sources = {"moons": Source(moons, epochs=0.5, after="renormalise")}
    made = data.Loader({"moons": caches["moons"]}, [phase()], replace(SKY, sources=sources), Points(), 0)
    with pytest.raises(InputError, match="moons: no rows left"):
        made.batch(5_000)


def test_a_steered_mixture_follows_its_log_and_nothing_else(caches):
    """Decisions come in turn; a loader that is given the log draws the same; beyond it there is an error."""
    phases = [phase(steps=4), phase(steps=12, mixture=by_log, steer=4)]
    first = data.Loader(caches, phases, SKY, Points(), 0)
    assert first.decided() == 8
    batches = [first.batch(step) for step in range(1, first.decided() + 1)]
    with pytest.raises(InputError, match="beyond the decisions"):
        first.batch(9)
    first.decide(1, dict(stars=1.0, moons=3.0))
    assert first.decided() == 12
    batches += [first.batch(step) for step in range(9, 13)]
    first.decide(1, dict(moons=1.0))
    assert first.decided() == 16 and first.log == [[], [dict(stars=1.0, moons=3.0), dict(moons=1.0)]]
    batches += [first.batch(step) for step in range(13, 17)]
    shares = [np.mean(b.arrays["source"]) for b in batches]
    assert shares[4:8] == [0] * 4 and np.mean(shares[8:12]) == 0.75 and shares[12:] == [1] * 4
    again = data.Loader(caches, phases, SKY, Points(), 0)
    again.restore(first.start, first.log)
    for step in (16, 9, 3):
        same(again.batch(step), batches[step - 1])


ASKED = []


def reversed_plan(lengths, seq, documents):
    """A packing that asks for the documents: the plain plan of the later half, by score."""
    score = documents.of(lambda shard: shard.score)
    ASKED.append((lengths.tolist(), score.tolist(), [documents.ids(i).tolist() for i in range(len(lengths))],
                  [d["path"] for d in documents.of(Shard.documents)]))
    return data.concat_and_split(np.where(score > np.median(score), lengths, 0), seq)


def test_a_packing_may_ask_about_its_documents_and_its_plan_is_kept(home):
    config = with_many(score=token_count)
    cache = build("many", config, Bytes(), 0)
    ASKED.clear()
    phases = [phase(steps=5, packing=reversed_plan)]
    batches = [data.Loader({"many": cache}, phases, config, Bytes(), 0).batch(3) for _ in range(2)]
    same(*batches)
    (lengths_, scores, ids, paths), = ASKED  # planned once: the second loader found the plan
    texts = {d.path: d.text for d in many() if isinstance(d, Document)}
    assert [bytes(i).decode() for i in ids] == [texts[p] for p in paths] and len(set(paths)) == len(paths)
    assert lengths_ == [len(i) + 1 for i in ids] and scores == [float(len(texts[p])) for p in paths]


def with_header(document, rng):
    return replace(document, prefix=f"<{document.path}>")


def test_a_prefix_is_read_but_not_predicted(home):
    """From the loader's own batches: the header's bytes are inputs without loss, the text has it all."""
    config = replace(with_many(prepare=with_header), dev=0.0, test=0.0)
    made = data.Loader({"many": build("many", config, Bytes(), 0)}, [phase(seq=48)], config, Bytes(), 0)
    texts, heads, seen = {d.path: d.text for d in many() if isinstance(d, Document)}, {}, Counter()
    assert made.rows[0][0][0].epoch >= 16
    for step in range(1, made.rows[0][0][0].epoch // 4 + 1):
        arrays = made.batch(step).arrays
        for r, row in enumerate(arrays["segments"]):
            for segment in range(1, row.max() + 1):
                where = row == segment
                tokens, weights = arrays["tokens"][r, where].tolist(), arrays["weights"][r, where].tolist()
                whole = bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
                if tokens[0] == Bytes.bos and (head := whole.split(">")[0] + ">") in heads | {
                        f"<{p}>": 0 for p in texts}:
                    loud = len(tokens) - len(head.encode())
                    assert weights == ([0.0] * len(head.encode()) + [1.0] * len(tokens))[:len(tokens)]
                    seen[head] += loud > 0
    assert len(seen) > 20


STREAM = '''
import hashlib, os, sys, time
sys.path[:0] = [os.environ["COPPICE"]]
from types import SimpleNamespace
import numpy as np
import data
from lib.cache import Cache, build, cache_directory
from lib.tokenizers import Bytes

def letters():
    for i in range(9_000):
        if i % 256 == 0:
            time.sleep(float(os.environ["PAUSE"]))
        rng = np.random.default_rng(i)
        yield data.Document(f"{i:05d}", bytes(rng.integers(97, 123, rng.integers(1, 60)).tolist()).decode())

def rising(progress, log):
    return {"a": 1 - progress, "b": 1 + progress}

def pacing(draw, rows, progress, key):
    share = max(1, int(rows * min(1, 0.2 + progress)))
    return int(np.random.default_rng([*key, draw]).integers(share))

source = data.Source(letters, score=lambda document, ids: float(len(ids)))
config = data.DataConfig(sources=dict(a=source, b=source), tokenizer="bytes", shard_tokens=1, window=3)
plain = dict(lengths=None, steer=0, objective=data.causal, packing=data.concat_and_split, mixture=rising)
phases = [SimpleNamespace(steps=40, batch=12, seq=64, order=pacing, **plain),
          SimpleNamespace(steps=40, batch=12, seq=16, order=data.shuffled, **plain)]
what, *rest = sys.argv[1:]
if what == "build":
    build(rest[0], config, Bytes(), 0)
else:
    builder = SimpleNamespace(poll=lambda: None), None
    caches = {n: Cache(cache_directory(n, config, Bytes(), 0), n, builder) for n in config.sources}
    made = data.Loader(caches, phases, config, Bytes(), 0)
    begin, end, part, parts = map(int, rest)
    for step in range(begin, end + 1):
        arrays = made.batch(step, lambda n: np.arange(n * part // parts, n * (part + 1) // parts)).arrays
        rows = [hashlib.sha256(b"".join(v[r].tobytes() for _, v in sorted(arrays.items()))).hexdigest()
                for r in range(len(arrays["tokens"]))]
        print(step, *rows, flush=True)
'''


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.soak)])
def test_streamed_batches_are_those_of_a_finished_cache(kills, home, tmp_path):
    """Readers and builders are killed so often while shards are being built, and resumed with another
    number of processes, each of which reads its rows alone: a curriculum by score, a change of length, and a
    mixture that moves. Every row is as one process reads it from the finished cache."""
    (tmp_path / "stream.py").write_text(STREAM)
    environment = os.environ | dict(COPPICE=str(Path(data.__file__).parent), PAUSE="0.05")

    def start(*arguments, **more):
        command = [sys.executable, str(tmp_path / "stream.py"), *map(str, arguments)]
        return subprocess.Popen(command, text=True, env=environment | more, stdout=subprocess.PIPE)

    rng, rows, chunk = random.Random(0), {}, 80 // (kills + 1)
    for attempt in range(kills + 1):
        parts, step, last = rng.choice([1, 2, 3, 4]), len(rows) + 1, attempt == kills
        builders = [start("build", name) for name in "ab"]
        end = 80 if last else step + chunk - 1
        readers = [start("read", step, end, part, parts) for part in range(parts)]
        said = "" if last else "".join(readers[0].stdout.readline() for _ in range(rng.randint(1, chunk)))
        for process in () if last else (*builders, *readers):
            process.kill()
        texts = [reader.communicate(timeout=120)[0] for reader in readers]
        for lines in zip(*(x.splitlines() for x in [said + texts[0], *texts[1:]]), strict=last):
            fields = [line.split() for line in lines]
            if all(len(f) > 12 // parts for f in fields):  # a kill may cut a line
                assert {int(f[0]) for f in fields} == {len(rows) + 1}
                rows[len(rows) + 1] = sum((f[1:] for f in fields), [])
    assert [p.wait(120) for p in (*builders, *readers)] == [0] * (2 + parts)
    whole = [line.split() for line in start("read", 1, 80, 0, 1).communicate(timeout=120)[0].splitlines()]
    assert [[str(step), *row] for step, row in rows.items()] == whole and len(whole) == 80
    sealed = files(next((home / "tokens").glob("a-*/complete")).parent)
    (tmp_path / "again").mkdir()
    assert start("build", "a", XDG_CACHE_HOME=str(tmp_path / "again"), PAUSE="0").wait(120) == 0
    other = files(next((tmp_path / "again/coppice/tokens").glob("a-*/complete")).parent)
    assert {k: v for k, v in sealed.items() if "plans" not in str(k)} == other
