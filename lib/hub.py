"""The Hugging Face Hub: models by name, through the package huggingface_hub where there is one."""
import functools
import re
from pathlib import Path
from types import ModuleType

from lib.disk import user_path
from lib.errors import InputError, user_errors

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # ORG/NAME
FILES = ("*.json", "*.safetensors", "tokenizer.model")  # of a model, that are read here


def hub_package(wanted: str, otherwise: str) -> ModuleType:
    """The package huggingface_hub, which is optional; without it, what else to do is said."""
    said = f"{wanted} needs the package huggingface_hub: pip install huggingface_hub; {otherwise}"
    with user_errors(ImportError, sentence=said):
        import huggingface_hub
    return huggingface_hub


def place(name: str) -> Path:
    """The directory that hf:DIR or hf:ORG/NAME means; a model of the Hub is fetched into its cache.

    Raises InputError where that cannot be had.
    """
    path = user_path(name.removeprefix("hf:"))
    if path.exists() or not NAME.fullmatch(name.removeprefix("hf:")):
        return path
    return fetched(name.removeprefix("hf:"))


@functools.cache
def fetched(repository: str) -> Path:
    """Where the files of ORG/NAME lie, once for each process."""
    by_hand = f"or `hf download {repository} --local-dir DIR`, and give hf:DIR"
    package = hub_package(f"hf:{repository}, which is no directory here,", by_hand)
    said = (
        f"hf:{repository} is no directory here, and the Hub does not give it ({{reason}}); allowed "
        f"is what it has and lets you read, {by_hand}"
    )
    with user_errors(Exception, InputError, said):  # of huggingface_hub and its HTTP client
        return Path(package.snapshot_download(repository, allow_patterns=list(FILES)))


def push(directory: Path, repository: str) -> str:
    """Upload a directory as ORG/NAME, which is private if it is new. Returns its address.

    Raises InputError where that is refused.
    """
    package = hub_package("--push", f"or `hf upload {repository} {directory}`")
    said = (
        f"{directory} is written, but the Hub does not take it as {repository} ({{reason}}); "
        f"`hf upload {repository} {directory}` tries again"
    )
    with user_errors(Exception, InputError, said):  # of huggingface_hub and its HTTP client
        hub = package.HfApi()
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=directory)
    return str(address)
