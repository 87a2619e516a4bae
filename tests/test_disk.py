"""lib/disk.py: files written whole, and locks."""
import pytest

from lib.disk import digest, locked, write
from lib.errors import InputError


def test_lock_that_must_not_wait_refuses(tmp_path):
    with locked(tmp_path / "run.lock"), pytest.raises(InputError, match="my run is being trained"):
        with locked(tmp_path / "run.lock", busy="my run"):
            raise AssertionError("both have the lock")
    with locked(tmp_path / "run.lock", busy="my run"):  # given back
        pass


def test_a_file_is_written_whole_in_place_of_another(tmp_path):
    for content, held in (("木", "木".encode()), (b"\xff", b"\xff")):
        write(tmp_path / "below" / "a", content)
        assert (tmp_path / "below" / "a").read_bytes() == held
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["a"]


def test_a_digest_does_not_follow_the_order_of_keys():
    assert digest(dict(a=1, b=[2])) == digest(dict(b=[2], a=1)) != digest(dict(a=1, b=[3]))
