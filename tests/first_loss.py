"""Seconds from a corpus to a first loss: five forms of it, a fresh clone, no config, no cache.

    python tests/first_loss.py [FORM ...]

On a quiet machine: each command has all cores, and the seconds include Python, compilation, the
tokenizer and the token cache. What is not committed is not in the clone.
"""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.sources import stdlib  # noqa: E402
from lib.tables import columns  # noqa: E402

DOCUMENTS = 900
FORMS = "corpus.jsonl", "corpus.json.gz", "corpus.parquet", "notes", "book.txt"
LOSS = re.compile(r"step \d+/\d+ \| loss \d")


def write_forms(place: Path, documents: int = DOCUMENTS):
    """The same documents in each of the forms: modules of Python's standard library."""
    import pyarrow
    from pyarrow import parquet

    found = (document.text for document in stdlib() if getattr(document, "text", ""))
    texts = list(itertools.islice(found, documents))
    records = [{"text": text} for text in texts]
    (place / "corpus.jsonl").write_text("\n".join(map(json.dumps, records)))
    (place / "corpus.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    parquet.write_table(pyarrow.table({"text": texts}), place / "corpus.parquet")
    (place / "notes").mkdir()
    for number, text in enumerate(texts):
        (place / "notes" / f"{number:04}.md").write_text(text, "utf-8", newline="")
    (place / "book.txt").write_text("\n\n".join(texts), "utf-8", newline="")


def seconds_to_loss(line: list[str], cwd: Path, env: dict[str, str]) -> float:
    """Seconds until a command prints a step's loss; it is ended then. Raises if it ends before."""
    begun = time.monotonic()
    process = subprocess.Popen(
        line, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = []
    try:
        for each in process.stdout:
            said.append(each)
            if LOSS.search(each):
                return time.monotonic() - begun
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    raise RuntimeError("".join(said)[-2000:])


def main(forms: list[str]):
    """Print the command and the seconds of each form."""
    rows = [["command", "seconds"]]
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        clone = place / "coppice"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        write_forms(clone)
        for form in forms or FORMS:
            env = os.environ | {"XDG_CACHE_HOME": str(place / f"cache-{form}"), "PYTHONPATH": ""}
            words = ["train.py", "configs/mine.py", "--path", form, "--name", form]
            seconds = seconds_to_loss([sys.executable, *words], clone, env)
            rows.append([f"python {' '.join(words[:-2])}", f"{seconds:.1f}"])
    print(columns(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
