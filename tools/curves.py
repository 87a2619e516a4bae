"""Draw a run's curves.png again, from its metrics.jsonl."""
from pathlib import Path

from lib.arguments import Arguments
from lib.curves import draw
from lib.disk import user_path


def main(arguments: list[str]):
    """Command line."""
    parser = Arguments("curves", __doc__)
    parser.add_argument("run", type=Path, help="run directory")
    run = user_path(parser.parse_args(arguments).run)
    if not (run / "metrics.jsonl").is_file():
        parser.error(f"{str(run)!r} has no metrics.jsonl")
    draw(run)
