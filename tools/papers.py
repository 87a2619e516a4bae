"""The library's files: found by paper, and shown in the pages that are made from their records.

    python train.py papers WORDS ...    files whose paper has all these words: title, authors, year,
                                        a number such as 001:39, the method's name or its chapter
    python train.py papers              all of them
    python train.py papers --write      write configs/README.md, results/README.md, README.md's rows

Upper and lower case are the same. Each file is shown with its question and what came of its claims.
"""
import ast
import difflib
import json
import re
from pathlib import Path
from typing import NamedTuple

from lib.arguments import Arguments
from lib.config import ROOT, load_module
from lib.disk import write
from lib.errors import InputError
from lib.results import NOT_RECORDED, record_path
from lib.statistics import PLUS_MINUS
from lib.study import Study

CHAPTERS = ("growth", "forgetting", "context", "selection", "objectives", "continual",
            "parameters", "unlearning", "understanding", "baselines")
PAPER_FIELD = re.compile(r"^Papers?: *(.*(?:\n[ \t]+\S.*)*)", re.M)  # of a header, on any lines
ID = re.compile(r"\b\d{3}:\d+\b")
BEGIN, END = "<!-- results -->", "<!-- /results -->"
IN_README = 5  # rows of results there, at most
HEADLINES = "g_stack", "active_forgetting", "best_fit", "meco", "minitron", "skill_it"
GENERATED = "This page is written by `python train.py papers --write`, from the files and records."


# ----------------------------------------------------------------------------------- the library

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
        return counted([self])


def counted(entries: list[Entry]) -> str:
    """Each verdict of recorded studies and how often it came."""
    found = [claim["verdict"] for entry in entries for claim in entry.record["claims"]]
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


def read_record(root: Path, file: str | Path) -> dict | None:
    """The record of a study's file, None where there is none yet."""
    place = record_path(root, file)
    if not place.is_file():
        return None
    try:
        return json.loads(place.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{place} is no JSON ({error}); restore it, or record the study again"
                         ) from None


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


# ---------------------------------------------------------------------------------------- search

def matches(entry: Entry, word: str) -> bool:
    """Does a file belong to this word?"""
    if ID.fullmatch(word):
        return word in entry.ids
    said = [*entry.papers, entry.method, entry.chapter]
    return any(word.casefold() in text.casefold() for text in said)


def search(entries: list[Entry], words: list[str]) -> list[Entry]:
    """The files that match all words; raises InputError, with the nearest names, if none does."""
    found = [entry for entry in entries if all(matches(entry, word) for word in words)]
    if found or not words:
        return found
    names = {}
    for entry in entries:
        for text in (entry.method, *entry.papers):
            text = text.casefold()
            names |= dict.fromkeys([text, *text.split()], entry)
    near = []
    for word in [" ".join(words), *words]:
        near += difflib.get_close_matches(word.casefold(), names, 3, cutoff=0.7)
    files = dict.fromkeys(entry_name(names[name]) for name in near)
    hint = f"the nearest are: {'; '.join(files)}" if files else "without words, all are listed"
    raise InputError(f"no file of the library has all of: {' '.join(words)}; {hint}")


def entry_name(entry: Entry) -> str:
    """A file by its method and its papers."""
    return f"{entry.method} ({', '.join(entry.papers)})" if entry.papers else entry.method


def describe(entry: Entry) -> str:
    """A file in some lines of text."""
    lines = [" ".join([*entry.ids, entry.file])]
    lines += [f"    {paper}" for paper in entry.papers]
    lines += [f"    {entry.question}", f"    {entry.verdicts}"]
    if entry.record:
        for claim in entry.record["claims"]:
            lines.append(f"    {claim['verdict']}: {claim['says']} ({found(claim)}; "
                         f"claimed {bound(claim)})")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- cells

def found(claim: dict) -> str:
    """What came of what is claimed about; a difference has its sign."""
    if claim["mean"] is None:
        return "–"
    sign = "+" if claim["control"] else ""
    text = format(claim["mean"], f"{sign}.4f")
    return text if claim["half"] is None else f"{text} ± {claim['half']:.4f}"


def about(claim: dict) -> str:
    """What a claim is about: a measure of an arm, less a control's, or a conclusion."""
    if not claim["arm"]:
        return claim["measure"]
    less = f" less {claim['control']}" if claim["control"] else ""
    return f"{claim['measure']}: {claim['arm']}{less}"


def bound(claim: dict) -> str:
    """What was claimed of it."""
    return f"above {claim['above']:g}" if "above" in claim else f"below {claim['below']:g}"


def cost(record: dict | None) -> str:
    """What a recorded study took, tuning included."""
    if record is None:
        return "–"
    spent = record["cost"]
    devices = dict.fromkeys(by["device"] for by in record["made_by"])
    flops = spent["flops"] + spent["tuning_flops"]
    took = f"{spent['seconds'] / 60:.0f} min"
    if "processor_seconds" in spent:  # older records do not say
        took += f" ({spent['processor_seconds'] / 60:.0f} min of CPU time)"
    return f"{flops:.2g} FLOPs, {took}, {', '.join(map(str, devices))}"


def cell(text: str) -> str:
    """Text that keeps within its cell of a table."""
    return " ".join(str(text).replace("|", "\\|").split())


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [head, *rows]
    text = [f"| {' | '.join(map(cell, line))} |" for line in lines]
    return [text[0], "|" + "---|" * len(head), *text[1:], ""]


def link(entry: Entry, start: str) -> str:
    """A method as a link to its file, from a page in the directory `start`."""
    path = entry.file if start == "" else entry.file.removeprefix(f"{start}/")
    up = "" if start in ("", "configs") else "../"
    return f"[{entry.method}]({up}{path})"


def by_chapter(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Files by chapter."""
    chapters = {}
    for entry in entries:
        chapters.setdefault(entry.chapter, []).append(entry)
    return chapters


# ----------------------------------------------------------------------------------------- pages

def ledger(entries: list[Entry]) -> str:
    """results/README.md: a section for each recorded study, a row for each of its claims."""
    recorded = [entry for entry in entries if entry.record]
    studies = [entry for entry in entries if entry.study]
    lines = ["# Results", "", GENERATED, "",
             "Each row is a claim that was written before its study was run. A figure is an arm less "
             "its control over paired seeds, or an arm alone, or a conclusion from all arms, and "
             f"{PLUS_MINUS}. A claim is confirmed "
             "where the whole interval is on the side claimed, reversed where it is on the other, "
             "else undecided. The JSON files beside this page have each seed's figures.", "",
             f"{len(recorded)} of {len(studies)} studies are recorded: {counted(recorded)}.", ""]
    for chapter, own in by_chapter(recorded).items():
        lines += [f"## {chapter}", ""]
        for entry in own:
            lines += section(entry)
    missing = [entry.method for entry in studies if not entry.record]
    lines += [f"{NOT_RECORDED.capitalize()}: {', '.join(missing) or 'none'}.", ""]
    return "\n".join(lines)


def section(entry: Entry) -> list[str]:
    """The lines of a recorded study: its question, its command, its claims, its picture if any."""
    record = entry.record
    lines = [f"### {link(entry, 'results')}", "",
             f"{entry.question} {record['seeds']} seeds: `{record['command']}`", ""]
    rows = [[now.says, about(claim), found(claim), bound(claim), claim["verdict"]]
            for claim, now in zip(record["claims"], entry.study.claims, strict=True)]
    lines += table(["claim", "figure", "found", "claimed", "verdict"], rows)
    if entry.study.charts:
        lines += [f"![{entry.question}]({entry.chapter}/{entry.method}.png)", ""]
    return lines


def index(root: Path, entries: list[Entry]) -> str:
    """configs/README.md: a row for each file."""
    lines = ["# Configs", "", GENERATED, "",
             "A file here is one experiment. docs/extending.md shows where an idea of yours goes "
             "in. `python train.py papers WORDS` finds a file by its paper.", ""]
    tops = sorted((root / "configs").glob("*.py"))
    lines += table(["file", "what it is"],
                   [[f"[{place.name}]({place.name})", first_line(place)] for place in tops])
    head = ["method", "paper", "numbers", "question", "lines", "claims", "verdicts", "cost"]
    for chapter, own in by_chapter(entries).items():
        rows = []
        for entry in own:
            lines_of = len((root / entry.file).read_text("utf-8").splitlines())
            claims = len(entry.study.claims) if entry.study else 0
            papers, ids = "; ".join(entry.papers) or "–", " ".join(entry.ids) or "–"
            rows.append([link(entry, "configs"), papers, ids, entry.question, str(lines_of),
                         str(claims), entry.verdicts, cost(entry.record)])
        lines += [f"## {chapter}", "", *table(head, rows)]
    return "\n".join(lines)


def chosen(entries: list[Entry]) -> list[Entry]:
    """Recorded studies for the README: the first of each chapter, then the second, and so on.

    HEADLINES come before others of their chapter.
    """
    claimed = [entry for entry in entries if entry.record and entry.study.claims]
    recorded = list(by_chapter(claimed).values())
    for own in recorded:
        own.sort(key=lambda entry: entry.method not in HEADLINES)
    longest = max(map(len, recorded), default=0)
    turns = [own[i] for i in range(longest) for own in recorded if i < len(own)]
    return turns[:IN_README]


def readme_rows(entries: list[Entry]) -> str:
    """README.md's rows: the first claim of some recorded studies."""
    rows = []
    for entry in chosen(entries):
        claim, now = entry.record["claims"][0], entry.study.claims[0]
        rows.append([link(entry, ""), entry.question, now.says, found(claim), claim["verdict"]])
    if not rows:
        return "No study is recorded yet."
    head = ["method", "question", "first claim", "found", "verdict"]
    return "\n".join(table(head, rows)).strip()


def with_rows(readme: str, rows: str) -> str:
    """README.md with the text between its marks replaced; raises InputError if it lacks them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"README.md lacks the lines {BEGIN} and {END}, between which results go")
    return f"{before}{begin}\n{rows}\n{end}{after}"


def pages(root: Path) -> dict[Path, str]:
    """{place: text} of all that is generated."""
    entries = library(root)
    readme = root / "README.md"
    return {root / "results/README.md": ledger(entries),
            root / "configs/README.md": index(root, entries),
            readme: with_rows(readme.read_text("utf-8"), readme_rows(entries))}


def main(arguments: list[str]):
    """Command line."""
    parser = Arguments("papers", __doc__)
    parser.add_argument("words", nargs="*", help="all of which the file's paper is to have")
    parser.add_argument("--write", action="store_true", help="write the generated pages")
    a = parser.parse_args(arguments)
    if a.write:
        for place, text in pages(ROOT).items():
            write(place, text)
            print(f"{place} is written")
        return
    for entry in search(library(ROOT), a.words):
        print(describe(entry))
