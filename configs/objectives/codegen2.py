"""CodeGen2: is infilling free, does a prefix that is seen from both sides help, does prose help?

Paper: CodeGen2: Lessons for Training LLMs on Programming and Natural Languages, Nijkamp et al. 2023
    (003:12)
Method: one model for next tokens and infilling, of code and prose. Half of the rows are left as
    they are; of the others spans are taken out, and stand at the end behind sentinels. Lessons: a
    prefix mask is no better than a causal one; infilling is not free; a mixture of code and prose
    does nearly as well on each as training on that alone.
Here: code is Python's library in bytes, prose its docstrings; equal positions in all arms. Four
    spans of eight bytes are taken out of a row. causal: next tokens alone. mixed: and infilling, in
    equal shares. prefix: so, with a prefix mask. code: mixed without prose. Loss is on the spans
    and what follows a sentinel. Left out: sizes, and many epochs.
Cost: 12 runs of half a minute, 6 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/codegen2.py --jobs 2
"""
import ast
from dataclasses import replace

import numpy as np

from configs import base
from data import Document, Source, causal, stdlib
from lib.objectives import CAUSAL
from lib.study import Claim, Paper, Study

SIGNS = {"prefix": "\x01", "infill": "\x02", "deshuffle": "\x03", "copy": "\x04", "find": "\x05"}
SENTINELS = "\x0e\x0f\x10\x11"  # characters that no file of the library has, as SIGNS
PREFIX = {"kind": "prefix", "window": 0}


def asked(row: dict, tokenizer, what: str, given: list, answer: list) -> tuple[dict, dict]:
    """A row whose sign and `given` are seen from both sides, and whose answer is predicted."""
    n, first = len(row["tokens"]), len(given)
    ids = [*tokenizer.encode(SIGNS[what]), *given, *answer][:n + 1]
    ids = np.array(ids + [tokenizer.eos] * (n + 1 - len(ids)), np.int32)
    place = np.arange(n, dtype=np.int32)
    real = place < first + len(answer)
    return row | {
        "tokens": ids[:-1], "targets": ids[1:], "positions": place * real,
        "segments": real.astype(np.int32), "prefix": (place <= first).astype(np.int32),
        "weights": (real & (place >= first)).astype(np.float32)}, PREFIX


def prefix(row, rng, tokenizer):
    """The row from a random place on, after what stands before."""
    ids = row["targets"].tolist()
    cut = int(rng.integers(1, len(ids)))
    return asked(row, tokenizer, "prefix", ids[:cut], ids[cut:])


def infill(row, rng, tokenizer, length: int = 8):
    """Four spans become sentinels; the answer is each sentinel and what it stands for."""
    marks = [tokenizer.encode(mark)[0] for mark in SENTINELS]
    ids = row["targets"].tolist()[:len(row["targets"]) - 2 * len(marks)]
    starts = np.sort(rng.choice(len(ids) // length, len(marks), replace=False)) * length
    given, answer, end = [], [], 0
    for mark, start in zip(marks, starts.tolist(), strict=True):
        given += [*ids[end:start], mark]
        end = start + length
        answer += [mark, *ids[start:end]]
    return asked(row, tokenizer, "infill", given + ids[end:], answer)


def infill_causally(row, rng, tokenizer, length: int = 8):
    """The same under a causal mask."""
    made, _ = infill(row, rng, tokenizer, length)
    return {name: x for name, x in made.items() if name != "prefix"}, CAUSAL


prefix.masks = infill.masks = (PREFIX,)
infill_causally.masks = (CAUSAL,)


def docstrings():
    """What the functions and classes of Python's library say of themselves."""
    for document in stdlib("definition"):
        if isinstance(document, Document):
            said = ast.get_docstring(ast.parse(document.text).body[0])
            if said and len(said) > 100:
                yield replace(document, text=said)


(phase,) = base.small.phases
SOURCES = {"code": stdlib, "code_infill": stdlib, "prose": docstrings, "prose_infill": docstrings}


def arm(how, **mixture):
    """A run of so much of each source, infilling by this objective."""
    objective = {"code": causal, "prose": causal, "code_infill": how, "prose_infill": how}
    own = replace(phase, objective=objective, mixture=mixture)
    data = replace(base.small.data, tokenizer="bytes", test=0.0,
                   sources={name: Source(documents) for name, documents in SOURCES.items()})
    return replace(base.small, model=base.shape(3, 96, 0), data=data, phases=(own,), prompts=(),
                   eval_every=300, eval_tokens=8_192)


study = Study(
    question="Is infilling free, does a prefix seen from both sides help, does prose help?",
    paper=Paper(title="CodeGen2: Lessons for Training LLMs on Programming and Natural Languages",
                authors="Nijkamp et al.", year=2023, seeds=("003:12",)),
    arms={"causal": arm(infill_causally, code=0.5, prose=0.5),
          "mixed": arm(infill_causally, **dict.fromkeys(SOURCES, 0.25)),
          "prefix": arm(infill, **dict.fromkeys(SOURCES, 0.25)),
          "code": arm(infill_causally, code=0.5, code_infill=0.5)},
    control="mixed",
    quick=base.quick(),
    claims=(
        Claim(says="infilling has to be trained", arm="causal", measure="eval/code_infill/own",
              above=0.1),
        Claim(says="it is not free", arm="causal", measure="eval/code/bpb", below=0.0),
        Claim(says="a prefix seen from both sides gains less than 0.05 nats", arm="prefix",
              measure="eval/code_infill/own", above=-0.05),
        Claim(says="half of the code does nearly as well on code", arm="code",
              measure="eval/code/bpb", above=-0.1),
        Claim(says="and far better on prose", arm="code", measure="eval/prose/bpb", above=0.3),
    ), seeds=3)
