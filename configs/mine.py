"""Mine: a small model on text of yours, whatever form it has; size and length by how much there is.

JSON Lines, JSON, Parquet, plain text, Markdown, code, packed as .gz or .zst or not, a file, a
directory or a pattern, here or on hf://, gs://, s3://; or what `save_to_disk` wrote. It says what it
chose; lib/any_text.py has the rules. Without --held_out a hash of their paths holds 5 %
of the documents out for dev and 5 % for test. A run takes a minute to some minutes on two CPU cores.

    python train.py configs/mine.py --path PATH
    python train.py configs/mine.py --path train.jsonl --held_out val.jsonl --tokens 2e6
    python train.py configs/mine.py --path DIR --depth 12
    python train.py configs/mine.py --path DIR --kind jsonl --content "{title}: {body.text}"
"""
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from configs.base import DEEPEST, TOKENS_PER_PARAM, ladder, rung, says
from data import Source
from lib.any_text import Survey, any_text, survey
from lib.errors import InputError
from lib.fields import FROM_0, at_most
from model import count
from train import Config

LITTLE = 200_000  # bytes of text below which there is too little to learn a tokenizer from
PASSES = 4  # over the text at most: so many are nearly worth new text (Muennighoff et al. 2023)
MOST = 3_000_000  # tokens of a run whose depth is chosen here: some minutes on two CPU cores
PACKED = {"gz": 3.0, "zst": 3.0, "parquet": 2.0}  # bytes of text in one of such a file, roughly


def config(
    path: str,
    held_out: str = "",
    kind: Literal["", "jsonl", "json", "parquet", "text"] = "",
    content: str = "text",
    separator: str | None = None,
    depth: Annotated[int, FROM_0, at_most(DEEPEST)] = 0,
    init_from: str = "",
) -> Config:
    """A run on the text in `path`: a file, a directory or a pattern.

    held_out: your own held-out text, which is measured during the run and reported at its end.
    kind: how to read; "" goes by how names end. content: the key of a record's text, or a template
    of keys. separator: the end of a document in plain text. depth: a rung of the ladder in
    configs/base.py, from which all sizes follow; 0 goes by how much text there is. init_from: a
    model to start from, which has its own shape and tokenizer.
    """
    read = partial(any_text, kind=kind, content=content, separator=separator)
    source = Source(partial(read, path=path, without=held_out))
    own = {"mine": Source(partial(read, path=held_out))} if held_out else {}
    try:
        seen = survey(path, kind, held_out)
    except InputError:  # whoever reads it will say so
        return on_text(ladder(depth or 4), source, own, init_from)
    letters = text_bytes(seen)
    by_bytes = letters < LITTLE and not depth and not init_from
    tokens = letters if by_bytes else letters / 3  # a piece of a small vocabulary has about three
    tokens = max(5_000.0, PASSES * tokens)
    chosen = depth or depth_for(tokens)
    most = TOKENS_PER_PARAM * count(rung(chosen))
    if not depth:
        most = min(most, MOST)
    vocab = 258 if by_bytes else 0
    found = on_text(ladder(chosen, min(tokens, most), vocab), source, own, init_from)
    if by_bytes:
        found = replace(found, data=replace(found.data, tokenizer="bytes"))
    print(told(found, seen, path, chosen, letters, held_out), flush=True)
    return found


def depth_for(tokens: float) -> int:
    """The deepest rung of those from 2 to 6 that reads a token a parameter in so many."""
    fitting = [depth for depth in range(2, 7) if count(rung(depth)) <= tokens]
    return max(fitting, default=2)


def on_text(found: Config, source: Source, own: dict[str, Source], init_from: str) -> Config:
    """A rung of the ladder on a source and its held-out text; else as the rung has it."""
    data = replace(found.data, sources={"mine": source}, held_out=own)
    return replace(found, data=data, prompts=("",), init_from=init_from)


def text_bytes(seen: Survey) -> int:
    """About how many bytes of text there are."""
    _, place = seen.files[0] if seen.files else ("", "")
    return round(seen.bytes * PACKED.get(place.rpartition(".")[2], 1.0))


def told(found: Config, seen: Survey, path: str, depth: int, letters: int, held_out: str) -> str:
    """What was chosen, and how to choose otherwise."""
    phase = found.phases[0]
    dev, test = 100 * found.data.dev, 100 * found.data.test
    by_hash = (f"{dev:g} % of the documents for dev and {test:g} % for test, by a hash of their "
               "paths (--held_out PATH)")
    files = "1 file" if len(seen.files) == 1 else f"{len(seen.files):,} files"
    left = ", ".join(f"{number} {end}" for end, number in seen.left_out.most_common(5))
    size = f"depth {depth}: {says(found)}"
    if found.init_from:
        size = (f"the model of {found.init_from}, {phase.steps:,} steps of {phase.batch} x "
                f"{phase.seq} tokens, peak rate {found.schedule.peak:g}")
    lines = [
        f"mine: {path}: {files} read as {seen.kind}, about {letters / 1e6:.2g} MB of text"
        + (f"; not read: {left} (--kind)" if left else ""),
        f"mine: held out: {held_out or by_hash}",
        f"mine: {size} (--depth, --tokens, --epochs, --tokens_per_param)",
    ]
    return "\n".join(lines)
