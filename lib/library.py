"""The library: the files of configs/CHAPTER/, each with its papers, question and record."""
import ast
import re
from pathlib import Path
from typing import NamedTuple

from lib.config import load_module
from lib.errors import InputError
from lib.results import NOT_RECORDED, read_record
from lib.study import Study

CHAPTERS = ("growth", "forgetting", "context", "selection", "objectives", "continual",
            "parameters", "unlearning", "understanding", "baselines")
PAPER_FIELD = re.compile(r"^Papers?: *(.*(?:\n[ \t]+\S.*)*)", re.M)  # of a header, on any lines
ID = re.compile(r"\b\d{3}:\d+\b")


class Entry(NamedTuple):
    """A file of the library."""

    file: str  # configs/CHAPTER/METHOD.py
    title: str  # the first line of its header
    papers: tuple[str, ...]  # "Title (authors year)", or what the header says of its papers
    ids: tuple[str, ...]  # of its papers in the project's lists
    study: Study | None
    record: dict | None

    @property
    def chapter(self) -> str:
        """The directory it is in."""
        return Path(self.file).parts[1]

    @property
    def method(self) -> str:
        """Its name, as the field has it."""
        return Path(self.file).stem

    @property
    def question(self) -> str:
        """What it asks; its title where it is no study."""
        return self.study.question if self.study else self.title

    @property
    def verdicts(self) -> str:
        """What came of its claims: each verdict and how often."""
        if self.study is None:
            return "no study"
        if self.record is None:
            return NOT_RECORDED
        found = [claim["verdict"] for claim in self.record["claims"]]
        counts = [f"{found.count(verdict)} {verdict}" for verdict in dict.fromkeys(found)]
        return ", ".join(counts) or "no claims"


def header(place: Path) -> str:
    """The first docstring of a file, which is not run for it."""
    try:
        return ast.get_docstring(ast.parse(place.read_text("utf-8"))) or ""
    except SyntaxError as error:
        raise InputError(f"{place}, line {error.lineno}: {error.msg}") from None


def first_line(place: Path) -> str:
    """What a file says of itself in one line."""
    return (header(place).splitlines() or [""])[0]


def entry(root: Path, place: Path) -> Entry:
    """A file of the library, with its record if it has one."""
    file = place.relative_to(root).as_posix()
    title = first_line(place)
    study = getattr(load_module(str(place)), "study", None)
    if not isinstance(study, Study):
        fields = PAPER_FIELD.findall(header(place))
        said = tuple(" ".join(text.split()) for text in fields)
        ids = tuple(ID.findall(" ".join(said)))
        return Entry(file, title, said, ids, None, None)
    papers = tuple(f"{paper.title} ({paper.authors} {paper.year})" for paper in study.papers)
    ids = tuple(name for paper in study.papers for name in paper.seeds)
    record = read_record(root, place)
    check_record(file, study, record)
    return Entry(file, title, papers, ids, study, record)


def check_record(file: str, study: Study, record: dict | None):
    """Refuse a record of other claims than the file makes now; their words may have changed."""
    if record is None:
        return
    same = len(study.claims) == len(record["claims"])
    for claim, recorded in zip(study.claims, record["claims"], strict=False):
        now = dict(arm=claim.arm, control=study.control_of(claim), measure=claim.measure)
        now |= claim.bound
        same = same and now.items() <= recorded.items()
    if not same:
        raise InputError(f"the record of {file} is of other claims than the file makes now; record "
                         f"it again: {record['command']}")


def library(root: Path) -> list[Entry]:
    """The files of the library, chapter by chapter in the order of CHAPTERS, then by name."""
    places = sorted((root / "configs").glob("*/*.py"))
    known = [name for name in CHAPTERS if any(place.parent.name == name for place in places)]
    others = [place.parent.name for place in places if place.parent.name not in CHAPTERS]
    chapters = [*known, *dict.fromkeys(others)]
    places.sort(key=lambda place: chapters.index(place.parent.name))
    files = {place.relative_to(root / "configs").with_suffix(".json") for place in places}
    for record in sorted((root / "results").glob("*/*.json")):
        if record.relative_to(root / "results") not in files:
            raise InputError(f"{record} belongs to no file in configs/; rename it as the file was "
                             "renamed, or delete it")
    return [entry(root, place) for place in places]
