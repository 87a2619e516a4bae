"""data.py: every batch is a function of the config, the seed and the step."""
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import sky
from corpora import Points, documents_of, many, stars, token_count, with_many
from sky import (
    drawn,
    first_rows,
    halves,
    loader,
    moons,
    phase,
    pieces_of,
    rising,
    rows_of,
    same,
    trained_places,
)

import data
from data import DataConfig, Document, InputError, Source
from lib.cache import Shard, build
from lib.sources import split_of
from lib.tokenizers import Bytes

equal = np.testing.assert_array_equal
STARS = ("stars",)
MOONS = ("moons",)


def bytes_loader(config: DataConfig, *phases) -> data.Loader:
    """A loader of the one source of a config, in bytes."""
    (name,) = config.sources
    cache = build(name, config, Bytes(), 0)
    return data.Loader({name: cache}, phases, config, Bytes(), 0)


# ------------------------------------------------------------------------------- what a batch holds


def last_tokens(documents) -> set[int]:
    """The code points that documents end with."""
    return {ord(document.text[-1]) for document in documents()}


def check_piece(piece: sky.Piece, places: dict, ends: set[int]):
    """Each target is the token that follows in its document; the source is the document's."""
    assert piece.positions == list(range(len(piece.tokens)))
    assert piece.tokens[1:] == piece.targets[:-1]
    for token, target, source in zip(piece.tokens, piece.targets, piece.source, strict=True):
        known = target
        if target == Points.eos:
            assert token in ends
            known = token
        else:
            assert places[target].before == token
        assert known in places
        assert source == (known >= sky.FIRST_MOON)


def test_every_target_is_the_next_token_of_its_document():
    """And the figures that go with a batch are those of its pieces."""
    places = trained_places(stars) | trained_places(moons)
    ends = last_tokens(stars) | last_tokens(moons)
    names = {"tokens", "targets", "segments", "positions", "weights", "source"}
    made = loader(phase())
    seen = 0
    for step in range(1, 20):
        batch = made.batch(step)
        pieces = list(pieces_of(batch.arrays))
        segments = batch.arrays["segments"]
        cut = [piece for piece in pieces if piece.targets[-1] != Points.eos]
        seen += len(pieces)

        assert batch.mask == dict(kind="causal", window=0)
        assert set(batch.arrays) == names
        assert all(values.shape == (4, 32) for values in batch.arrays.values())
        equal(batch.arrays["weights"], segments > 0)
        for piece in pieces:
            check_piece(piece, places, ends)
        assert batch.metrics["data/waste"] == pytest.approx(np.mean(segments == 0))
        assert batch.metrics["data/truncated"] == pytest.approx(len(cut) / len(pieces))
        assert batch.metrics["data/segments"] == len(pieces) / 4
    assert seen > 200


def holds(whole: list[int], part: list[int]) -> bool:
    """Whether the whole has the part somewhere, in one piece."""
    size = len(part)
    starts = range(len(whole) - size + 1)
    return any(whole[start:start + size] == part for start in starts)


def test_pieces_of_words_stand_in_a_training_document_too(corpus, data_config, pieces):
    """With a trained tokenizer in place of code points."""
    cache = build("corpus", data_config, pieces, 0)
    made = data.Loader({"corpus": cache}, [phase(seq=64)], data_config, pieces, 0)
    documents = []
    for document in data.text(str(corpus)):
        if split_of(document.path, 0.1, 0.1) == 0:
            documents.append([pieces.bos, *pieces.encode(document.text), pieces.eos])

    seen = 0
    for step in (1, 2, 3):
        for piece in pieces_of(made.batch(step).arrays):
            text = [*piece.tokens, piece.targets[-1]]
            assert any(holds(document, text) for document in documents)
            seen += 1
    assert seen >= 12


# ------------------------------------------------------------------------------------ epochs, order


def trained_targets(made: data.Loader, steps) -> list[int]:
    """The targets with a loss in the batches of these steps."""
    found = []
    for step in steps:
        arrays = made.batch(step).arrays
        weighted = arrays["weights"] > 0
        found += arrays["targets"][weighted].tolist()
    return found


def star_documents() -> set[str]:
    """The paths of the stars of the train split."""
    return {place.path for place in trained_places(stars).values()}


def check_every_star_once(targets: list[int]):
    """Targets are those of one epoch: each code point of the stars, and each document's end."""
    expected = Counter(dict.fromkeys(trained_places(stars), 1))
    expected[Points.eos] = len(star_documents())
    assert Counter(targets) == expected


@pytest.mark.parametrize("seq", [32, 7, 500])
def test_an_epoch_visits_every_position_once(seq):
    """Documents lie in three shards and two windows. Two epochs differ in order."""
    made = loader(phase(batch=1, seq=seq), names=STARS)
    epoch = rows_of(made).epoch
    positions = len(trained_places(stars)) + len(star_documents())
    assert epoch >= positions / seq

    first = trained_targets(made, range(1, 1 + epoch))
    second = trained_targets(made, range(1 + epoch, 1 + 2 * epoch))

    check_every_star_once(first)
    check_every_star_once(second)
    assert first != second
    assert made.epochs(0) == {"stars": 0}
    assert made.epochs(epoch) == {"stars": 1}


def test_the_rows_of_a_window_come_before_those_of_the_next():
    """Of three shards, the first two are a window."""
    made = loader(phase(batch=1), names=STARS)
    epoch = rows_of(made).epoch
    size = rows_of(made).ends[1]
    assert rows_of(made).ends == [0, size, epoch]
    assert size < epoch

    places = trained_places(stars)
    for step in range(1, epoch + 1):
        targets = made.batch(step).arrays["targets"].ravel().tolist()
        paths = [places[target].path for target in targets if target in places]
        numbers = [int(path.split("/")[1]) for path in paths]
        if step <= size:
            assert all(number < 512 for number in numbers)
        else:
            assert all(number >= 512 for number in numbers)


def test_documents_and_rows_are_shuffled_within_their_window():
    """The source's own order is kept about as often as not, from row to row and within a row."""
    made = loader(phase(batch=1), names=STARS)
    size = rows_of(made).ends[1]
    between = []
    within = []
    for step in range(1, size + 1):
        pieces = pieces_of(made.batch(step).arrays)
        begins = [piece.targets[0] for piece in pieces]
        begins = [target for target in begins if target != Points.eos]
        between += begins[:1]
        within += (np.diff(begins) > 0).tolist()
    assert 0.3 < np.mean(np.diff(between) > 0) < 0.7
    assert 0.3 < np.mean(within) < 0.7


def test_batches_do_not_depend_on_what_was_asked_before():
    phases = (
        phase(steps=9, mixture=dict(stars=0.7, moons=0.3)),
        phase(steps=8, seq=16, batch=3, mixture=rising),
    )
    made = loader(*phases)
    steps = list(range(1, 18))
    first = {step: made.batch(step) for step in steps}
    assert first[9].arrays["tokens"].shape == (4, 32)
    assert first[10].arrays["tokens"].shape == (3, 16)

    random.Random(0).shuffle(steps)
    for step in [*steps, 1]:
        for again in (made, loader(*phases)):
            batch = again.batch(step)
            same(batch, first[step])
            assert batch.metrics == first[step].metrics


def test_the_order_follows_the_seed():
    one = loader(phase(), seed=0).batch(1)
    other = loader(phase(), seed=1).batch(1)
    assert np.mean(one.arrays["tokens"] == other.arrays["tokens"]) < 0.5


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_the_parts_of_a_batch_are_the_batch(parts):
    made = loader(phase(batch=9, mixture=dict(stars=0.7, moons=0.3)))
    for step in (1, 5):
        assert made.batch(step).rows == 9
        sky.check_parts(made, step, parts)


# ------------------------------------------------------------------------------------------- phases


def test_a_phase_begins_where_the_last_one_ended():
    """At the rows drawn times their length, over the new length.

    Nothing is left out, and less than a row is seen again.
    """
    phases = (
        phase(steps=5, batch=3, seq=32),
        phase(steps=4, batch=2, seq=20),
        phase(steps=4, batch=2, seq=96),
    )
    made = loader(*phases, names=STARS)
    first = 5 * 3 * 32  # positions
    second = first + 4 * 2 * 20

    begins = [first_rows(made, number).tolist() for number in range(3)]
    assert begins == [[0], [first // 20], [second // 96]]
    for row, draw in enumerate((24, 25)):
        expected = rows_of(made, phase=1).get(draw).arrays
        for name, values in expected.items():
            equal(made.batch(6).arrays[name][row], values)
    steps = (1, 5, 6, 9, 10, 13)
    assert [made.phase_of(step) for step in steps] == [0, 0, 1, 1, 2, 2]


def test_phases_of_one_length_share_an_epoch():
    """Cut in two phases with other batches, an epoch still visits every position once."""
    epoch = rows_of(loader(phase(), names=STARS)).epoch
    third = epoch // 3
    rest = epoch - 2 * third
    phases = phase(steps=third, batch=2), phase(steps=rest, batch=1)
    made = loader(*phases, names=STARS)
    steps = range(1, third + rest + 1)
    check_every_star_once(trained_targets(made, steps))


def test_each_source_is_followed_by_its_own_count():
    """In the second phase each source goes on where it was, whatever the mixture drew."""
    mixed = phase(steps=5, mixture=dict(stars=3, moons=1))
    moons_alone = phase(steps=2, seq=16, mixture=dict(moons=1))
    made = loader(mixed, moons_alone)
    assert drawn(made, 5).tolist() == [15, 5]
    assert first_rows(made, 1).tolist() == [30, 10]

    star_rows = rows_of(made, phase=1, source=0)
    moon_rows = rows_of(made, phase=1, source=1)
    rows = [moon_rows.get(draw).arrays["tokens"] for draw in range(10, 14)]
    equal(made.batch(6).arrays["tokens"], rows)
    epochs = made.epochs(7)
    assert epochs == {"stars": 30 / star_rows.epoch, "moons": 18 / moon_rows.epoch}


# ----------------------------------------------------------------- orders, row lengths and packings


def backwards(draw, rows, progress, key):
    """An order from the last row to the first; the phase's second half begins in the middle."""
    back = draw
    if progress >= 0.5:
        back += rows // 2
    return (rows - 1 - back) % rows


def in_turn(draw, rows, progress, key):
    """The order of the plan."""
    return draw % rows


def always(draw, rows, progress, key, place):
    """The same row again and again."""
    return place


def test_an_order_is_told_the_draw_and_the_progress():
    made = loader(phase(steps=40, batch=1, order=backwards), names=MOONS)
    rows = rows_of(made).epoch
    for step in (1, 2, 20, 21, 40):
        place = backwards(step - 1, rows, (step - 1) / 40, ())
        fixed = phase(steps=40, batch=1, order=partial(always, place=place))
        same(made.batch(step), loader(fixed, names=MOONS).batch(1))


def test_an_order_counts_on_after_an_epoch():
    made = loader(phase(steps=400, batch=1, order=in_turn), names=MOONS)
    rows = rows_of(made).epoch
    first = made.batch(1)
    after_an_epoch = made.batch(rows + 1)
    equal(after_an_epoch.arrays["tokens"], first.arrays["tokens"])


def mostly_short(progress):
    """Weights of row lengths: rows of 16 grow rarer."""
    return {16: 3.0 - 2 * progress, 64: 1.0}


def test_row_lengths_keep_to_their_weights_and_batches_to_their_size():
    made = loader(phase(steps=400, batch=2, seq=64, lengths=mostly_short), names=STARS)
    shapes = [made.batch(step).arrays["tokens"].shape for step in range(1, 401)]
    assert {rows * length for rows, length in shapes} == {128}
    assert {length for _, length in shapes} == {16, 64}

    progress = np.arange(400) / 400
    share = (3 - 2 * progress) / (4 - 2 * progress)
    short = np.array([length == 16 for _, length in shapes])
    assert np.max(np.abs(np.cumsum(short) - np.cumsum(share))) <= 1

    total = {16: 0, 64: 0}
    for rows, length in shapes:
        total[length] += rows
    star_rows = made.draws[0].after(400)[:, 0]
    assert star_rows.tolist() == [total[16], total[64]]


@pytest.mark.parametrize("length", [16, 64])
def test_each_row_length_has_rows_of_its_own_and_none_twice_in_an_epoch(length):
    made = loader(phase(steps=400, batch=2, seq=64, lengths=mostly_short), names=STARS)
    rows = []
    for step in range(1, 30):
        targets = made.batch(step).arrays["targets"]
        if targets.shape[1] == length:
            rows += [tuple(row) for row in targets.tolist()]
    assert len(rows) > 8
    assert len(set(rows)) == len(rows)


def test_the_packing_is_the_phase_s_own():
    made = loader(phase(steps=2), phase(steps=2, packing=halves))
    assert made.batch(2).arrays["segments"].max() > 1
    segments = made.batch(3).arrays["segments"]
    assert segments.max() == 1
    assert not segments[:, 16:].any()


class Told(NamedTuple):
    """What a packing was told of its documents, one item for each."""

    lengths: list[int]
    scores: list[float]
    ids: list[list[int]]
    paths: list[str]


TOLD = []


def upper_half(lengths, seq, documents):
    """A packing of the documents with a score above the middle; it notes what it is told."""
    scores = documents.of(lambda shard: shard.score)
    ids = [documents.ids(number).tolist() for number in range(len(lengths))]
    paths = [facts["path"] for facts in documents.of(Shard.documents)]
    TOLD.append(Told(lengths.tolist(), scores.tolist(), ids, paths))
    chosen = np.where(scores > np.median(scores), lengths, 0)
    return data.concat_and_split(chosen, seq)


def test_a_packing_may_ask_about_its_documents_and_its_plan_is_kept(home):
    config = with_many(score=token_count)
    asking = phase(steps=5, packing=upper_half)
    TOLD.clear()

    first = bytes_loader(config, asking).batch(3)
    second = bytes_loader(config, asking).batch(3)

    same(first, second)
    (told,) = TOLD  # the second loader found the plan
    texts = {document.path: document.text for document in documents_of(many)}
    wanted = [texts[path] for path in told.paths]
    assert len(wanted) > 400
    assert len(set(told.paths)) == len(told.paths)
    assert [bytes(ids).decode() for ids in told.ids] == wanted
    assert told.lengths == [len(ids) + 1 for ids in told.ids]
    assert told.scores == [float(len(text)) for text in wanted]


# ----------------------------------------------------------------------------- documents and caches


def with_header(document, rng):
    """A `prepare` that puts the path in front, without loss: <007>."""
    return replace(document, prefix=f"<{document.path}>")


def quiet_targets(piece: sky.Piece) -> int:
    """How many targets of a piece belong to a header; no text has a ">" of its own."""
    if ord(">") in piece.targets:
        return piece.targets.index(ord(">")) + 1
    if piece.tokens[0] == Bytes.bos:  # cut within the header
        return len(piece.targets)
    return 0


def test_a_prefix_is_read_but_not_predicted(home):
    """The header's bytes are inputs without loss, and every byte of the text has its loss."""
    config = replace(with_many(prepare=with_header), dev=0.0, test=0.0)
    made = bytes_loader(config, phase(seq=48))
    headers = {f"<{document.path}>" for document in documents_of(many)}
    epoch = rows_of(made).epoch
    assert epoch >= 16

    seen = set()
    for step in range(1, epoch // 4 + 1):
        for piece in pieces_of(made.batch(step).arrays):
            quiet = quiet_targets(piece)
            loud = len(piece.targets) - quiet
            assert piece.weights == [0.0] * quiet + [1.0] * loud
            if piece.tokens[0] == Bytes.bos and loud:
                header = bytes(piece.targets[:quiet]).decode()
                assert header in headers
                seen.add(header)
    assert len(seen) > 20


def one_document():
    """A document that is in the dev split where that is half of all."""
    yield Document("a", "tree")


@pytest.mark.parametrize("mixture", [None, dict(one=1.0)])
def test_a_source_without_training_documents_is_refused(home, mixture):
    config = DataConfig(sources={"one": Source(one_document)}, dev=0.5, test=0.5)
    build("one", config, Bytes(), 0)  # which is no error yet
    with pytest.raises(InputError, match="'one' has no document in its train split"):
        bytes_loader(config, phase(mixture=mixture)).batch(1)


def slowly(lengths, seq):
    """A packing that takes its time."""
    time.sleep(0.01)
    return data.concat_and_split(lengths, seq)


def test_threads_plan_and_draw_as_one(home):
    """One makes batches while others count epochs: no window is planned twice, no row is lost."""
    config = replace(with_many(), window=1)
    alone = bytes_loader(config, phase(steps=400, seq=8))
    shared = bytes_loader(config, phase(steps=400, seq=8))
    rows_of(shared).packing = slowly

    threads = [threading.Thread(target=shared.epochs, args=(400,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert shared.epochs(400) == alone.epochs(400)
    assert rows_of(shared).ends == rows_of(alone).ends
