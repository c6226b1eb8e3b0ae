"""Downloads from a Hub that runs here: what arrives, what resumes, what is said when not."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import numpy as np
import pytest
import safetensors.numpy

from mlx_flash import hub
from mlx_flash.errors import CheckpointError, FlashError, ModelNotFoundError
from mlx_flash.hub import DownloadError, resolve
from mlx_flash.streaming.checkpoint import Checkpoint

ROOT = Path(hub.__file__).parent
REPO = "owner/tiny-moe"
SHARD = "model-00002-of-00002.safetensors"
MAIN, OTHER = "a" * 40, "b" * 40
CUT = 11 << 20  # huggingface_hub writes pieces of 10 MiB: less than that leaves nothing to resume

# The package's own door would import MLX and transformers, which a download does not need.
CALL = f"""
import sys, types
sys.modules["mlx_flash"] = package = types.ModuleType("mlx_flash")
package.__path__ = [{str(ROOT)!r}]
from mlx_flash.errors import FlashError
from mlx_flash.hub import resolve
try:
    print(resolve(*sys.argv[1:]), end="")
except FlashError as error:
    print(type(error).__name__, error, sep="|", end="")
"""


def checkpoint_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    first = {"experts": rng.standard_normal((4, 8)).astype(np.float32)}
    second = {"embed": rng.integers(0, 2**32, (3, 1 << 20), np.uint32)}
    shards = {"model-00001-of-00002.safetensors": first, SHARD: second}
    names = {name: shard for shard, tensors in shards.items() for name in tensors}
    return {
        "config.json": b'{"model_type": "tiny"}',
        "model.safetensors.index.json": json.dumps({"weight_map": names}).encode(),
        **{shard: safetensors.numpy.save(tensors) for shard, tensors in shards.items()},
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"not needed",
        "pytorch_model.bin": b"not needed either",
    }


FILES = checkpoint_files()
WANTED = FILES.keys() - {"README.md", "pytorch_model.bin"}


@dataclass
class Served:
    """What a hub has, how it fails, and the bytes of each file that it sent so far."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=lambda: {"main": MAIN, "v2": OTHER})
    cut: dict[str, int] = field(default_factory=dict)  # drop the connection after so many bytes
    status: dict[str, int] = field(default_factory=dict)  # of a repository or a file
    resumable: bool = True
    sent: dict[str, list[int]] = field(default_factory=dict)


class HubRequest(BaseHTTPRequestHandler):
    """As much of the Hub's API as a snapshot needs."""

    protocol_version = "HTTP/1.1"
    served: Served

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(rf"/api/models/{REPO}(?:/(revision|tree)/(.+))?", path):
            self.answer_api(match[1], match[2] or "main")
        elif match := re.fullmatch(rf"/{REPO}/resolve/(.+?)/(.+)", path):
            self.answer_file(self.served.commits[match[1]], match[1], match[2])
        else:
            self.refuse(401, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def answer_api(self, kind: str | None, revision: str) -> None:
        commit = self.served.branches.get(revision, revision)
        if REPO in self.served.status:
            self.refuse(self.served.status[REPO], "GatedRepo")
        elif commit not in self.served.commits:
            self.refuse(404, "RevisionNotFound")
        elif kind == "tree":
            files = self.served.commits[commit].items()
            rows = [{"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in files]
            self.say(200, json.dumps(rows).encode())
        else:
            self.say(200, json.dumps({"id": REPO, "sha": commit, "siblings": []}).encode())

    def answer_file(self, files: dict[str, bytes], commit: str, name: str) -> None:
        content = files[name]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and name in self.served.status:
            return self.refuse(self.served.status[name], "")
        start = int(asked[1]) if asked else 0
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.say(206 if asked else 200, content[start:], headers, name)

    def say(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, name: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.served.cut.pop(name, None)
        self.served.sent.setdefault(name, []).append(len(body[:cut]))
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.say(status, b"", {"X-Error-Code": code} if code else {})

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served() -> Served:
    other = {"config.json": b'{"model_type": "other"}'}
    return Served({MAIN: FILES, OTHER: {**FILES, **other}})


@pytest.fixture
def endpoint(served: Served) -> Iterator[str]:
    request = type("Request", (HubRequest,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), request)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def call(endpoint: str, home: Path, *args: str) -> str:
    """Print of ``resolve`` in a process of its own: Hub settings are read at import."""
    mine = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    hidden = ("HF_", "HUGGING", "HTTP", "ALL_PROXY", "TQDM")
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(hidden)}
    command = [sys.executable, "-W", "ignore", "-c", CALL, *args]
    done = subprocess.run(
        command, env={**kept, **mine}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(endpoint: str, home: Path, *args: str) -> tuple[str, str]:
    """Type and message of the error: one line that names what was asked for."""
    kind, _, message = call(endpoint, home, *args).partition("|")
    assert message and args[0] in message and len(message.splitlines()) == 1
    return kind, message


# What arrives


def test_download_by_name_then_from_the_cache(
    tmp_path: Path, endpoint: str, served: Served
) -> None:
    folder = Path(call(endpoint, tmp_path, REPO))
    assert folder.is_relative_to(tmp_path) and folder.name == MAIN
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in WANTED
    }
    assert set(Checkpoint(folder)) == {"experts", "embed"}
    assert served.sent.keys() - {""} == WANTED
    served.sent.clear()
    assert call(endpoint, tmp_path, REPO) == str(folder)
    assert served.sent.keys() <= {""}  # no file again
    assert call("http://127.0.0.1:9", tmp_path, REPO) == str(folder)  # nor any connection


@pytest.mark.parametrize("revision", ["v2", OTHER])
def test_revision(tmp_path: Path, endpoint: str, revision: str) -> None:
    folder = Path(call(endpoint, tmp_path, REPO, revision))
    assert folder.name == OTHER
    assert (folder / "config.json").read_bytes() == b'{"model_type": "other"}'


# What does not


def test_unknown_revision(tmp_path: Path, endpoint: str) -> None:
    kind, message = refusal(endpoint, tmp_path, REPO, "v3")
    assert kind == "ModelNotFoundError"
    assert "no revision 'v3'. Leave --revision out for its main branch" in message


def test_unknown_repository(tmp_path: Path, endpoint: str) -> None:
    kind, message = refusal(endpoint, tmp_path, "owner/nothing")
    assert kind == "ModelNotFoundError"
    assert "neither a folder here nor a repository on the Hub" in message
    assert "hf auth login" in message


def test_gated_repository(tmp_path: Path, endpoint: str, served: Served) -> None:
    served.status[REPO] = 403
    kind, message = refusal(endpoint, tmp_path, REPO)
    assert kind == "ModelNotFoundError"
    assert "is gated: accept its licence on the Hub, then run `hf auth login`" in message


def test_unreachable_hub(tmp_path: Path) -> None:
    kind, message = refusal("http://127.0.0.1:9", tmp_path, REPO)
    assert kind == "ModelNotFoundError"
    assert "the Hub cannot be reached. Check the path or the connection" in message


def test_a_dropped_connection_is_resumed(tmp_path: Path, endpoint: str, served: Served) -> None:
    served.cut[SHARD] = CUT
    folder = Path(call(endpoint, tmp_path, REPO))
    assert (folder / SHARD).read_bytes() == FILES[SHARD]
    assert served.sent[SHARD] == [CUT, len(FILES[SHARD]) - (10 << 20)]


def test_a_hub_that_fails_on_the_way(tmp_path: Path, endpoint: str, served: Served) -> None:
    served.cut[SHARD] = CUT
    served.status[SHARD] = 500
    kind, message = refusal(endpoint, tmp_path, REPO)
    assert kind == "DownloadError"
    assert "the download stopped" in message and "500" in message
    assert "Run the same command again: whole files are kept" in message
    whole = {name for name, sent in served.sent.items() if name and name != SHARD}
    served.sent.clear()
    served.status.clear()
    folder = Path(call(endpoint, tmp_path, REPO))
    assert {path.name for path in folder.iterdir()} == WANTED
    assert (folder / SHARD).read_bytes() == FILES[SHARD]
    assert not whole & served.sent.keys()
    assert served.sent[SHARD] == [len(FILES[SHARD])]


def test_no_space_left(tmp_path: Path, endpoint: str, served: Served) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT TESTED: no small file system can be mounted here ({error})")
    try:
        kind, message = refusal(endpoint, tmp_path, REPO)
        assert kind == "DownloadError"
        assert "no space left" in message and "Free some, or point HF_HOME at a larger" in message
        grow = ["mount", "-o", "remount,size=64m", str(tmp_path)]
        subprocess.run(grow, check=True, capture_output=True)
        folder = Path(call(endpoint, tmp_path, REPO))
        assert (folder / SHARD).read_bytes() == FILES[SHARD]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


FAULTS = {
    "disk full, said by the Hub's downloader in Rust": (
        RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"),
        "no space left",
    ),
    "quota": (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "no space left"),
    "disk fault": (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
    "connection lost": (httpx2.ReadError("peer reset"), "stopped (peer reset)"),
    "silence": (httpx2.ReadTimeout(""), "stopped (ReadTimeout)"),
    "two lines": (OSError("Consistency check failed.\nUsual."), "(Consistency check failed)"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_that_stop_a_download(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    fault, expected = FAULTS[kind]

    def fail(*args: object, **kwargs: object) -> str:
        raise fault

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(DownloadError) as caught:
        resolve(REPO)
    message = str(caught.value)
    assert message.startswith(f"{REPO}: ") and expected in message
    assert "same command again: whole files are kept" in message
    assert len(message.splitlines()) == 1 and caught.value.__cause__ is fault
    assert isinstance(caught.value, OSError) and not isinstance(caught.value, CheckpointError)


# What is no repository


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path), revision="ignored") == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("owner/name") == Path("owner/name")  # before any repository of that name
    assert resolve("~/owner") == tmp_path / "owner"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"is a file\. Pass the model's folder"):
        resolve(tmp_path / "model.gguf")


NAMES = [
    "nowhere",
    "a/b/c",
    "../nowhere",
    "no spaces/here",
    "owner/name?",
    "~no-such-user/model",
    "x" * 5000,
]
NAMES += ["zero\0byte", "owner/", "/owner/name", "a--b/c", "owner/name.git", "o/" + "n" * 100]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_neither_a_folder_nor_a_name(name: str) -> None:
    with pytest.raises(FlashError) as caught:
        resolve(name)
    message = str(caught.value)
    assert type(caught.value) is ModelNotFoundError
    assert message.startswith(name) and "Check the path, or name a Hub repository as" in message
