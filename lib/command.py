"""The command line of a run: a config, and fields of it that are set by flags."""
import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.config import ROOT, build, find_config, parts, walk
from lib.errors import InputError
from lib.fields import (
    RENAMED,
    allowed_names,
    fits,
    kind,
    missing,
    options,
    plain,
    setting_types,
    settings,
)
from lib.help import show_help

# What other codebases call a field, by the end of its path here.
OTHER_NAMES = {
    "schedule.peak": "lr learning_rate max_lr peak_lr base_lr lr_max",
    "schedule.final": "min_lr lr_min final_lr lr_end",
    "schedule.warmup": "warmup_steps warmup_iters num_warmup_steps lr_warmup_steps warmup_ratio",
    "schedule.shape": "lr_scheduler lr_scheduler_type scheduler lr_schedule decay_lr",
    "batch": "batch_size bs train_batch_size global_batch_size per_device_train_batch_size "
             "device_batch_size micro_batch_size",
    "accumulate": "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches",
    "steps": "max_steps max_iters num_steps num_iterations train_steps total_steps iters",
    "seq": "seq_len seq_length sequence_length context context_length context_size block_size "
           "max_length max_seq_len max_seq_length n_ctx n_positions",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers depth",
    "model.embed": "hidden_size d_model n_embd dim embed_dim model_dim width hidden_dim",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.kv_heads": "n_kv_head n_kv_heads num_kv_heads num_key_value_heads",
    "model.mlp": "intermediate_size ffn_dim d_ff ffn_hidden_size mlp_dim",
    "model.vocab": "vocab_size n_vocab",
    "model.tied": "tie_word_embeddings tie_embeddings weight_tying",
    "model.dtype": "precision fp16 bf16 mixed_precision amp",
    "model.attention": "attn_implementation flash flash_attention",
    "model.remat": "gradient_checkpointing activation_checkpointing",
    "optimizer.weight_decay": "wd decay_weight",
    "optimizer.b1": "beta1 adam_beta1",
    "optimizer.b2": "beta2 adam_beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "clip": "grad_clip max_grad_norm clip_norm gradient_clip_val clip_grad",
    "seed": "random_seed data_seed",
    "eval_every": "eval_interval eval_steps eval_freq val_every val_check_interval",
    "save_every": "save_steps save_interval checkpoint_every ckpt_every checkpoint_interval",
    "keep": "save_total_limit keep_checkpoints",
    "sample_temperature": "temperature",
    "sample_tokens": "max_new_tokens num_tokens",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_file",
    "data.dev": "val_split validation_split valid_split eval_split dev_split val_fraction",
    "data.test": "test_split test_fraction",
    "name": "run_name experiment exp_name experiment_name",
}
FIELD_OF = RENAMED | {word: field for field, words in OTHER_NAMES.items() for word in words.split()}

# What other codebases have and is no field here.
OUT = "a run's directory is RUNS/NAME: --runs DIR --name NAME"
TEXT = ("text comes from the config file's data.sources; one that takes a path has "
        "--data.sources.NAME.documents.path PATH, and configs/mine.py --path PATH reads any")
TRACKER = "a tracker is named: --tracker wandb, --tracker tensorboard or --tracker trackio"
DEVICES = ("all devices that JAX finds are used, those of JAX_PLATFORMS=cpu, cuda or tpu before "
           "the command; --mesh.data N and --mesh.fsdp N lay them out")
EPOCHS = ("a run's length is --epochs N passes, or --tokens N, or --phases.N.steps; "
          "--data.sources.NAME.epochs is how often a source may be passed over")
RESUME = "the command that began a run resumes it, and --init_from RUN starts from another's end"
FILE = "the config file is the first word: python train.py FILE"
DROPOUT = "the model has none"
OTHER_ANSWERS = {
    OUT: "out_dir output_dir out save_dir checkpoint_dir ckpt_dir log_dir logdir run_dir workdir",
    TEXT: "dataset datasets data_path data_dir dataset_name train_file train_data corpus",
    TRACKER: "wandb tensorboard trackio report_to logger wandb_project use_wandb wandb_log track "
             "project",
    DEVICES: "device devices gpus num_gpus gpu cpu cuda tpu accelerator platform backend",
    EPOCHS: "num_epochs num_train_epochs max_epochs n_epochs",
    RESUME: "resume resume_from resume_from_checkpoint checkpoint ckpt ckpt_path pretrained load",
    FILE: "config config_file cfg config_name config_path",
    DROPOUT: "dropout attn_dropout hidden_dropout attention_dropout",
}
ANSWER_OF = {word: said for said, words in OTHER_ANSWERS.items() for word in words.split()}


# ------------------------------------------------------------------------------------------ flags

def parse(arguments: list[str], made: type) -> tuple[Any, str]:
    """(config, its file) of a run's command line; made: `train.Config`. Raises InputError."""
    words, file = list(arguments), str(ROOT / "configs/quickstart.py")
    if words and not words[0].startswith("-"):
        file = words.pop(0)
    found, file = find_config(file, made)
    if {"-h", "--help"} & set(words):
        show_help(found, made, file)
        raise SystemExit(0)
    flags = read_flags(words)
    config = found
    if not isinstance(found, made):
        takes = inspect.signature(found).parameters
        own = {flag: word for flag, word in flags if own_name(flag) in takes}
        flags = [(flag, word) for flag, word in flags if flag not in own]
        config = build(found, own_values(found, own), file, made)
    for flag, word in flags:
        config = set_field(config, flag, word)
    name = Path(file.replace(".py:", "-")).name.removesuffix(".py")
    return replace(config, name=config.name or name), file


def read_flags(words: list[str]) -> list[tuple[str, str | None]]:
    """[(--path.to.field, its word)] of --field WORD and --field=WORD; None where there is none."""
    words, flags = list(words), []
    while words:
        flag, equals, word = words.pop(0).partition("=")
        if not flag.startswith("--"):
            raise InputError(f"{flag!r} is not understood here; fields are set by "
                             "--path.to.field VALUE")
        if not equals and words and not words[0].startswith("--"):
            flags.append((flag, words.pop(0)))
        else:
            flags.append((flag, word if equals else None))
    return flags


def require_word(flag: str, word: str | None):
    """Raise InputError for a flag without a value."""
    if word is None:
        raise InputError(f"{flag} needs a value: {flag} VALUE")


def own_name(flag: str) -> str:
    """The parameter of a file's `config` function that a flag may mean."""
    return flag[2:].replace("-", "_")


def own_values(function: Callable, flags: dict[str, str | None]) -> dict[str, Any]:
    """The arguments of a file's `config` function, by name, that flags give."""
    hints, usual = setting_types(function), settings(function)
    given = {}
    for flag, word in flags.items():
        require_word(flag, word)
        name = own_name(flag)
        given[name] = convert(word, usual.get(name), hints.get(name, Any))
    return given


def set_field(config, flag: str, word: str | None):
    """The config with the field of a flag set. Raises InputError for a flag that names no field."""
    names = flag[2:].split(".")
    try:
        changed = override(config, names, word or "", flag)
    except UnknownField as error:
        said = foreign(config, names) if error.by_other_name else ""
        if not said:
            raise
        raise InputError(f"unknown field {flag}: {said}") from None
    require_word(flag, word)
    return changed


def override(value, names: list[str], word: str, flag: str, hint=Any):
    """A config with the part at a path set from a word; `lib.fields.check_value` judges its type.

    value: the config, or the part of it that the rest of the path is in. hint: its annotation.
    Raises InputError for a path that leads nowhere.
    """
    if not names:
        return convert(word, value, hint)
    known = settable(value, hint)
    name = names[0] if names[0] in known else names[0].replace("-", "_")
    new = new_entry(hint) if len(names) == 1 else None
    if name not in known and new is None:
        raise UnknownField(value, names, flag)
    part, part_hint = known.get(name, (None, new))
    return with_part(value, name, override(part, names[1:], word, flag, part_hint))


def settable(value, hint) -> dict[str, tuple[Any, Any]]:
    """{name: (part, its type)} of what flags may set in a value; hint: its field's type."""
    known = parts(value)
    if callable(value):
        hints = setting_types(value)
        known |= {name: (None, hints.get(name, Any)) for name in missing(value, hint)}
    return known


def new_entry(hint):
    """The type of an entry by which a flag may extend a dictionary of numbers or texts, or None."""
    for of in options(hint):
        if kind(of) is dict and (fits(0.5, of.__args__[1]) or fits("", of.__args__[1])):
            return of.__args__[1]
    return None


def with_part(value, name: str, part):
    """A dataclass, dictionary (None is an empty one), tuple, list or function with a part set."""
    if callable(value):
        given = getattr(value, "keywords", {}) | {name: part}
        return functools.partial(plain(value), **given)
    if isinstance(value, tuple | list):
        return type(value)(part if str(i) == name else old for i, old in enumerate(value))
    if isinstance(value, dict) or value is None:
        return (value or {}) | {name: part}
    return replace(value, **{name: part})


def convert(word: str, old, hint):
    """A word of the command line as a value of a field that holds `old`."""
    if isinstance(old, str):
        return word
    parsed, wanted = literal(word), options(hint)
    if not fits(parsed, hint) and fits(word, hint):
        return word
    items = [of.__args__[0] for of in wanted if kind(of) is tuple and of is not tuple]
    if items and not isinstance(parsed, tuple):
        return one_or_more(parsed, word, items[0])
    if type(parsed) is int and is_float(old, wanted) and fits(parsed, float):
        return float(parsed)
    return parsed


def is_float(old, wanted: list) -> bool:
    """Does a field that holds `old`, of these types, hold floats?"""
    return isinstance(old, float) or (float in wanted and int not in wanted)


def one_or_more(parsed, word: str, item):
    """A word, and what it is as a literal, as a tuple of items of a type, if it can be one."""
    if isinstance(parsed, list):
        return tuple(parsed)
    for one in parsed, word:
        if fits(one, item):
            return (one,)
    return parsed


def literal(word: str):
    """A word as a Python literal, or itself; true, false and none may be written small."""
    small = {"true": "True", "false": "False", "none": "None"}
    try:
        return ast.literal_eval(small.get(word, word))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word


# ---------------------------------------------------------------------------------- unknown names

class UnknownField(InputError):
    """A flag whose path leads to no field; `names` is the rest of it, from what was not found."""

    def __init__(self, value, names: list[str], flag: str):
        name, known = names[0].replace("-", "_"), parts(value)
        path = flag[2:].removesuffix("." + ".".join(names))
        self.by_other_name = False  # may the name be one of another codebase?
        if not known and not callable(value) and not isinstance(value, dict | tuple):
            said = f"{path} is {value!r}, which has no {name!r}; only a config file changes that"
        elif RENAMED.get(name) in known:
            said = f"{name!r} is no field; {allowed_names(name, known)}"
        elif callable(value) and name in inspect.signature(plain(value)).parameters:
            said = (f"{name!r} is what {plain(value).__name__} is called with; its settings are: "
                    f"{', '.join(known) or 'none'}")
        else:
            said = f"there is no {names[0]!r} here; {allowed_names(name, known)}"
            self.by_other_name = len(names) == 1
        super().__init__(f"unknown field {flag}: {said}")


def foreign(config, names: list[str]) -> str:
    """What is said of a name that another codebase, or another part of the config, has; or ""."""
    name = names[-1].replace("-", "_").lower()
    if name in ANSWER_OF:
        return ANSWER_OF[name]
    ending = FIELD_OF.get(name, name)
    known = [path for path, _, _ in walk(config) if f".{path}".endswith(f".{ending}")]
    return f"it is {' or '.join(f'--{path}' for path in known[:4])} here" if known else ""
