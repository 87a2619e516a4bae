"""lib/disk.py: files written whole, and locks."""
import pytest

from lib.disk import digest, locked, write
from lib.errors import InputError


def test_a_lock_that_must_not_wait_refuses_until_it_is_given_back(tmp_path):
    file = tmp_path / "run.lock"
    with locked(file):
        with pytest.raises(InputError, match="my run is being trained"):
            with locked(file, busy="my run"):
                raise AssertionError("both have the lock")
    with locked(file, busy="my run"):
        pass


def test_a_file_is_written_whole_in_place_of_another(tmp_path):
    file = tmp_path / "below" / "a"
    for content, held in (("木", "木".encode()), (b"\xff", b"\xff")):
        write(file, content)
        assert file.read_bytes() == held
    names = [path.name for path in file.parent.iterdir()]
    assert names == ["a"]


def test_a_digest_does_not_follow_the_order_of_keys():
    one = digest(dict(a=1, b=[2]))
    assert one == digest(dict(b=[2], a=1))
    assert one != digest(dict(a=1, b=[3]))
