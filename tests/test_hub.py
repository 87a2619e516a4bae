"""lib/hub.py: models by name, with a package that stands in for huggingface_hub."""
import json
import sys
from types import SimpleNamespace

import pytest

from lib import hub
from lib.errors import InputError
from lib.hf import read_shape
from tools import export

CONFIG = dict(
    model_type="qwen3",
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=300,
)


class Unreachable(Exception):
    """What an HTTP client raises that is no OSError."""


class Fake:
    """A Hub of one model, and of one that nobody may read."""

    def __init__(self, root):
        self.root = root
        self.calls = []

    def snapshot_download(self, repository, allow_patterns):
        self.calls.append((repository, *allow_patterns))
        if repository == "org/far":
            raise Unreachable("[Errno -2] Name or service not known")
        if repository != "org/small":
            raise OSError("401 Client Error")
        return str(self.root)

    def HfApi(self):
        return SimpleNamespace(create_repo=self.create_repo, upload_folder=self.upload_folder)

    def create_repo(self, repository, private, exist_ok):
        if repository == "org/theirs":
            raise OSError("403 Forbidden")
        if repository == "org/far":
            raise Unreachable("[Errno -2] Name or service not known")
        self.calls.append(("create", repository, private, exist_ok))
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("upload", repo_id, str(folder_path)))


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Fake:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = Fake(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    hub.fetched.cache_clear()
    yield made
    hub.fetched.cache_clear()


def test_a_model_is_fetched_once_by_its_name(fake):
    shape = read_shape("hf:org/small")
    assert (shape.layers, shape.head_dim, shape.qk_norm) == (2, 128, True)
    assert hub.place("hf:org/small") == fake.root
    assert fake.calls == [("org/small", *hub.FILES)]


def test_a_directory_comes_before_a_name(fake, monkeypatch):
    (fake.root / "org/small").mkdir(parents=True)
    monkeypatch.chdir(fake.root)
    assert str(hub.place("hf:org/small")) == "org/small"
    assert not fake.calls


def test_what_the_hub_does_not_give_is_told_how_to_get(fake):
    said = r"hf:org/gated is no directory here.*401 Client Error.*`hf download org/gated"
    with pytest.raises(InputError, match=said):
        read_shape("hf:org/gated")


def test_without_the_package_the_command_is_said(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = "pip install huggingface_hub; or `hf download org/small --local-dir DIR`, and give hf:DIR"
    with pytest.raises(InputError, match=said):
        read_shape("hf:org/small")
    with pytest.raises(InputError, match="--push needs.*`hf upload org/mine"):
        export.main(["nowhere", str(fake.root / "new"), "--push", "org/mine"])


def test_a_directory_is_pushed_to_a_private_repository(fake):
    assert hub.push(fake.root, "org/mine") == "https://hub/org/mine"
    assert fake.calls == [
        ("create", "org/mine", True, True),
        ("upload", "org/mine", str(fake.root)),
    ]


def test_a_push_that_is_refused_says_that_the_directory_is_there(fake):
    with pytest.raises(InputError, match="is written, but the Hub does not take.*403"):
        hub.push(fake.root, "org/theirs")


def test_without_a_network_there_is_one_sentence(fake):
    """The package lets through what its HTTP client raises."""
    with pytest.raises(InputError, match="hf:org/far is no directory here.*Name or service not known"):
        hub.place("hf:org/far")
    said = "is written, but.*Name or service not known.*`hf upload org/far .*tries again"
    with pytest.raises(InputError, match=said):
        hub.push(fake.root, "org/far")


def test_a_name_that_is_none_is_refused_before_anything_is_done(fake):
    with pytest.raises(InputError, match="--push is mine; allowed is ORG/NAME"):
        export.main(["nowhere", str(fake.root / "new"), "--push", "mine"])
