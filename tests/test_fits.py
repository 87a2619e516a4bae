"""`fits`: the table of docs/speed.md, from what `fit` of two checkouts says."""
import json

import pytest

import train
from lib.config import ROOT, load_file
from lib.errors import InputError

fits = load_file(ROOT / "tools/fits.py")


def said(held: float, **sent: float) -> str:
    """The output of a `fit`, in GiB."""
    gib = 2**30
    collectives = {kind.replace("_", "-"): [1, size * gib] for kind, size in sent.items()}
    program = {"bytes": {"total": held * gib}, "collectives": collectives}
    return "words\n" + json.dumps({"programs": [program]})


@pytest.fixture
def kept(tmp_path):
    """What `fit` said before and after, of each ready config."""
    for name in fits.READY:
        (tmp_path / f"before-{name}.log").write_text(said(4, all_reduce=15))
        (tmp_path / f"after-{name}.log").write_text(said(3, all_reduce=0.5, reduce_scatter=0.25))
    return tmp_path


def test_the_table_shows_what_is_held_and_sent_before_and_after(kept, monkeypatch, capsys):
    """It replaces what stands between its marks, and nothing else."""
    words = ["--before", str(ROOT), "--keep", str(kept)]
    assert fits.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(fits.READY)
    assert lines[2].endswith("| before | 4.00 | 15.00 | 15.00 | 0.00 | 0.00 |")
    assert lines[3].endswith("| after | 3.00 | 0.75 | 0.50 | 0.25 | 0.00 |")
    page = kept / "page.md"
    page.write_text("one\n<!-- fits -->\nold\n<!-- /fits -->\ntwo\n")
    monkeypatch.setattr(fits, "PAGE", page)
    assert fits.main([*words, "--write"]) == 0
    assert page.read_text() == "\n".join(["one", "<!-- fits -->", *lines, "<!-- /fits -->", "two", ""])


def test_a_checkout_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"--before is {tmp_path}; allowed is a checkout"):
        train.verb("fits", ["--before", str(tmp_path)])
