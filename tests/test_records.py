"""tools/papers.py and records: what a study leaves in results/, and the pages made from that."""
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from study_cases import (
    OWN,
    Trainer,
    call,
    change,
    make_up_runs,
    papers,
    read_json,
    study,
    write_file,
)

from lib.config import ROOT, load_file
from lib.disk import write
from lib.errors import InputError

NO_STUDY = '''"""Addresses before the text.

Paper: Metadata Conditioning, Gao et al.
    2025 (002:7)
Method: none
"""
'''
README = "# A door\n\n<!-- results -->\nold rows\n<!-- /results -->\n\nthe end\n"


class House:
    """A house of two chapters: in one a study, in the other a file with a Paper and no study."""

    def __init__(self, root: Path):
        self.root = root
        self.study = root / "configs/growth/tiny.py"
        self.record = root / "results/growth/tiny.json"

    def build(self, corpus: Path):
        """Write its files."""
        write_file(self.study, corpus)
        write(self.root / "configs/context/meco.py", NO_STUDY)
        write(self.root / "configs/quickstart.py", '"""A first run."""\n')
        write(self.root / "README.md", README)

    def move_in(self, patch: pytest.MonkeyPatch):
        """Have the tools take this house for their own."""
        patch.setattr(study, "ROOT", self.root)
        patch.setattr(papers, "ROOT", self.root)

    def make_record(self, *arguments: str) -> dict:
        """Run and record the study by the tool's own `main`; gives the record."""
        runs = self.root / "runs"
        study.main([str(self.study), "--runs", str(runs), "--record", *arguments])
        return read_json(self.record)

    def page(self, name: str) -> str:
        """What a page is to say."""
        return papers.pages(self.root)[self.root / name]


@pytest.fixture
def house(tmp_path, corpus, monkeypatch) -> House:
    """One without a record, in which the tools are."""
    house = House(tmp_path / "house")
    house.build(corpus)
    house.move_in(monkeypatch)
    return house


@pytest.fixture(scope="module")
def recorded_once(tmp_path_factory, corpus) -> House:
    """One with a record of two seeds, to be copied."""
    house = House(tmp_path_factory.mktemp("recorded") / "house")
    house.build(corpus)
    with pytest.MonkeyPatch.context() as patch:
        house.move_in(patch)
        make_up_runs(patch)
        house.make_record("--seeds", "2")
    return house


@pytest.fixture
def recorded(recorded_once, tmp_path, monkeypatch) -> House:
    """One with a record of two seeds, in which the tools are."""
    house = House(tmp_path / "recorded")
    shutil.copytree(recorded_once.root, house.root)
    house.move_in(monkeypatch)
    return house


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    """Runs are made up, and noted."""
    return make_up_runs(monkeypatch)


# ---------------------------------------------------------------------------------------- records


class Recorded(NamedTuple):
    """A study that was recorded."""

    record: dict
    out: str  # what was printed


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus) -> Recorded:
    """That of three seeds, of which a run of deep failed."""
    house = House(tmp_path_factory.mktemp("made") / "house")
    house.build(corpus)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        house.move_in(patch)
        make_up_runs(patch).fail = {"deep-0.02-s3": 1}
        record = house.make_record("--seeds", "3", "--json")
    return Recorded(record, out.getvalue())


@pytest.fixture
def record(made) -> dict:
    """The record of that study."""
    return made.record


def test_a_record_is_printed_too(made):
    *_, last = made.out.splitlines()
    assert json.loads(last) == made.record


def test_a_record_says_what_was_asked_and_by_which_command(record):
    assert record["file"] == "configs/growth/tiny.py"
    assert record["question"] == "Is it better to grow?"
    assert record["command"] == "python train.py study configs/growth/tiny.py --seeds 3 --record"
    assert record["seeds"] == 3
    assert record["quick"] is False
    assert "deep-0.02-s3" in record["failed"]
    (paper,) = record["papers"]
    assert paper == {
        "title": "On Tiny Things",
        "authors": "Small et al.",
        "year": 2024,
        "seeds": ["001:39"],
    }


def test_a_record_has_each_arm_s_rate_and_bits_per_byte(record):
    deep, grown = record["arms"]["deep"], record["arms"]["grown"]
    assert grown["peak_lr"] == 0.08
    assert grown["bracketed"] is True
    assert len(grown["tuning"]) == 5
    assert deep["bpb"]["by_seed"] == pytest.approx({"1": 2.1, "2": 2.2})
    assert grown["bpb"]["mean"] == pytest.approx(2.0)
    assert grown["bpb"]["half"] == pytest.approx(0.248, abs=1e-3)


def test_a_record_has_each_arm_less_the_control_over_the_seeds_that_both_have(record):
    less = record["arms"]["grown"]["less_control"]
    assert [*less] == ["bpb", "speed_up_flops", "speed_up_tokens"]
    assert less["bpb"]["mean"] == pytest.approx(-0.2)
    assert [*less["bpb"]["by_seed"]] == ["1", "2"]
    assert "less_control" not in record["arms"]["deep"]


def test_a_record_has_all_claims_also_those_about_arms_that_did_not_run(record):
    helps, learns, third = record["claims"]
    assert helps["verdict"] == "confirmed"
    assert helps["below"] == 10
    assert learns["verdict"] == "reversed"
    assert learns["above"] == 10
    assert third["verdict"] == "not run"
    assert third["mean"] is None


def test_a_record_says_what_it_cost_and_what_made_it(record):
    """Three of the five compared runs are of grown, with a teacher's FLOPs."""
    cost = record["cost"]
    assert cost["tokens"] == 5 * 400
    assert cost["tuning_tokens"] == 8 * 400
    assert cost["flops"] == 5 * 4e6 + 3e6
    assert cost["seconds"] > 0
    assert cost["processor_seconds"] == 0  # no process was made
    assert set(record["made_by"][0]) == {"commit", "versions", "device", "devices"}


def test_a_record_has_no_curves(record):
    written = json.dumps(record)
    assert "curve" not in written
    assert "tracker" not in written


def test_a_record_names_the_arms_that_were_asked_for_in_the_study_s_order(house, trainer):
    found = house.make_record("--arms", "third,grown,deep")
    file = "configs/growth/tiny.py"
    assert found["command"] == f"python train.py study {file} --arms deep,third,grown --record"


def test_a_record_has_the_study_s_own_measures(house, trainer):
    """grown's best rate is the worst by `OWN`, five doublings from where its loss is least."""
    house.study.write_text(house.study.read_text() + OWN)
    found = house.make_record()
    own = found["arms"]["grown"]["measures"]["own"]
    assert own["mean"] == pytest.approx(-(0.8 + 5**2 + 0.3))
    assert [*own["by_seed"]] == list("12345")
    assert own["less_control"]["half"] < 1e-9
    assert "less_control" not in found["arms"]["deep"]["measures"]["own"]


UNRECORDED = [
    ("--quick", "--record is given with --quick, which gives no verdict"),
    (
        "--seeds 1",
        "--record is given with one seed, which has no interval; allowed is --seeds 2",
    ),
    (
        "--arms third",
        "--arms leaves out grown; allowed are the arms that run without --arms .deep, ",
    ),
]


@pytest.mark.parametrize("words, sentence", UNRECORDED)
def test_what_may_not_be_recorded_is_one_sentence(house, trainer, words, sentence):
    with pytest.raises(InputError, match=sentence):
        house.make_record(*words.split())
    assert not trainer.made
    assert not (house.root / "results").exists()


def test_a_file_outside_the_chapters_is_not_recorded(tmp_path, corpus, house, trainer):
    outside = write_file(tmp_path / "tiny.py", corpus)
    sentence = "tiny.py cannot be recorded; allowed is a file configs/CHA"
    with pytest.raises(InputError, match=sentence):
        call(outside, "--record")
    above = write_file(house.root / "configs/tiny.py", corpus)
    with pytest.raises(InputError, match="tiny.py cannot be recorded"):
        call(above, "--record")
    assert not trainer.made


# ----------------------------------------------------------------------------------- pages of them


def test_the_index_shows_a_study_that_is_not_recorded_yet(house):
    lines = len(house.study.read_text("utf-8").splitlines())
    claims = len(load_file(house.study).study.claims)
    row = (
        "| [tiny](growth/tiny.py) | On Tiny Things (Small et al. 2024) | 001:39 "
        f"| Is it better to grow? | {lines} | {claims} | not recorded yet | – |"
    )
    assert row in house.page("configs/README.md")
    assert "Not recorded yet: tiny." in house.page("results/README.md")
    assert house.page("README.md").splitlines()[3] == "No study is recorded yet."


def test_the_index_shows_a_record_s_verdicts_and_cost(recorded):
    compared = 4 * 4e6
    tuning = 8 * 4e6
    teacher = 7e6  # of each run of grown
    row = f"| 1 confirmed, 1 reversed, 1 not run | {compared + tuning + teacher:.2g} FLOPs, "
    assert f"{row}0 min (0 min of CPU time), None |" in recorded.page("configs/README.md")


def test_the_index_has_the_chapters_in_order_and_files_that_are_no_studies(house):
    index = house.page("configs/README.md")
    assert "| [quickstart.py](quickstart.py) | A first run. |" in index
    assert index.index("## growth") < index.index("## context")
    paper = "Metadata Conditioning, Gao et al. 2025 (002:7)"
    assert f"| [meco](context/meco.py) | {paper} | 002:7 " in index


def test_the_ledger_shows_each_claim(recorded):
    half = read_json(recorded.record)["claims"][0]["half"]
    ledger = recorded.page("results/README.md")
    assert "## growth" in ledger
    assert "± is half a 95 % interval" in ledger
    assert "Not recorded yet: none." in ledger
    assert "1 of 1 studies are recorded: 1 confirmed, 1 reversed, 1 not run." in ledger
    command = "python train.py study configs/growth/tiny.py --seeds 2 --record"
    assert (
        "### [tiny](../configs/growth/tiny.py)\n\n"
        f"Is it better to grow? 2 seeds: `{command}`"
    ) in ledger
    row = f"| it helps | bpb: grown less deep | -0.2000 ± {half:.4f} | below 10 | confirmed |"
    assert row in ledger
    assert "| – | below 0 | not run |" in ledger


def test_the_readme_shows_a_result_between_its_marks(recorded):
    door = recorded.page("README.md")
    row = "| [tiny](configs/growth/tiny.py) | Is it better to grow? | it helps | -0.2000 ± "
    assert row in door
    assert door.startswith("# A door\n")
    assert door.endswith("<!-- /results -->\n\nthe end\n")
    assert "old rows" not in door


def test_the_readme_shows_five_studies_one_of_each_chapter_first(recorded):
    record = recorded.record.read_text()
    source = recorded.study.read_text()
    for name in ("growth/a", "growth/b", "forgetting/c", "baselines/d", "own/e"):
        write(recorded.root / f"results/{name}.json", record)
        write(recorded.root / f"configs/{name}.py", source)
    entries = papers.library(recorded.root)
    assert [entry.method for entry in entries] == ["a", "b", "tiny", "c", "meco", "d", "e"]
    chosen = papers.chosen(entries)
    assert [entry.method for entry in chosen] == ["a", "c", "d", "e", "b"]


def test_pages_are_written_as_they_are_to_be(recorded, capsys):
    papers.main(["--write"])
    assert "README.md is written" in capsys.readouterr().out
    pages = papers.pages(recorded.root)
    assert len(pages) == 3
    assert {place: place.read_text() for place in pages} == pages


def test_every_page_is_stale_where_a_record_has_changed(recorded):
    papers.main(["--write"])
    change(recorded.record, '"confirmed"', '"undecided"')
    pages = papers.pages(recorded.root)
    assert len(pages) == 3
    for place, text in pages.items():
        assert place.read_text() != text, place


def test_the_pages_of_this_house_are_as_its_files_and_records_say():
    pages = papers.pages(ROOT)
    assert len(pages) == 3
    for place, text in pages.items():
        assert place.is_file(), place
        assert place.read_text("utf-8") == text, f"{place}: python train.py papers --write"


# ------------------------------------------------------------------------------------------ misfits


def check_refused(house: House, sentence: str):
    """The pages cannot be made."""
    with pytest.raises(InputError, match=sentence):
        papers.pages(house.root)


def test_a_record_of_other_claims_is_refused(recorded):
    change(recorded.record, '"below": 10.0', '"below": 9.0')
    sentence = (
        "the record of configs/growth/tiny.py is of other claims .* "
        "record it again: python train.py"
    )
    check_refused(recorded, sentence)


def test_the_words_of_a_claim_are_those_of_the_file(recorded):
    """A record of other words is none of another claim."""
    change(recorded.record, '"it helps"', '"it does help"')
    assert "| it helps |" in recorded.page("results/README.md")


def test_a_record_that_is_no_json_is_refused(house):
    write(house.record, "{")
    check_refused(house, "tiny.json is no JSON")


def test_a_record_of_no_file_is_refused(recorded):
    recorded.study.rename(recorded.study.with_name("small.py"))
    check_refused(recorded, "tiny.json belongs to no file in configs/")


def test_a_file_that_is_no_python_is_refused(house):
    write(house.study.with_name("small.py"), '"""Broken.""" +')
    check_refused(house, "small.py, line 1: invalid syntax")


def test_a_readme_without_marks_is_refused(house):
    write(house.root / "README.md", "nothing")
    check_refused(house, "README.md lacks the lines <!-- results --> and <!-- /results -->")


# ------------------------------------------------------------------------------------ the search


SHOWN = """001:39 configs/growth/tiny.py
    On Tiny Things (Small et al. 2024)
    Is it better to grow?
    not recorded yet
"""
WORDS = ["tiny", "THINGS small", "2024", "001:39", "growth", "on tiny things"]


@pytest.mark.parametrize("words", WORDS)
def test_papers_finds_a_file_by_all_words(house, capsys, words):
    papers.main(words.split())
    assert capsys.readouterr().out == SHOWN


def test_papers_without_words_lists_all_files(house, capsys):
    papers.main([])
    out = capsys.readouterr().out
    assert out.startswith(SHOWN)
    assert "002:7 configs/context/meco.py" in out


def test_papers_finds_a_file_that_is_no_study(house, capsys):
    papers.main(["metadata", "GAO"])
    assert "002:7 configs/context/meco.py\n" in capsys.readouterr().out


def test_papers_shows_what_came_of_a_claim(recorded, capsys):
    papers.main(["001:39"])
    assert "    confirmed: it helps (-0.2000 ± " in capsys.readouterr().out


NOT_FOUND = [
    (
        "tinny",
        "no file of the library has all of: tinny; the nearest are: tiny .On Tiny Things",
    ),
    (
        "small metadata",
        "no file of the library has all of: small metadata; the nearest are: ",
    ),
    ("001:3", "no file of the library has all of: 001:3; "),
    ("zzz", "without words, all are listed"),
]


@pytest.mark.parametrize("words, sentence", NOT_FOUND)
def test_papers_that_finds_nothing_says_what_is_near(house, words, sentence):
    with pytest.raises(InputError, match=sentence):
        papers.main(words.split())
