"""Mine: a small model on text of yours, whatever form it has; size and length by how much there is.

JSON Lines, JSON, Parquet, plain text, Markdown, code, packed as .gz or .zst or not, a file, a
directory or a pattern, here or on hf://, gs://, s3://; or what `save_to_disk` wrote. It says what it
chose; lib/any_text.py has the rules. Without --held_out a hash of their paths holds 5 %
of the documents out for dev and 5 % for test. A run takes a minute to some minutes on two CPU cores.

    python train.py configs/mine.py --path PATH
    python train.py configs/mine.py --path train.jsonl --held_out val.jsonl --tokens 2e6
    python train.py configs/mine.py --path DIR --kind jsonl --content "{title}: {body.text}"
"""
from dataclasses import replace
from functools import partial
from typing import Literal

from configs.base import RUNGS, rung, scaled
from data import Source
from lib.any_text import Survey, any_text, survey
from lib.errors import InputError
from train import Config

LITTLE = 200_000  # bytes of text below which there is too little to learn a tokenizer from
PACKED = {"gz": 3.0, "zst": 3.0, "parquet": 2.0}  # bytes of text in one of such a file, roughly


def config(
    path: str,
    held_out: str = "",
    kind: Literal["", "jsonl", "json", "parquet", "text"] = "",
    content: str = "text",
    separator: str | None = None,
    size: Literal["", "small", "deep", "llama"] = "",
    init_from: str = "",
) -> Config:
    """A run on the text in `path`: a file, a directory or a pattern.

    held_out: your own held-out text, which is measured during the run and reported at its end.
    kind: how to read; "" goes by how names end. content: the key of a record's text, or a template
    of keys. separator: the end of a document in plain text. size: a rung of configs/base.py.
    init_from: a model to start from, which has its own shape and tokenizer.
    """
    read = partial(any_text, kind=kind, content=content, separator=separator)
    source = Source(partial(read, path=path, without=held_out))
    own = {"mine": Source(partial(read, path=held_out))} if held_out else {}
    try:
        seen = survey(path, kind, held_out)
    except InputError:  # whoever reads it will say so
        return on_text(RUNGS[size or "small"], source, own, init_from)
    letters = text_bytes(seen)
    chosen = size or rung(letters / 3)  # a piece of a small vocabulary has about three
    found = on_text(RUNGS[chosen], source, own, init_from)
    each = 3  # bytes of text a token
    if letters < LITTLE and not size and not init_from:
        each = 1
        data = replace(found.data, tokenizer="bytes")
        found = replace(found, data=data, model=replace(found.model, vocab=258))
    phase = found.phases[0]
    most = max(20, round(4 * letters / each / phase.batch / phase.seq))  # four passes
    found = scaled(found, min(phase.steps, most))
    print(says(found, seen, path, chosen, letters, held_out), flush=True)
    return found


def on_text(rung: Config, source: Source, own: dict[str, Source], init_from: str) -> Config:
    """A rung of the ladder on a source and its held-out text; else as the rung has it."""
    data = replace(rung.data, sources={"mine": source}, held_out=own)
    return replace(rung, data=data, prompts=("",), init_from=init_from)


def text_bytes(seen: Survey) -> int:
    """About how many bytes of text there are."""
    _, place = seen.files[0] if seen.files else ("", "")
    return round(seen.bytes * PACKED.get(place.rpartition(".")[2], 1.0))


def says(found: Config, seen: Survey, path: str, size: str, letters: int, held_out: str) -> str:
    """What was chosen, and how to choose otherwise."""
    phase = found.phases[0]
    dev, test = 100 * found.data.dev, 100 * found.data.test
    by_hash = (f"{dev:g} % of the documents for dev and {test:g} % for test, by a hash of their "
               "paths (--held_out PATH)")
    files = "1 file" if len(seen.files) == 1 else f"{len(seen.files):,} files"
    left = ", ".join(f"{number} {end}" for end, number in seen.left_out.most_common(5))
    shape = f"{found.model.layers} layers of width {found.model.embed} over {found.model.vocab:,} pieces"
    if found.init_from:
        shape = f"the model of {found.init_from}"
    lines = [
        f"mine: {path}: {files} read as {seen.kind}, about {letters / 1e6:.2g} MB of text"
        + (f"; not read: {left} (--kind)" if left else ""),
        f"mine: held out: {held_out or by_hash}",
        f"mine: size {size} of configs/base.py: {shape}, {phase.steps} steps of {phase.batch} x "
        f"{phase.seq} tokens, peak rate {found.schedule.peak:g} "
        "(--size, --tokens, --epochs, --tokens_per_param)",
    ]
    return "\n".join(lines)
