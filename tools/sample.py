"""Text from a run's checkpoint: continuations of prompts, all of them as one batch.

    python train.py sample RUN --prompt "def main(" --temperature 0.7 --top-p 0.9 --n 3
    python train.py sample RUN --prompts FILE --stop $'\\n\\n' --json   lines, or JSON Lines

Rows are counted over prompts and --n, from 0. Row i draws by the seed --seed + i and the number of
each token, so alone, with that seed, it gives the same text. On a terminal the first continuation
appears as it is made, and the others follow. For a model that does not fit one device there are
--mesh.data, --mesh.fsdp and --mesh.tensor; those that are not given are the run's own.
"""
import json
import math
import sys
from pathlib import Path

import jax

from lib.arguments import Arguments
from lib.checkpoint import find_checkpoint
from lib.continuations import as_text, continue_prompts
from lib.disk import user_path
from lib.errors import InputError, user_errors
from lib.fields import SURROGATE
from lib.generate import sampling
from lib.tables import printable
from train import load

MOST = 100_000  # continuations of a prompt
AXES = ("data", "fsdp", "tensor")


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not blank; of .jsonl strings, or the `prompt` of objects."""
    try:
        text = user_path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"sample: --prompts is {path!r}, which cannot be read ({error})"
        ) from None
    lines = [line for line in text.split("\n") if line.strip()]
    if Path(path).suffix == ".jsonl":
        return [json_prompt(line) for line in lines]
    return lines


def json_prompt(line: str) -> str:
    """The prompt of a line of JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = value.get("prompt")
    if not isinstance(value, str):
        raise InputError(
            f"sample: --prompts has the line {line[:60]!r}; allowed in a .jsonl file are strings, "
            'and objects with a string "prompt"'
        )
    return value


def make_parser() -> Arguments:
    """The arguments of this command."""
    parser = Arguments("sample", __doc__)
    add = parser.add_argument
    add("run", help="run directory")
    add("--prompt", action="append", default=[], help="text to continue; may be repeated")
    add(
        "--prompts",
        metavar="FILE",
        help="a prompt a line; .jsonl: strings, or objects with a `prompt`;\n"
        "without --prompt and --prompts the config's",
    )
    add("--n", type=int, default=1, help="continuations of each prompt")
    add("--tokens", type=int, help="how many at most; the config's by default")
    add("--temperature", type=float, help="0: the likeliest token; the config's by default")
    add("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="from the fewest with so much probability")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    add("--seed", type=int, default=0, help="of the first row's draws; of the next, one more")
    add("--step", type=int, help="checkpoint; the newest by default")
    add("--stream", action="store_true", help="show the first continuation as it comes")
    add("--json", action="store_true", help="a JSON object a row: prompt, text, seed, ended")
    for axis in AXES:
        add(f"--mesh.{axis}", dest=axis, type=int, help="devices on that axis; default: one device")
    return parser


def check_arguments(a, parser: Arguments):
    """End with one sentence for what is wrong without looking at the run."""
    limits = [
        ("--n", a.n, 1 <= a.n <= MOST, f"1 to {MOST:,}"),
        ("--seed", a.seed, 0 <= a.seed <= 2**32 - MOST, f"0 to {2**32 - MOST:,}"),
        ("--top-k", a.top_k, a.top_k >= 0, "0 and more"),
        ("--top-p", a.top_p, 0 < a.top_p <= 1, "above 0 and at most 1"),
        ("--stop", "empty", all(a.stop), "text"),
    ]
    if a.tokens is not None:
        limits.append(("--tokens", a.tokens, 1 <= a.tokens <= 2**24, f"1 to {2**24:,}"))
    if a.temperature is not None:
        finite = 0 <= a.temperature < math.inf
        limits.append(("--temperature", a.temperature, finite, "0 and more"))
    for flag, given in (("--prompt", a.prompt), ("--stop", a.stop)):
        limits.append((flag, given, not SURROGATE.search("".join(given)), "text in UTF-8"))
    if a.prompts is not None:
        limits.append(("--prompts", "without a prompt", a.prompt, "one and more"))
    for flag, given, valid, allowed in limits:
        if not valid:
            parser.error(f"{flag} is {given}; allowed is {allowed}")


def parse_arguments(arguments: list[str]):
    """(arguments, parser) of a command line, checked as far as is possible without the run."""
    parser = make_parser()
    a = parser.parse_args(arguments)
    if a.prompts is not None:
        a.prompt += read_prompts(a.prompts)
    check_arguments(a, parser)
    return a, parser


def streams(a, parser: Arguments) -> bool:
    """Whether text is shown as it is made: on a terminal, or with --stream."""
    processes = jax.process_count()
    possible = not a.json and processes == 1  # processes must go at one pace
    if a.stream and not possible:
        form = "--json" if a.json else f"{processes} processes"
        parser.error(f"--stream is given with {form}; allowed is text, in one process")
    return a.stream or (possible and sys.stdout.isatty())


class Screen:
    """Text that grows on a terminal."""

    def __init__(self):
        self.shown = ""

    def show(self, text: str):
        """Print what `text` has beyond what is shown already."""
        print(printable(text[len(self.shown):]), end="", flush=True)
        self.shown = text


def main(arguments: list[str]) -> str:
    """Command line; returns the text that it prints, or would print without --json."""
    a, parser = parse_arguments(arguments)
    step = find_checkpoint(a.run, a.step)[1]
    given = {axis: getattr(a, axis) for axis in AXES}
    mesh = {axis: n for axis, n in given.items() if n is not None}
    with user_errors():
        params, config, tokenizer, _ = load(a.run, step, mesh or None)
    tokens = config.sample_tokens if a.tokens is None else a.tokens
    temperature = config.sample_temperature if a.temperature is None else a.temperature
    how = sampling(temperature, a.top_k, a.top_p)
    texts = [prompt for prompt in (a.prompt or config.prompts) for _ in range(a.n)]
    if not texts:
        print(f"the config of {a.run} has no prompts")
        return ""
    stream = streams(a, parser)
    if not a.json:
        print(f"sample of {a.run}, temperature {temperature}:", flush=True)
    screen = Screen()
    watch = None
    if stream:
        watch = screen.show
        watch(texts[0])
    loaded = [params]
    del params  # so that its memory is free once generation has its own copy
    found = continue_prompts(
        loaded.pop(), config, tokenizer, step, texts, how, tokens, a.seed, a.stop, watch
    )
    text = as_text(found)
    if a.json:
        for i, one in enumerate(found):
            row = {"prompt": one.prompt, "text": one.text, "seed": a.seed + i, "ended": one.ended}
            print(json.dumps(row), flush=True)
    else:
        screen.show(text)
        print(flush=True)
    return text
