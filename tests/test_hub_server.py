"""The Hub by its real package, huggingface_hub, against a server here that speaks its endpoints."""
import base64
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest
from conftest import environment

from lib.config import ROOT

pytest.importorskip("huggingface_hub")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

REVISION = "0123456789" * 4
# What the process does that has the package; a mistake is its sentence.
SCRIPT = """
import json, sys
from pathlib import Path
from lib import hub
from lib.any_text import any_text, survey
from lib.errors import InputError
from lib.keys import files_key

def said(function, *given):
    try:
        return function(*given)
    except InputError as error:
        return str(error)

def texts(path):
    return [document.text for document in any_text(path)]

def key(path):
    import huggingface_hub
    huggingface_hub.HfFileSystem.clear_instance_cache()
    return files_key(path)

def listed(name):
    return sorted(file.name for file in hub.place(name).iterdir())

path = "hf://datasets/org/name"
found = dict(
    lines=said(texts, path + "/data/*.jsonl"),
    table=said(texts, path + "/more/*.parquet"),
    bytes=survey(path + "/data/*.jsonl").bytes,
    keys=[key(path + "/data/*.jsonl") for _ in range(2)],
    gone=said(texts, "hf://datasets/org/gone/*.jsonl"),
    model=said(listed, "hf:org/small"),
    no_model=said(listed, "hf:org/gone"),
    pushed=said(hub.push, Path(sys.argv[1]), "me/mine"),
    refused=said(hub.push, Path(sys.argv[1]), "org/theirs"),
)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers of the Hub, of the repositories in `server.held`: {(kind, name): {path: content}}."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def reply(self, content, code: int = 200, **headers: str):
        """Send bytes, or what JSON can hold."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self):
        """Any request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlparse(self.path)
        path = unquote(url.path).strip("/").split("/")
        if path == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif path[0] == "api" and path[1] in ("models", "datasets"):
            self.describe(path[1], "/".join(path[2:4]), path[4:], body, "recursive=true" in url.query)
        elif "resolve" in path:
            kind = path.pop(0) if path[0] == "datasets" else "models"
            self.give(self.server.held.get((kind, "/".join(path[:2])), {}), "/".join(path[4:]))
        else:
            self.reply({"error": "unknown"}, 404)

    do_GET = do_HEAD = do_POST = answer

    def create(self, asked: dict):
        """A new repository of `me`; of others none."""
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "me":
            return self.reply({"error": "You may not"}, 403)
        self.server.held[("models", name)] = {}
        self.server.created.append(asked)
        self.reply({"url": f"{self.server.address}/{name}"})

    def describe(self, kind: str, name: str, rest: list[str], body: bytes, deep: bool):
        """A repository, a listing of it, or what is to be committed to it."""
        held = self.server.held.get((kind, name))
        if held is None:
            self.reply({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        elif rest[:1] == ["tree"]:
            self.list(held, "/".join([*rest[2:], ""]), deep)
        elif rest[:1] == ["preupload"]:
            files = [dict(path=file["path"], uploadMode="regular", shouldIgnore=False)
                     for file in json.loads(body)["files"]]
            self.reply({"files": files})
        elif rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(dict(commitUrl=f"{self.server.address}/{name}/commit/{REVISION}",
                            commitOid=REVISION))
        else:
            siblings = [{"rfilename": file} for file in held]
            self.reply(dict(id=name, sha=REVISION, private=False, siblings=siblings, tags=[]))

    def list(self, held: dict, below: str, deep: bool):
        """Files and directories below a directory."""
        out = {}
        for file, content in held.items():
            if not file.startswith(below):
                continue
            first, _, more = file[len(below):].partition("/")
            if more:
                out[below + first] = dict(type="directory", path=below + first, oid="0" * 40)
            if deep or not more:
                oid = hashlib.sha1(content).hexdigest()
                out[file] = dict(type="file", path=file, size=len(content), oid=oid)
        if not out:
            return self.reply({"error": "Not found"}, 404, X_Error_Code="EntryNotFound")
        self.reply(list(out.values()))

    def give(self, held: dict, file: str):
        """A file, or the part of it that is asked for."""
        if file not in held:
            return self.reply(b"", 404, X_Error_Code="EntryNotFound")
        content, code = held[file], 200
        own = dict(ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=REVISION)
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            whole, content = len(content), content[int(first):int(last or len(content)) + 1]
            own["Content_Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
            code = 206
        self.reply(content, code, **own)


TEXTS = [f"text {i}" for i in range(5)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(the server, what a process found there)."""
    here = tmp_path_factory.mktemp("hub")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    pq.write_table(pa.table({"text": TEXTS}), here / "a.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.created = []
    server.held = {
        ("datasets", "org/name"): {
            "README.md": b"about it",
            "data/0.jsonl": lines,
            "data/1.jsonl": lines,
            "more/0.parquet": (here / "a.parquet").read_bytes(),
        },
        ("models", "org/small"): {
            "config.json": b"{}", "model.safetensors": b"x", "pytorch_model.bin": b"y", "README.md": b"z"},
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (here / "mine").mkdir()
    (here / "mine/config.json").write_text('{"a": 1}')
    own = environment(HF_ENDPOINT=server.address, HF_HOME=str(here / "home"), HF_TOKEN="hf_none",
                      HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    done = subprocess.run([sys.executable, "-c", SCRIPT, here / "mine"], cwd=ROOT, env=own,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    yield server, json.loads(done.stdout)
    server.shutdown()
    server.server_close()


def test_a_data_set_of_the_hub_is_read_by_a_pattern(hub):
    _, found = hub
    assert found["lines"] == TEXTS * 2 and found["table"] == TEXTS
    assert found["bytes"] == 2 * sum(len(json.dumps({"text": text})) + 1 for text in TEXTS)
    first, again = found["keys"]  # a cache that is built of it is found again
    assert first == again and [name for name, _ in first] == ["0.jsonl", "1.jsonl"]
    assert "'hf://datasets/org/gone/*.jsonl' cannot be read" in found["gone"]


def test_of_a_model_of_the_hub_what_is_read_here_is_fetched(hub):
    _, found = hub
    assert found["model"] == ["config.json", "model.safetensors"]
    assert "hf:org/gone is no directory here, and the Hub does not give it" in found["no_model"]
    assert "`hf download org/gone --local-dir DIR`" in found["no_model"]


def test_a_directory_becomes_a_private_repository(hub):
    server, found = hub
    assert found["pushed"] == f"{server.address}/me/mine"
    assert server.held[("models", "me/mine")] == {"config.json": b'{"a": 1}'}
    (created,) = server.created
    assert created.get("visibility") == "private" or created.get("private")
    assert "the Hub does not take it as org/theirs" in found["refused"]
