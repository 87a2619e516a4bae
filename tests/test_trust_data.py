"""Files under fire: archives that grow, break and lie, links, pipes, disks that fail, odd numbers in JSON."""
import errno
import gzip
import os
import re
import tracemalloc
from functools import partial

import pytest
from corpora import built

import data
from data import Document, InputError, Skipped
from lib import readers, sources
from lib.any_text import any_text
from lib.readers import jsonl, parquet


def kinds(found) -> list[str]:
    """What was skipped, by kind."""
    return [one.kind for one in found if isinstance(one, Skipped)]


# ------------------------------------------------------------------------------------------ archives


@pytest.mark.parametrize("separator", ["", "\n\n", "|end|"])
def test_an_archive_is_unpacked_piece_by_piece(tmp_path, separator):
    """100 MB of zeros take 100 kB as .gz; little of them is in memory at any time."""
    with gzip.open(tmp_path / "a.gz", "wb", 1) as file:
        for _ in range(100):
            file.write(bytes(2**20))
    tracemalloc.start()
    found = list(data.text(str(tmp_path), separator, longest=2**22))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kinds(found) == ["over-long document"] and len(found) == 1
    assert most < 20 * 2**20


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 4096])
@pytest.mark.parametrize("end", ["\n\n", "|", "aa", "|end|"])
def test_pieces_are_those_of_the_whole(tmp_path, monkeypatch, chunk, end):
    text = f"{end}b{end}{end}cc d{'x' * 50}{end}aaa|en{end}|end|e\n\n\n{end}last"
    (tmp_path / "a.txt").write_text(text, newline="")
    monkeypatch.setattr(sources, "CHUNK", chunk)
    found = list(data.text(str(tmp_path), end, longest=40))
    whole = re.findall(f"(?s).*?{re.escape(end)}|.+$", text)
    assert len(found) == len(whole)
    for piece, one in zip(whole, found, strict=True):
        assert one.kind == "over-long document" if len(piece) > 40 else one.text == piece


def test_what_an_archive_gave_before_its_break_is_doubtful(tmp_path):
    """A wrong byte in the middle: some lines may be others, and the checksum at the end says so."""
    content = bytearray(gzip.compress(b"".join(b"line %d\n" % i for i in range(2_000)), 0))
    content[3_000] ^= 1
    (tmp_path / "a.gz").write_bytes(content)
    found = list(data.text(str(tmp_path), "\n"))
    assert kinds(found) == ["unreadable"] and found[-1].doubtful == len(found) - 1 > 1_900
    read = partial(data.text, path=str(tmp_path), separator="\n")
    counts = built(read).total["counts"]
    assert counts["doubtful: they stand before the break of a damaged archive"] == len(found) - 1


# ------------------------------------------------------------------------------------- links and pipes


def test_a_snapshot_of_the_hugging_face_cache_is_read_and_nothing_beside_it(tmp_path):
    """Its files are links to REPOSITORY/blobs, which is out of the directory."""
    repository = tmp_path / "datasets--org--name"
    snapshot = repository / "snapshots/0123abcd"
    for name, words in {"blobs/aa": "one", "blobs/bb": "two", "refs/main": "not this"}.items():
        place = repository / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(words)
    (snapshot / "part").mkdir(parents=True)
    (snapshot / "a.txt").symlink_to("../../blobs/aa")
    (snapshot / "part/b.txt").symlink_to("../../../blobs/bb")
    (snapshot / "c.txt").symlink_to("../../refs/main")
    out = Skipped("c.txt", "link out of the directory")
    whole = list(data.text(str(snapshot)))
    assert [getattr(one, "text", one) for one in whole] == [out, "one", "two"]
    assert [one.text for one in data.text(str(snapshot / "part"))] == ["two"]
    assert [one.text for one in data.text(f"{snapshot}/part/*.txt")] == ["two"]


def test_links_that_lead_out_and_what_is_no_file_are_counted(tmp_path):
    inside = tmp_path / "data"
    (inside / "below").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (inside / "a.txt").write_text("mine")
    (inside / "same.txt").symlink_to("a.txt")
    (inside / "out.txt").symlink_to("../secret.txt")
    (inside / "gone.txt").symlink_to("nowhere")
    (inside / "loop.txt").symlink_to("loop.txt")
    (inside / "down").symlink_to("below")
    os.mkfifo(inside / "pipe.txt")
    for read in data.text, partial(any_text, separator=""):
        found = list(read(str(inside)))
        assert {one.path: one.kind for one in found if isinstance(one, Skipped)} == {
            "down": "link to a directory", "gone.txt": "broken link", "loop.txt": "broken link",
            "out.txt": "link out of the directory", "pipe.txt": "no regular file"}
        assert [one for one in found if isinstance(one, Document)] == [
            Document("a.txt", "mine"), Document("same.txt", "mine")]
    assert len(list(jsonl(str(inside)))) == 7
    assert next(data.text(str(inside / "out.txt"))).text == "secret"  # who names it means it


# --------------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def table(tmp_path):
    """A Parquet file of three row groups whose pages have checksums."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = pyarrow.table({"text": [f"tree {i} " * 20 for i in range(30)]})
    pyarrow.parquet.write_table(texts, path, row_group_size=10, write_page_checksum=True,
                                compression="none", use_dictionary=False)
    return path


def test_pages_of_parquet_are_compared_with_their_checksums(table):
    """A letter changed in a text: without the checksum the text is read as it is now."""
    content = bytearray(table.read_bytes())
    content[content.index(b"tree 15 ")] ^= 1
    table.write_bytes(content)
    found = list(parquet(str(table)))
    assert kinds(found) == ["unreadable row group"] and len(found) == 21


class Unreachable(Exception):
    """What an HTTP client raises that is no OSError."""


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"), ConnectionResetError("reset"), Unreachable("timed out")])
def test_a_passing_error_loses_no_row_group(table, monkeypatch, error):
    import pyarrow.parquet
    whole, failed = list(parquet(str(table))), []
    read = pyarrow.parquet.ParquetFile.read_row_group

    def failing(file, group):
        if group == 1 and len(failed) < 2:
            failed.append(group)
            raise error
        return read(file, group)

    monkeypatch.setattr(sources, "PAUSE", 0)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", failing)
    assert list(parquet(str(table))) == whole and len(failed) == 2

    def broken(file, group):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", broken)
    with pytest.raises(InputError, match="a.parquet' cannot be read .Input/output error.; mend that"):
        list(parquet(str(table)))


# ------------------------------------------------------------------------------------------------ JSON


def test_a_long_number_under_another_key_is_no_malformed_line(tmp_path):
    long = '{"text": "tree", "n": %s}\n' % ("9" * 5_000)
    (tmp_path / "a.jsonl").write_text(long + '{"text": "ash", "n": 3}\n{"text": 1')
    found = list(jsonl(str(tmp_path / "a.jsonl"), meta=("n",)))
    assert [one.text for one in found[:2]] == ["tree", "ash"] and kinds(found) == ["malformed JSON"]
    assert found[0].meta["n"] == float("inf") and found[1].meta["n"] == 3
    assert readers.read_json('[1, -2, 1.5, "9"]') == [1, -2, 1.5, "9"]
