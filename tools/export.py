"""A run's model as a Hugging Face directory in Llama's layout; and what `init_from` names, as a run's start.

    python train.py export RUN DIR [--step N] [--dtype bfloat16] [--shard-mb M]
    python train.py CONFIG --init_from hf:DIR ...

DIR: config.json (for transformers 4 and 5), generation_config.json, sharded safetensors, the tokenizer as
tokenizer.model and tokenizer.json, README.md. The step is the newest, or where embeddings are forgotten the
one longest after that. The tokenizer puts bos in front; for any text it gives our ids, since it is told to
read what spells a special token as text.

hf:DIR, of models of type "llama" (RoPE plain, linear or Llama 3's), gives shape, parameters and tokenizer:
any other `data.tokenizer` than "bpe" comes first, and may be hf:DIR too. Without a bos its place is taken by
eos; the embedding may have more rows than the tokenizer has tokens.
"""
import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import model
from data import batch_lengths
from lib.arguments import Arguments
from lib.checkpoint import find_checkpoint
from lib.config import to_json
from lib.errors import InputError, user_errors
from lib.hf import PLAIN, ROPE, safetensors_package, sides, tensors
from lib.tokenizers import ESCAPES, Bytes, HuggingFace, SentencePiece, Tokenizer
from model import ModelConfig, count, reparametrised, table
from train import Config, load


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which SentencePiece joins them: by falling score of what they make.

    Of equal scores it takes the leftmost, which ranks cannot say. It would matter for pieces a b c in a row
    with a b = b c alone, to which joining by scores does not lead: the order of a piece's own cuts is free.
    """
    return [(piece[:i], piece[i:]) for piece in sorted(scores, key=scores.get, reverse=True)
            for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]


def of_pieces(tokenizer: SentencePiece) -> dict:
    """The parts of tokenizer.json that are a SentencePiece model behind `data.escape`."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    spec, kinds = proto.ModelProto.FromString(tokenizer.model), proto.ModelProto.SentencePiece
    trainer, norm = spec.trainer_spec, spec.normalizer_spec
    special = [i for i, p in enumerate(spec.pieces) if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    known = {kinds.NORMAL, kinds.BYTE, kinds.CONTROL, kinds.UNKNOWN}
    if (trainer.model_type != trainer.BPE or not trainer.byte_fallback or norm.precompiled_charsmap
            or norm.remove_extra_whitespaces or not norm.escape_whitespaces
            or {p.type for p in spec.pieces} - known):
        raise InputError("the run's tokenizer.model cannot be a tokenizer.json with the same ids for every "
                         "text; allowed is SentencePiece BPE with byte fallback, without normalisation, "
                         'removal of spaces or pieces defined by a user, as data.tokenizer "bpe" trains it')
    scores = {p.piece: p.score for p in spec.pieces if p.type == kinds.NORMAL}
    spaces = [(" ", "\u2581")]
    normalizers = [replaced(a, b) for a, b in [*ESCAPES.items(), *spaces]]
    undo = [replaced(pair, char) for char, pair in reversed(ESCAPES.items())]  # U+0010 itself last
    decoders = [replaced("\u2581", " "), dict(type="ByteFallback"), dict(type="Fuse")]
    if norm.add_dummy_prefix:
        normalizers.append(dict(type="Prepend", prepend="\u2581"))
        decoders.append(dict(type="Strip", content=" ", start=1, stop=0))
    return dict(
        added_tokens=[(i, spec.pieces[i].piece) for i in special],
        normalizer=dict(type="Sequence", normalizers=normalizers), pre_tokenizer=None,
        decoder=dict(type="Sequence", decoders=decoders + undo),
        model=dict(vocab={p.piece: i for i, p in enumerate(spec.pieces)}, merges=merges(scores),
                   byte_fallback=True, fuse_unk=True, unk_token=tokenizer.processor.id_to_piece(0)))


def replaced(old: str, new: str) -> dict:
    """A step of a normalizer or decoder that replaces a string."""
    return dict(type="Replace", pattern=dict(String=old), content=new)


def of_bytes() -> dict:
    """The parts of tokenizer.json that are `data.Bytes`. A byte goes by a letter there: its Latin-1 character
    where one can see it, and for the others, in turn, those from U+0100 on.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in seen}
    letters |= {byte: chr(0x100 + i) for i, byte in enumerate(sorted({*range(256)} - {*seen}))}
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    ends = {Bytes.bos: "<s>", Bytes.eos: "</s>"}
    bpe = dict(vocab={token: i for i, token in (letters | ends).items()}, merges=[], byte_fallback=False,
               fuse_unk=False, unk_token=None)
    return dict(added_tokens=list(ends.items()), normalizer=None, pre_tokenizer=level, decoder=level,
                model=bpe)


def fast_tokenizer(tokenizer: Tokenizer) -> tuple[dict, dict]:
    """(tokenizer.json, the names of bos and eos) that give `tokenizer`'s ids."""
    if isinstance(tokenizer, HuggingFace):
        name = tokenizer.processor.id_to_token
        return json.loads(tokenizer.model)["tokenizer"], {
            f"{end}_token": name(getattr(tokenizer, end)) for end in ("bos", "eos")}
    made = of_bytes() if isinstance(tokenizer, Bytes) else of_pieces(tokenizer)
    names = dict(made["added_tokens"])
    ends = dict(bos_token=names[tokenizer.bos], eos_token=names[tokenizer.eos])
    bos = dict(SpecialToken=dict(id=ends["bos_token"], type_id=0))
    first, second = (dict(Sequence=dict(id=which, type_id=i)) for i, which in enumerate("AB"))
    flags = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    return made | dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=content, **flags) for i, content in made["added_tokens"]],
        model=dict(type="BPE", dropout=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   ignore_merges=False) | made["model"],
        post_processor=dict(
            type="TemplateProcessing", single=[bos, first], pair=[bos, first, second],
            special_tokens={ends["bos_token"]: dict(id=ends["bos_token"], ids=[tokenizer.bos],
                                                    tokens=[ends["bos_token"]])})), ends


def describe(config: Config, tokenizer: Tokenizer, dtype: str) -> dict:
    """config.json of a model, as transformers 4 and 5 read it."""
    m = config.model
    kind = next(kind for kind, fields in ROPE.items() if len(fields) == len(m.rope_scaling))
    scaling = {f: int(x) if f.startswith("original") else x
               for f, x in zip(ROPE[kind], m.rope_scaling, strict=True)} | dict(rope_type=kind)
    rows = max(n for phase in config.phases for n in batch_lengths(phase)[0])
    context = max(rows, int(m.rope_scaling[0] * m.rope_scaling[3]) if kind == "llama3" else 0)
    return {field: plain for field, plain in PLAIN.items() if plain is not None} | dict(
        architectures=["LlamaForCausalLM"], vocab_size=m.vocab, hidden_size=m.embed, head_dim=m.head_dim,
        intermediate_size=m.mlp, num_hidden_layers=m.layers, num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads, rms_norm_eps=m.norm_eps, tie_word_embeddings=m.tied,
        max_position_embeddings=context, rope_theta=m.rope_theta,
        rope_scaling=scaling if m.rope_scaling else None,
        rope_parameters=scaling | dict(rope_theta=m.rope_theta),
        bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, attention_dropout=0.0, use_cache=True,
        dtype=dtype, torch_dtype=dtype)


def card(run: Path, config: Config, meta: dict, ends: dict[str, str]) -> str:
    """README.md: what the model is, what it was trained on, its scores, its config."""
    found = [json.loads((run / f).read_text()) for f in ("summary.json", "eval.json") if (run / f).exists()]
    scores = {k: v for figures in found for k, v in figures.items() if isinstance(v, int | float) and (
        k.startswith(("eval/", "blimp", "gzip", "xz", "train/tokens", "train/flops")))}
    facts = {"parameters": f"{count(config.model):,}", "checkpoint": f"step {meta['step']}"}
    facts |= {f"text of {name}": f"fingerprint {print_} of the first {meta['sealed'][name]} shards"
              for name, print_ in meta["fingerprints"].items()}
    facts |= {f"`{k}`": f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for k, v in scores.items()}
    rows = "\n".join(f"| {k} | {v} |" for k, v in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [coppice, jax, llama]
---
# {run.name}

A language model in Llama's layout, trained with Coppice. Each document of its text began with the token
`{ends["bos_token"]}` and ended with `{ends["eos_token"]}`. What spells a special token is read as text.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (c.from_pretrained("{run.name}") for c in (AutoTokenizer, AutoModelForCausalLM))
```

| | |
|---|---|
{rows}

Scores are those that the run ended with.

```json
{json.dumps(to_json(config), indent=1)}
```
"""


def llama_params(config: Config, params: dict, step: int) -> dict:
    """The parameters of a Llama that computes what the run's model does. Raises InputError if none does."""
    m = config.model
    if m.qk_norm:
        raise InputError("model.qk_norm is true, for which Llama's layout has no place; allowed is false")
    if m.embed % m.heads:
        raise InputError(f"model.embed is {m.embed}, which transformers refuses for {m.heads} heads; allowed "
                         "is a multiple of model.heads")
    if not config.reparam:
        return params
    with user_errors((KeyError, TypeError, IndexError), InputError, "reparam is a function of the batch, "
                     "which no Llama is ({reason}); allowed is one of the parameters and the step"):
        params = reparametrised(config.reparam, params, jnp.int32(step), {})
    if {n: x.shape for n, x in params.items()} != {n: p.shape for n, p in table(m).items()}:
        raise InputError("reparam gives other parameters than model.table names; allowed are all of these")
    return params


def write_params(directory: Path, params: dict, shape: ModelConfig, dtype: str, most: float):
    """Safetensors of at most so many bytes each (one tensor may be larger), and an index where there are
    several.
    """
    table, files, held = model.table(shape), [[]], 0
    width = jnp.dtype(dtype).itemsize
    size = {n: math.prod(map(math.prod, sides(table[name]))) * width
            for n, (name, _) in tensors(shape).items()}
    for n in size:
        if files[-1] and held + size[n] > most:
            files, held = [*files, []], 0
        files[-1].append(n)
        held += size[n]

    def tensor(name: str, layer: int | None) -> np.ndarray:
        x = np.asarray(params[name] if layer is None else params[name][layer]).astype(jnp.dtype(dtype))
        inputs, outputs = sides(table[name])
        return np.ascontiguousarray(x.reshape(math.prod(inputs), -1).T) if outputs else x

    where = {}
    for i, chosen in enumerate(files, 1):
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        made = {n: tensor(*tensors(shape)[n]) for n in chosen}
        safetensors_package().numpy.save_file(made, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(chosen, file)
    if len(files) > 1:
        index = dict(metadata=dict(total_size=sum(size.values())), weight_map=where)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def main(arguments: list[str]):
    """Command line."""
    parser = Arguments("export", __doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("directory", type=Path, metavar="dir", help="to write; must be new, or empty")
    parser.add_argument("--step", type=int, help="checkpoint; see above")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--shard-mb", type=float, default=5e3, help="megabytes of a safetensors file at most")
    a = parser.parse_args(arguments)
    if not a.shard_mb > 0:
        parser.error(f"--shard-mb is {a.shard_mb}; allowed is more than 0")
    if a.directory.exists() and (not a.directory.is_dir() or any(a.directory.iterdir())):
        parser.error(f"{a.directory} is there already and not empty; allowed is a new directory")
    safetensors_package()
    _, step, meta = find_checkpoint(a.run, a.step)
    params, config, tokenizer, _ = load(a.run, step)
    params = llama_params(config, params, step)
    fast, ends = fast_tokenizer(tokenizer)
    unk = fast["model"].get("unk_token")
    named = ends | dict(tokenizer_class="PreTrainedTokenizerFast", split_special_tokens=True,
                        clean_up_tokenization_spaces=False) | ({"unk_token": unk} if unk else {})
    described = describe(config, tokenizer, a.dtype)
    warm = config.sample_temperature
    sampling = dict(do_sample=True, temperature=warm) if warm else {}
    files = {"config.json": described, "tokenizer.json": fast, "generation_config.json": dict(
        bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, **sampling),
        "tokenizer_config.json": named | dict(model_max_length=described["max_position_embeddings"])}
    partly = a.directory.with_name(f"{a.directory.name}.partial")
    shutil.rmtree(partly, ignore_errors=True)
    partly.mkdir(parents=True)
    write_params(partly, params, config.model, a.dtype, a.shard_mb * 1e6)
    for file, content in files.items():
        (partly / file).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
    if not isinstance(tokenizer, HuggingFace):
        (partly / "tokenizer.model").write_bytes(tokenizer.model)
    (partly / "README.md").write_text(card(a.run, config, meta, ends), "utf-8")
    partly.rename(a.directory)
    print(f"{a.directory}: step {step} of {a.run}, {count(config.model):,} parameters in {a.dtype}")
