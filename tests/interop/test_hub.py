"""Exports on the hub: huggingface_hub itself against a server on loopback that knows repositories, large files and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finebits import job
from finebits.interop import hub
from finebits.interop.hub import CannotPush
from finebits.run.stage import Stage
from test_runfolder import House

TOKEN = "hf_averysecrettoken"
PUSH = """
import json, sys
from pathlib import Path
from finebits.interop import hub
named = hub.check([sys.argv[2]], "me/tuned", True)
try:
    print(json.dumps(hub.push(Path(sys.argv[1]), sys.argv[2], named[sys.argv[2]], private=sys.argv[3] == "private")))
except hub.NotPushed as e:
    print(json.dumps({"error": str(e)}))
assert "torch" not in sys.modules
"""


class Hub(ThreadingHTTPServer):
    """Repositories by name: {path: content}; what was refused, and the tokens that came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.made: dict[str, bool] = {}
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.strange: list[str] = []
        self.refuses: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Asked(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, what: Any, code: int = 200) -> None:
        text = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2] and "Authorization" not in self.headers
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        self.server.strange.append(self.path)
        self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, path, body = self.server, self.path.partition("?")[0], self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if "organization" in asked else asked["name"]
            if hub.refuses is not None:
                return self.answer({"error": "no"}, hub.refuses)
            hub.made[name] = asked.get("private", asked.get("visibility") == "private")
            return self.answer({"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":  # of cards
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
        files = hub.repositories.setdefault(name, {})
        if "/preupload/" in path:
            mode = lambda f: "lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular"  # noqa: E731
            self.answer({"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [o | {"actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}} for o in json.loads(body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[line["value"]["path"]] = hub.large[line["value"]["oid"]]
            self.answer({"success": True, "commitOid": "c0ffee", "commitUrl": f"{hub.url}/{name}/commit/c0ffee"})
        else:
            hub.strange.append(path)
            self.answer({"error": "not found"}, 404)


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def exported(place: Path, adapter: bool = True) -> Path:
    files = {"finebits.json": "{}", "base/finebits.json": "{}", "base/config.json": "{}", "base/model.safetensors": "weights"}
    if adapter:
        files |= {
            "adapter_config.json": '{"base_model_name_or_path": "me/tuned-base"}',
            "adapter_model.safetensors": "update",
            "README.md": "card",
        }
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return place


def pushed(hub: Hub, folder: Path, target: str, privacy: str = "private") -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / ".."),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(Path(job.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PUSH, str(folder), target, privacy], env=env, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert hub.tokens <= {f"Bearer {TOKEN}"}
    assert not [f for f in folder.rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]
    return json.loads(done.stdout)


def test_an_adapter_and_its_base_are_a_repository_each(server: Hub, tmp_path: Path) -> None:
    told = pushed(server, exported(tmp_path / "adapter"), "adapter")
    assert told == {"repository": "me/tuned", "url": f"{server.url}/me/tuned", "commit": "c0ffee"}
    assert server.made == {"me/tuned-base": True, "me/tuned": True}  # both private
    own, base = server.repositories["me/tuned"], server.repositories["me/tuned-base"]
    assert base == {"config.json": b"{}", "model.safetensors": b"weights"}  # large files by content, and no record of this machine
    assert set(own) == {"adapter_config.json", "adapter_model.safetensors", "README.md"} and own["adapter_model.safetensors"] == b"update"
    assert json.loads(own["adapter_config.json"])["base_model_name_or_path"] in server.made
    assert not [path for path in server.strange if "finebits" in path]


def test_gguf_and_models_without_adapters_are_one(server: Hub, tmp_path: Path) -> None:
    folder = exported(tmp_path / "gguf")
    (folder / "base/model.gguf").write_text("blocks")
    pushed(server, folder, "gguf", "public")
    assert server.made == {"me/tuned": False} and {"base/model.gguf", "adapter_config.json"} <= set(server.repositories["me/tuned"])
    server.repositories.clear()
    pushed(server, exported(tmp_path / "gptq", adapter=False), "gptq")
    assert set(server.repositories["me/tuned"]) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(("code", "why"), [(401, "hf auth login"), (403, "may not write"), (500, "answered 500")])
def test_what_the_hub_refuses_is_told_in_a_sentence(server: Hub, tmp_path: Path, code: int, why: str) -> None:
    server.refuses = code
    assert why in pushed(server, exported(tmp_path / "merged", adapter=False), "merged")["error"]
    assert not server.repositories


def test_a_push_that_cannot_be_is_refused_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    assert hub.check(["adapter", "gguf:q8_0"], "me/m", True) == {"adapter": "me/m-adapter", "gguf:q8_0": "me/m-gguf-q8_0"}
    for given, why in (
        (([], "me/m", True), "name a target"),
        ((["merged"], "me/m", False), "was verified"),
        ((["merged"], "tuned", True), "NAME/MODEL"),
        ((["merged"], "me/a b", True), "no name of the hub"),
    ):
        with pytest.raises(CannotPush, match=why):
            hub.check(*given)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(CannotPush, match="hf auth login"):
        hub.check(["merged"], "me/m", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CannotPush, match="HF_HUB_OFFLINE"):
        hub.check(["merged"], "me/m", True)


def test_a_job_pushes_what_was_verified_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house, seen = House(tmp_path, monkeypatch), list[Any]()
    monkeypatch.setattr(hub, "check", lambda to, name, verified: seen.append((tuple(to), name, verified)) or hub.repositories(to, name))
    monkeypatch.setattr(hub, "push", lambda *given: seen.append(given) or {"url": "u"})
    recipe = house.recipe("export.to=[merged]", "export.push_to_hub=true", "export.hub_model_id=me/m")
    job.train(recipe)
    assert seen[:2] == [(("merged",), "me/m", True)] * 2  # before anything else, and before the export
    assert seen[2:] and all(g[1:] == ("merged", "me/m", True) for g in seen[2:])
    seen.clear()

    def fails(folder: Any, stage: Stage) -> None:
        raise RuntimeError("a verification failed")

    monkeypatch.setattr(job, "work", fails)
    with pytest.raises(RuntimeError):
        job.export(recipe)
    assert len(seen) == 1  # asked whether it could, and not pushed
