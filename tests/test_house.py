"""The house: arrows go down, one thought a line, a reading path, a cap on the whole.

    python tests/test_house.py      bring the line numbers of the README's reading path up to date
"""
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READ = [ROOT / name for name in ("train.py", "model.py", "data.py")]  # the files that one reads
CORE = READ + sorted((ROOT / "lib").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
FILES = [*CORE, *TOOLS, *CONFIGS]

# Lines of the core. The design asks for 6,000, and the core is beyond that: this number says by how
# much. Whoever raises it says in the commit what for.
LINES = 18_430
PATH = 700  # lines of the reading path
COLUMNS = 100
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

# Configs that others start from, and processes whose rows several studies share.
SHARED = {
    "configs.base",
    "configs.bursty",
    "configs.parts_of_speech",
    "configs.points",
    "configs.quickstart",
}


def name_of(path: Path) -> str:
    """A file's dotted name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def label(path: Path) -> str:
    """A file's name for the list of tests."""
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    """A file's text."""
    return path.read_text("utf-8")


def parsed(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(read(path))


def names_imported(path: Path) -> set[str]:
    """What a file imports, wherever in it the statement stands: modules, and names in them."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


KNOWN = {name_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """The other files of the house that a file imports."""
    return names_imported(path) & KNOWN - {name_of(path)}


GRAPH = {name_of(path): imports(path) for path in FILES}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, FUNCTIONS):
            yield node


def folder(name: str) -> str:
    """What a dotted name begins with."""
    return name.split(".")[0]


# ------------------------------------------------------------------------------------------- arrows


def without_circles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of a graph when files that import nothing are taken away, again and again."""
    left = dict(graph)
    while True:
        free = {name for name, below in left.items() if not below}
        if not free:
            return left
        kept = [name for name in left if name not in free]
        left = {name: left[name] - free for name in kept}


def test_no_circle_of_imports():
    """Every file can be read after those that it imports."""
    left = without_circles(GRAPH)
    assert not left, f"these import one another in a circle: {', '.join(sorted(left))}"


def test_a_circle_would_be_found():
    graph = {"a": {"b"}, "b": {"a"}, "c": {"a", "d"}, "d": set()}
    assert set(without_circles(graph)) == {"a", "b", "c"}


@pytest.mark.parametrize("path", CORE, ids=label)
def test_nothing_below_imports_what_stands_above(path):
    """train.py and the library know no command and no config; the library knows no train.py."""
    below = GRAPH[name_of(path)]
    above = [name for name in below if folder(name) in ("train", "tools", "configs")]
    assert not above


def test_commands_are_imported_by_nobody():
    for name, below in GRAPH.items():
        commands = [other for other in below if folder(other) == "tools"]
        assert not commands, name


def reach(name: str) -> set[str]:
    """The files that a file imports, directly or through others."""
    found = set()
    todo = [name]
    while todo:
        new = GRAPH[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_model_and_data_know_nothing_of_each_other():
    """Neither directly nor through the library."""
    assert {"data", "model"} <= reach("train")
    assert "data" not in reach("model")
    assert "model" not in reach("data")


@pytest.mark.parametrize("path", CONFIGS, ids=label)
def test_configs_import_the_library_and_each_other_s_papers_alone(path):
    """A config may take a function of another paper's file, never from a file of no chapter."""
    in_no_chapter = [name for name in GRAPH[name_of(path)]
                     if folder(name) == "configs" and name.count(".") < 2]
    assert set(in_no_chapter) <= SHARED


LOADS = re.compile(
    r"import_module|spec_from_file|exec_module|__import__|runpy|\bexec\(|(?<!def )load_file\("
)


def lines_that_load(path: Path) -> list[int]:
    """Lines of a file that load another one by its name."""
    lines = read(path).splitlines()
    return [number for number, line in enumerate(lines, 1) if LOADS.search(line)]


LOADERS = (ROOT / "lib" / "config.py", ROOT / "train.py")


def test_config_files_are_loaded_by_lib_config():
    """The search would find it elsewhere too."""
    assert lines_that_load(ROOT / "lib" / "config.py")


def test_verbs_are_loaded_by_the_last_lines_of_train():
    path = ROOT / "train.py"
    end = read(path).count("\n") - 60
    assert all(line > end for line in lines_that_load(path))


@pytest.mark.parametrize("path", [path for path in FILES if path not in LOADERS], ids=label)
def test_no_other_file_loads_one_by_its_name(path):
    assert not lines_that_load(path)


def is_self(node: ast.expr) -> bool:
    """Whether an expression is a method's own object."""
    return isinstance(node, ast.Name) and node.id == "self"


def targets(tree: ast.AST) -> Iterator[ast.Attribute]:
    """What a file writes with `=` and the like that has the form OBJECT.NAME."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node


def owned(path: Path) -> set[str]:
    """What objects of a file's classes have: their fields, and what methods write into `self`."""
    found = {node.attr for node in targets(parsed(path)) if is_self(node.value)}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            fields = [inner for inner in node.body if isinstance(inner, ast.AnnAssign)]
            found |= {field.target.id for field in fields}
    return found


def written_elsewhere(tree: ast.AST, own: set[str], of_others: set[str]) -> list[str]:
    """What a file writes into an object that is of another file's class, by the names.

    `a` is what a verb's own parser made of the command line.
    """
    made_here = {"a"} | {node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}
    found = []
    for node in targets(tree):
        mine = is_self(node.value) or node.attr in own or ast.unparse(node.value) in made_here
        if node.attr in of_others and not mine:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


OWNED = {path: owned(path) for path in [*CORE, *TOOLS]}


@pytest.mark.parametrize("path", [*CORE, *TOOLS], ids=label)
def test_nothing_writes_into_an_object_that_another_file_owns(path):
    others = set().union(*(names for other, names in OWNED.items() if other != path))
    assert not written_elsewhere(parsed(path), OWNED[path], others)


def test_a_write_into_another_file_s_object_would_be_found():
    text = "def f(log): pass\nlog.late = 1\nrun.mine, log.other = 2, 3\nf.late = self.late = 4\n"
    found = written_elsewhere(ast.parse(text), {"mine"}, {"late", "mine"})
    assert found == ["2: log.late"]


# -------------------------------------------------------------------------------------------- lines

# What is no token of a thought.
SILENT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}
# None where Python does not take a formatted string apart.
STRING_BEGINS = getattr(tokenize, "FSTRING_START", None)
STRING_ENDS = getattr(tokenize, "FSTRING_END", None)


def whole_strings(tokens: Iterator[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """Tokens as Python 3.11 has them: newer ones take a formatted string apart."""
    depth = 0
    for token in tokens:
        if depth == 0:
            yield token
        if token.type == STRING_BEGINS:
            depth += 1
        elif token.type == STRING_ENDS:
            depth -= 1


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines that docstrings stand on."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and ast.get_docstring(node):
            docstring = node.body[0]
            found |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return found


def tokens_a_line(text: str) -> float:
    """Python tokens on a line of code; docstrings, comments and blank lines do not count."""
    docstrings = docstring_lines(ast.parse(text))
    lines = []
    for token in whole_strings(tokenize.generate_tokens(io.StringIO(text).readline)):
        line = token.start[0]
        if token.type not in SILENT and line not in docstrings:
            lines.append(line)
    return len(lines) / max(1, len(set(lines)))


def test_a_formatted_string_is_one_token_and_docstrings_are_none():
    text = '"""A file."""\n\nname = f"{1} and {2}"  # three\nplain = 1 + 2\n'
    assert tokens_a_line(text) == (3 + 5) / 2


@pytest.mark.parametrize("path", CORE, ids=label)
def test_one_thought_a_line(path):
    """At most ten tokens a line on average, 100 columns, one conditional expression a line."""
    assert tokens_a_line(read(path)) <= 10
    lines = read(path).splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]
    assert not wide, f"lines of more than {COLUMNS} columns: {wide}"
    nodes = ast.walk(parsed(path))
    conditions = [node.lineno for node in nodes if isinstance(node, ast.IfExp)]
    twice = {line for line in conditions if conditions.count(line) > 1}
    assert not twice, f"more than one conditional expression on lines {sorted(twice)}"


def inner_assignments(tree: ast.Module) -> list[int]:
    """Lines where `:=` is neither a whole condition nor one side of a comparison that is one."""
    fine = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While):
            fine.add(node.test)
            if isinstance(node.test, ast.Compare):
                fine |= {node.test.left, *node.test.comparators}
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.NamedExpr)]
    return [node.lineno for node in assignments if node not in fine]


@pytest.mark.parametrize("path", CORE, ids=label)
def test_no_assignment_inside_a_larger_expression(path):
    """`:=` is the whole condition of an if or a while, or one side of a comparison in it."""
    assert not inner_assignments(parsed(path))


def test_an_assignment_inside_a_larger_expression_would_be_found():
    fine = "while x := next(it):\n    pass\nif (y := f()) > 1:\n    pass\n"
    assert inner_assignments(ast.parse(fine + "g(z := 1)\n")) == [5]


def is_text(node: ast.expr) -> bool:
    """Whether an expression is text that is written out."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def multiplied_by_conditions(tree: ast.Module) -> list[int]:
    """Lines where a list, dictionary or text is multiplied by a comparison."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
            continue
        sides = node.left, node.right
        made = ast.List | ast.Tuple | ast.Dict | ast.JoinedStr
        some_made = any(isinstance(side, made) or is_text(side) for side in sides)
        some_asked = any(isinstance(side, ast.Compare | ast.BoolOp) for side in sides)
        if some_made and some_asked:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", CORE, ids=label)
def test_nothing_is_multiplied_by_a_condition(path):
    """A list, dictionary or text times a comparison is an if in disguise."""
    assert not multiplied_by_conditions(parsed(path))


def test_a_multiplication_by_a_condition_would_be_found():
    text = '[1] * (a > b)\n"s" * (a and b)\n[1] * 2\na * (b > 1)\n'
    assert multiplied_by_conditions(ast.parse(text)) == [1, 2]


# ---------------------------------------------------------------------------------------- functions

WAYS = (
    ast.If
    | ast.For
    | ast.While
    | ast.IfExp
    | ast.ExceptHandler
    | ast.match_case
    | ast.comprehension
)


def branches(function: ast.FunctionDef) -> int:
    """Where a function may go one way or another; those of functions inside it are theirs."""
    count = 0
    todo = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, FUNCTIONS):
            continue
        if isinstance(node, WAYS):
            count += 1
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        todo += ast.iter_child_nodes(node)
    return count


def lines_of(node: ast.FunctionDef | ast.ClassDef) -> int:
    """How many lines a function or a class has."""
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", CORE, ids=label)
def test_a_function_fits_a_screen(path):
    """At most 40 lines and 10 branches."""
    long = {f.name: lines_of(f) for f in functions(path) if lines_of(f) > 40}
    assert not long, f"lines: {long}"
    wild = {f.name: branches(f) for f in functions(path) if branches(f) > 10}
    assert not wild, f"branches: {wild}"


@pytest.mark.parametrize("path", CORE, ids=label)
def test_what_is_public_says_what_it_is(path):
    """Every file, class and function of its top level has a docstring."""
    tree = parsed(path)
    assert ast.get_docstring(tree)
    defined_here = [node for node in tree.body if isinstance(node, ast.ClassDef | FUNCTIONS)]
    public = [node for node in defined_here if not node.name.startswith("_")]
    silent = [node.name for node in public if not ast.get_docstring(node)]
    assert not silent


def test_the_cap_on_the_whole():
    """Moving is free, growing is not."""
    lines = {label(path): read(path).count("\n") for path in CORE}
    assert sum(lines.values()) <= LINES, lines


# ------------------------------------------------------------------------------------- reading path

README = ROOT / "README.md"
STOP = re.compile(r"(?m)^\d+\. `(\w+\.py):(\d+)` `?(\w+(?:\.\w+)?)")


def stops() -> list[tuple[Path, int, str]]:
    """(file, line, name) of each stop that the README lists, as `file.py:LINE` and a name."""
    found = STOP.findall(read(README))
    return [(ROOT / file, int(line), name) for file, line, name in found]


def defined(path: Path) -> dict[str, ast.AST]:
    """What a file defines, by name; methods also as `Class.method`."""
    found = {}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef | FUNCTIONS):
            found.setdefault(node.name, node)
        if isinstance(node, ast.ClassDef):
            methods = [inner for inner in node.body if isinstance(inner, FUNCTIONS)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def test_each_stop_of_the_reading_path_stands_where_the_readme_says():
    """In the three files that one reads."""
    path = stops()
    assert len(path) >= 8, "the README lists the stops of the reading path"
    for file, line, name in path:
        assert file in READ
        node = defined(file).get(name)
        assert node is not None, f"{file.name} defines no {name}"
        assert node.lineno == line, f"README.md: {name} is at {file.name}:{node.lineno}, not {line}"


def test_the_reading_path_is_short_and_leads_past_the_core():
    lines = {name: lines_of(defined(file)[name]) for file, _, name in stops()}
    core = {"Config", "Phase", "table", "block", "forward", "make_step", "train"}
    assert core <= set(lines)
    assert len(lines) == len(stops())
    assert sum(lines.values()) <= PATH, f"the reading path has {lines} lines"


def calls(function: ast.AST) -> set[str]:
    """Names of the functions that a function calls."""
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {function.id for function in called if isinstance(function, ast.Name)}


def test_one_jump_to_the_loop_and_one_to_the_step():
    """main calls train, which is the loop, which calls train_step."""
    found = defined(ROOT / "train.py")
    assert "train" in calls(found["main"])
    loops = [node for node in ast.walk(found["train"]) if isinstance(node, ast.For)]
    steps = [loop for loop in loops if "train_step" in calls(loop)]
    assert len(steps) == 1


def renumber():
    """Write the lines at which the stops stand now into the README."""
    text = read(README)
    for file, line, name in stops():
        now = defined(file)[name].lineno
        text = text.replace(f"`{file.name}:{line}` {name}", f"`{file.name}:{now}` {name}")
    README.write_text(text, "utf-8")


if __name__ == "__main__":
    renumber()
