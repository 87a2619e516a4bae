"""No line of the core catches every exception without saying whose they are, and why."""
import ast
import re

import pytest
from test_house import CORE, TOOLS, label, parsed, read

BROAD = {"Exception", "BaseException"}
OF = re.compile(r"# of \w+")  # a comment that says of which library or function


def lines_that_catch_all(tree: ast.Module) -> list[int]:
    """Lines with `except:`, `except Exception`, or `user_errors(Exception, ...)`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.walk(node.type) if node.type else [ast.Name("Exception", lineno=node.lineno)]
            found += [node.lineno for each in caught if isinstance(each, ast.Name) and each.id in BROAD]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "user_errors":
            given = [*node.args, *(word.value for word in node.keywords)]
            names = [each for value in given for each in ast.walk(value) if isinstance(each, ast.Name)]
            found += [each.lineno for each in names if each.id in BROAD]
    return found


@pytest.mark.parametrize("path", [*CORE, *TOOLS], ids=label)
def test_who_catches_everything_says_whose_it_is(path):
    lines = read(path).splitlines()
    silent = [number for number in lines_that_catch_all(parsed(path)) if not OF.search(lines[number - 1])]
    assert not silent, f"lines {silent} catch every exception and do not say of which library, and why"


def test_it_would_be_found():
    text = ("try:\n    f()\nexcept Exception:\n    pass\nexcept (OSError, BaseException):\n    pass\n"
            "try:\n    f()\nexcept:\n    pass\nwith user_errors(Exception, A):\n    pass\n"
            "with user_errors(errors=(A, Exception)):\n    pass\nwith user_errors(OSError):\n    pass\n")
    assert sorted(lines_that_catch_all(ast.parse(text))) == [3, 5, 9, 11, 13]
