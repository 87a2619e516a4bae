"""A run's model as a Hugging Face directory in the layout of its family.

    python train.py export RUN DIR [--step N] [--dtype bfloat16] [--shard-mb M] [--license NAME]
                           [--push ORG/NAME]
    python train.py CONFIG --init_from hf:DIR|hf:ORG/NAME ...

DIR gets config.json (for transformers 4 and 5), generation_config.json, safetensors, the tokenizer
as tokenizer.model and tokenizer.json, and README.md. The step is the newest one, or where
embeddings are forgotten the one longest after that. The tokenizer puts bos in front of a text. It
gives the same ids as the run's own for every text, since it is told to read what spells a special
token as text.

A run may start from hf:DIR, for the families that docs/models.md lists. It takes shape, parameters
and tokenizer from there. A `data.tokenizer` other than "bpe" comes first, and may be hf:DIR too.
Where there is no bos, eos takes its place. The embedding may have more rows than the tokenizer has
tokens.
"""
import contextlib
import json
import math
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from data import batch_lengths
from lib.arguments import Arguments
from lib.checkpoint import find_checkpoint
from lib.config import to_json
from lib.disk import read_object, user_path
from lib.errors import InputError, user_errors
from lib.families.family import written
from lib.families.layout import pack, size_in_file
from lib.hf import family_of, rows_of, safetensors_package, stored_rows, tensors
from lib.hub import NAME, hub_package, push
from lib.teacher import alone
from lib.tokenizers import ESCAPES, Bytes, HuggingFace, SentencePiece, Tokenizer
from model import ModelConfig, reparametrised, table
from train import Config, load

SPACE = "\u2581"  # what SentencePiece writes for a space
UNSAID = "unknown"  # the licence of a model whose owner has not said one
LICENCE = "Whoever shares the model says which, by the licences of its text and of its start."
SCORES = (
    "eval/", "blimp", "core", "gzip", "xz", "train/tokens", "train/flops",
)  # that the card shows


# ------------------------------------------------------------------------------------ the tokenizer


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which SentencePiece joins them, by falling score.

    Of equal scores it takes the leftmost, which ranks cannot say. That would matter only for pieces
    a b c in a row where a b and b c alone have the same score, to which joining by scores does not
    lead. The order of a piece's own cuts is free.
    """
    pairs = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        for i in range(1, len(piece)):
            left, right = piece[:i], piece[i:]
            if left in scores and right in scores:
                pairs.append((left, right))
    return pairs


def replaced(old: str, new: str) -> dict:
    """A step of a normalizer or decoder that replaces a string."""
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def check_pieces(spec, known: set[int]):
    """Raise InputError for a SentencePiece model that no tokenizer.json follows for every text."""
    trainer, norm = spec.trainer_spec, spec.normalizer_spec
    follows = (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and norm.escape_whitespaces
        and not norm.precompiled_charsmap
        and not norm.remove_extra_whitespaces
    )
    if not follows or {p.type for p in spec.pieces} - known:
        raise InputError(
            "the run's tokenizer.model cannot be a tokenizer.json with the same ids for every "
            "text; allowed is SentencePiece BPE with byte fallback, without normalisation, removal "
            'of spaces or pieces defined by a user, as data.tokenizer "bpe" trains it'
        )


def sentencepiece_parts(tokenizer: SentencePiece) -> dict:
    """The parts of a tokenizer.json that are a SentencePiece model behind ESCAPES."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    spec = proto.ModelProto.FromString(tokenizer.model)
    kinds = proto.ModelProto.SentencePiece
    special = (kinds.CONTROL, kinds.UNKNOWN)
    check_pieces(spec, {kinds.NORMAL, kinds.BYTE, *special})
    scores = {p.piece: p.score for p in spec.pieces if p.type == kinds.NORMAL}
    changes = [*ESCAPES.items(), (" ", SPACE)]
    normalizers = [replaced(old, new) for old, new in changes]
    undo = [replaced(new, old) for old, new in reversed(ESCAPES.items())]  # U+0010 itself last
    decoders = [replaced(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.normalizer_spec.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "added_tokens": [(i, p.piece) for i, p in enumerate(spec.pieces) if p.type in special],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders + undo},
        "model": {
            "vocab": {p.piece: i for i, p in enumerate(spec.pieces)},
            "merges": merges(scores),
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": tokenizer.processor.id_to_piece(0),
        },
    }


def byte_letters() -> dict[int, str]:
    """The letter that stands for a byte in a tokenizer.json.

    Its Latin-1 character where that is visible; for the others, in turn, the characters from U+0100
    on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in visible}
    hidden = sorted({*range(256)} - {*visible})
    for i, byte in enumerate(hidden):
        letters[byte] = chr(0x100 + i)
    return letters


def bytes_parts() -> dict:
    """The parts of a tokenizer.json that are `lib.tokenizers.Bytes`."""
    ends = {Bytes.bos: "<s>", Bytes.eos: "</s>"}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    tokens = byte_letters() | ends
    return {
        "added_tokens": list(ends.items()),
        "normalizer": None,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "vocab": {token: i for i, token in tokens.items()},
            "merges": [],
            "byte_fallback": False,
            "fuse_unk": False,
            "unk_token": None,
        },
    }


def added_token(i: int, content: str) -> dict:
    """A special token of a tokenizer.json."""
    return {
        "id": i,
        "content": content,
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }


def bos_first(bos: str, i: int) -> dict:
    """The post-processor that puts bos in front of a text, or of two."""
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": "AB"[i], "type_id": i}} for i in range(2))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }


def fast_tokenizer(tokenizer: Tokenizer) -> tuple[dict, dict]:
    """(tokenizer.json, the names of bos and eos) that give a tokenizer's ids."""
    if isinstance(tokenizer, HuggingFace):
        name = tokenizer.processor.id_to_token
        ends = {"bos_token": name(tokenizer.bos), "eos_token": name(tokenizer.eos)}
        return json.loads(tokenizer.model)["tokenizer"], ends
    if isinstance(tokenizer, Bytes):
        made = bytes_parts()
    elif isinstance(tokenizer, SentencePiece):
        made = sentencepiece_parts(tokenizer)
    else:
        raise InputError(
            "the run's tokenizer is no tokenizer.json's; allowed are SentencePiece, bytes and hf:DIR"
        )
    names = dict(made["added_tokens"])
    ends = {"bos_token": names[tokenizer.bos], "eos_token": names[tokenizer.eos]}
    model = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "ignore_merges": False,
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, content) for i, content in made["added_tokens"]],
        "model": model | made["model"],
        "post_processor": bos_first(ends["bos_token"], tokenizer.bos),
    }
    return made | whole, ends


# ---------------------------------------------------------------------------------------- the files


def describe(config: Config, tokenizer: Tokenizer, params: dict, dtype: str) -> dict:
    """config.json of a model, as transformers 4 and 5 read it."""
    m = config.model
    rows = [max(batch_lengths(phase)[0]) for phase in config.phases]
    if len(m.rope_scaling) > 1:
        factor, _, _, old, *_ = m.rope_scaling
        rows.append(int(factor * old))
    return {"max_position_embeddings": max(rows)} | written(family_of(m), m, params) | {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.eos,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def known_scores(run: Path) -> dict[str, float]:
    """The figures of a run that its card shows."""
    found = {}
    for file in (run / "summary.json", run / "eval.json"):
        found |= read_object(file)
    numbers = {name: x for name, x in found.items() if isinstance(x, int | float)}
    return {name: x for name, x in numbers.items() if name.startswith(SCORES)}


def without_places(value):
    """A config as JSON, where paths of this machine are their last part."""
    if isinstance(value, dict):
        return {name: without_places(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    if not isinstance(value, str):
        return value
    before, colon, path = value.rpartition(":") if value.startswith("hf:") else ("", "", value)
    file, *function = path.split(":")
    if not file.startswith(("/", "~", "..")) and not Path(file).is_absolute():
        return value
    return before + colon + ":".join([Path(file).name, *function])


def card(name: str, run: Path, config: Config, meta: dict, ends: dict[str, str], terms: str) -> str:
    """README.md: what the model is, what it was trained on, its scores, its config."""
    family = family_of(config.model)
    facts = {"parameters": f"{size_of(config.model):,}", "checkpoint": f"step {meta['step']}"}
    for source, fingerprint in meta["fingerprints"].items():
        shards = meta["sealed"][source]
        facts[f"text of {source}"] = f"fingerprint {fingerprint} of the first {shards} shards"
    for score, x in known_scores(run).items():
        facts[f"`{score}`"] = f"{x:,}" if isinstance(x, int) else f"{x:.4g}"
    rows = "\n".join(f"| {fact} | {said} |" for fact, said in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: {terms}
tags: [coppice, jax, {family.kind}]
---
# {name}

A language model in the layout of {family.architecture}, trained with Coppice. Each document of its
text began with the token `{ends["bos_token"]}` and ended with `{ends["eos_token"]}`. What spells a
special token is read as text.

Licence: {terms}. {LICENCE if terms == UNSAID else ""}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

| | |
|---|---|
{rows}

Scores are those that the run ended with.

```json
{json.dumps(without_places(to_json(config)), indent=1)}
```
"""


def text_files(
    config: Config, tokenizer: Tokenizer, params: dict, dtype: str
) -> tuple[dict[str, dict], dict]:
    """(the JSON files of a directory by name, the names of bos and eos).

    Batches are padded by eos on the left, where nothing follows that is generated.
    """
    fast, ends = fast_tokenizer(tokenizer)
    described = describe(config, tokenizer, params, dtype)
    named = ends | {
        "pad_token": ends["eos_token"],
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    unknown = fast["model"].get("unk_token")
    if unknown:
        named["unk_token"] = unknown
    named["model_max_length"] = described["max_position_embeddings"]
    sampling = {f"{name}_token_id": described[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    if config.sample_temperature:
        sampling |= {"do_sample": True, "temperature": config.sample_temperature}
    files = {
        "config.json": described,
        "tokenizer.json": fast,
        "generation_config.json": sampling,
        "tokenizer_config.json": named,
    }
    return files, ends


# ----------------------------------------------------------------------------------- the parameters


def llama_params(config: Config, params: dict, step: int) -> dict:
    """The parameters of a family's model, such as a Llama, that computes what the run's does.

    Raises InputError if none does.
    """
    check_model(config.model)
    if config.reparam:
        sentence = (
            "reparam is a function of the batch, which no Llama is ({reason}); allowed is one of "
            "the parameters and the step"
        )
        with user_errors((KeyError, TypeError, IndexError), InputError, sentence):
            params = reparametrised(config.reparam, params, jnp.int32(step), {}, config.model)
    check_rows(config, params)
    return {name: params[name] for name in rows_of(config.model)}


def size_of(config: ModelConfig) -> int:
    """Number of parameters in a file of this shape; a run may store others."""
    return sum(param.size for param in stored_rows(config).values())


def check_model(m: ModelConfig):
    """Raise InputError for a model that no family, or not one of its shape, computes."""
    family = family_of(m)
    if family.heads != "free" and m.embed % m.heads:
        raise InputError(
            f"model.embed is {m.embed}, which transformers refuses for {m.heads} heads; allowed is "
            "a multiple of model.heads"
        )
    if family.heads == "fill" and (m.kv_heads * m.head_dim != m.embed or m.kv_heads != m.heads):
        raise InputError(
            f"model.heads is {m.heads} of {m.head_dim} and kv_heads {m.kv_heads}; the layout of "
            f"{family.kind} allows heads that fill the stream ({m.embed}), each with its own keys"
        )


def check_rows(config: Config, params: dict):
    """Raise InputError unless parameters, through `reparam` if there is one, are those of a family.

    A `reparam` may leave stored rows that the family does not read, such as those of an adapter
    that it has merged; without one, a row besides those of the family is refused.
    """
    plain = {name: row.shape for name, row in rows_of(config.model).items()}
    given = {name: x.shape for name, x in params.items()}
    if config.reparam:
        read = given.keys() - (table(config.model).keys() - plain)
        said = "reparam gives"
    else:
        read = given.keys()
        said = "model.rows stores"
    odd = sorted(name for name in read | plain.keys() if given.get(name) != plain.get(name))
    if odd:
        raise InputError(
            f"{said} other parameters than model.plain_table names ({', '.join(odd)}); allowed are "
            "all of these in their shapes, or a reparam that turns model.rows into them"
        )


def shards_of(config: ModelConfig, dtype: str, most: float) -> tuple[list[list[str]], int]:
    """(the tensors of each file, of at most so many bytes or one tensor; bytes of all of them)."""
    rows, family = rows_of(config), family_of(config)
    width = jnp.dtype(dtype).itemsize
    shards: list[list[str]] = [[]]
    held = total = 0
    for tensor, (names, _) in tensors(config).items():
        size = math.prod(size_in_file([rows[name] for name in names], family)) * width
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
        total += size
    return shards, total


def write_params(directory: Path, params: dict, config: ModelConfig, dtype: str, most: float):
    """Safetensors of at most so many bytes each, or one tensor; an index for several."""
    rows, family = rows_of(config), family_of(config)
    held = {name: np.asarray(x) for name, x in params.items()}
    wanted = tensors(config)
    shards, total = shards_of(config, dtype, most)
    where = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for tensor in shard:
            names, layer = wanted[tensor]
            xs = [held[name] if layer is None else held[name][layer] for name in names]
            x = pack(xs, [rows[name] for name in names], family)
            made[tensor] = np.ascontiguousarray(x.astype(jnp.dtype(dtype)))
            where[tensor] = file
        safetensors_package().numpy.save_file(made, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # save_file lets the owner alone read it
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


# -------------------------------------------------------------------------------------- the command


def parse_arguments(arguments: list[str]):
    """The command line, checked as far as is possible without the run."""
    parser = Arguments("export", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="run directory")
    add("directory", type=Path, metavar="dir", help="to write; must be new, or empty")
    add("--step", type=int, help="checkpoint; see above")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    add("--shard-mb", type=float, default=5e3, help="megabytes of a safetensors file at most")
    add("--push", metavar="ORG/NAME", help="upload it to the Hugging Face Hub; private if it is new")
    add("--license", default=UNSAID, help="of the model, as its card says it: apache-2.0, mit ...")
    a = parser.parse_args(arguments)
    a.run, a.directory = user_path(a.run), user_path(a.directory)
    if not a.shard_mb > 0:
        parser.error(f"--shard-mb is {a.shard_mb}; allowed is more than 0")
    if a.push and not NAME.fullmatch(a.push):
        parser.error(f"--push is {a.push}; allowed is ORG/NAME")
    there = a.directory.exists()
    if there and (not a.directory.is_dir() or any(a.directory.iterdir())):
        parser.error(f"{a.directory} is there already and not empty; allowed is a new directory")
    return a


@contextlib.contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """A new directory, which takes the name `directory` at the end; after an error it is gone."""
    partly = directory.with_name(f"{directory.name}.{secrets.token_hex(8)}.partial")
    partly.mkdir(parents=True)  # nobody else's
    try:
        yield partly
        partly.rename(directory)
    except BaseException:  # of Python, an interrupt too: half an export must not stay
        shutil.rmtree(partly, ignore_errors=True)
        raise


def main(arguments: list[str]):
    """Command line."""
    a = parse_arguments(arguments)
    safetensors_package()
    if a.push:
        hub_package("--push", f"or `hf upload {a.push} {a.directory}` after an export without it")
    _, step, meta = find_checkpoint(a.run, a.step)
    params, config, tokenizer, _ = load(a.run, step)
    config = replace(config, model=alone(config.model))  # a teacher is not exported
    params = {name: params[name] for name in table(config.model)}
    params = llama_params(config, params, step)
    files, ends = text_files(config, tokenizer, params, a.dtype)
    with made_whole(a.directory) as partly:
        write_params(partly, params, config.model, a.dtype, a.shard_mb * 1e6)
        for file, content in files.items():
            said = json.dumps(content, indent=1, ensure_ascii=False)
            (partly / file).write_text(said, "utf-8")
        if not isinstance(tokenizer, HuggingFace):
            (partly / "tokenizer.model").write_bytes(tokenizer.model)
        said = card(a.directory.resolve().name, a.run, config, meta, ends, a.license)
        (partly / "README.md").write_text(said, "utf-8")
    parameters = size_of(config.model)
    print(f"{a.directory}: step {step} of {a.run}, {parameters:,} parameters in {a.dtype}")
    if a.push:
        print(f"{a.push}: {push(a.directory, a.push)}")
