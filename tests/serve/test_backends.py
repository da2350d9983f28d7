"""Files and commands for other engines: what they read gives what the engine here gives, and programs are started, compared and ended."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_folders import lora

import finebits as fb
import tiny_llama as tiny
from finebits.cli._command import main
from finebits.errors import Failed, Invalid
from finebits.interop.from_peft import load_peft
from finebits.interop.handed import handed, verified
from finebits.interop.hf import load_planned
from finebits.serve.backends import BACKENDS, Asked, Written
from finebits.serve.comparing import Client, Row, _judged

VLLM, LLAMA = BACKENDS["vllm"], BACKENDS["llama.cpp"]
SEEDS = {"brief": (5, 2), "formal": (3, 1), "poems": (16, 3)}
SMALL = Asked(budget=64 << 20, batch=4)

FAKE = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
told = {told!r}
class Fake(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def _say(self, data):
        body = json.dumps(data).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_GET(self): self._say({{}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._say({{"choices": [{{"logprobs": {{"top_logprobs": [told]}}}}]}})
print("the fake has", sys.argv[1:], flush=True)
if "--broken" in sys.argv: sys.exit(3)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Fake).serve_forever()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("handed")
    tiny.worded(place / "llama", max_position_embeddings=256)
    for name, (rank, seed) in SEEDS.items():
        lora(place / "adapters" / name, rank, seed)
    lora(place / "adapters" / "wide", 32, 4)
    return place


def free() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def put(folder: Path, name: str, told: dict[str, float] | None = None) -> Path:
    """A fake program of this name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(FAKE.format(python=sys.executable, told=told or {"token_id:5": -0.1}))
    (folder / name).chmod(0o755)
    return folder


class Reading:
    """An engine that reads what was handed over with transformers and peft, over HTTP in vLLM's words."""

    def __init__(self, written: Written, deaf: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        self.models: dict[str, Any] = {written.name: AutoModelForCausalLM.from_pretrained(written.base)}
        from peft import PeftModel

        for name, path in written.adapters.items():
            base = AutoModelForCausalLM.from_pretrained(written.base)
            self.models[name] = base if deaf else PeftModel.from_pretrained(base, path)
        models = self.models

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with torch.no_grad():
                    logs = torch.log_softmax(models[asked["model"]](torch.tensor([asked["prompt"]])).logits[0, -1].float(), 0)
                top = logs.topk(asked["logprobs"])
                told = {f"token_id:{t}": p for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
                body = json.dumps({"choices": [{"logprobs": {"top_logprobs": [told]}}]}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def rows_of(monkeypatch: pytest.MonkeyPatch, place: Path, out: Path, deaf: bool) -> list[Row]:
    """What `verified` finds of an engine that was started elsewhere."""
    from finebits.interop import handed as module

    made = handed(place / "llama", "llama", place / "adapters", out, VLLM, SMALL, 16)
    engine = Reading(made.written, deaf)

    class There:
        def __init__(self, backend: Any, command: Any, written: Written, url: str, *rest: Any) -> None:
            self.client = Client(f"http://127.0.0.1:{engine.port}", backend, written)

        def __enter__(self) -> Any:
            return self.client

        def __exit__(self, *_: Any) -> None:
            engine.server.shutdown()
            engine.server.server_close()

    monkeypatch.setattr(module, "Running", There)
    monkeypatch.setattr(module, "program", lambda backend: "")
    return verified(place / "llama", made, place / "adapters", VLLM, SMALL, 16, out / "log")


@pytest.mark.parametrize("deaf", [False, True])
def test_files_give_what_the_engine_here_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Path, deaf: bool) -> None:
    rows = rows_of(monkeypatch, place, tmp_path / "out", deaf)
    assert [row.adapter for row in rows] == [None, "brief", "formal", "poems"]
    assert rows[0].distance < 1e-4 and rows[0].verdict == "ok"
    for row in rows[1:]:
        assert row.moves > 0.1
        assert (row.distance < 1e-3 and row.verdict == "ok") is not deaf and (row.verdict == "fail") is deaf


def test_what_is_written_for_vllm(tmp_path: Path, place: Path) -> None:
    said = list[str]()
    made = handed(place / "llama", "llama", place / "adapters", tmp_path / "out", VLLM, SMALL, 16, ("--dtype", "float32"), say=said.append)
    words = list(made.command.words)
    after = lambda option: words[words.index(option) + 1]  # noqa: E731
    assert words[:3] == ["vllm", "serve", str((place / "llama").resolve())] and words[-2:] == ["--dtype", "float32"]
    assert (after("--max-lora-rank"), after("--max-loras"), after("--max-cpu-loras")) == ("16", "3", "3")
    folder = Path(made.command.environment["VLLM_LORA_RESOLVER_CACHE_DIR"])
    assert folder == tmp_path.resolve() / "out" / "adapters" and sorted(p.name for p in folder.iterdir()) == sorted(SEEDS)
    sides = made.written.sides
    assert int(after("--kv-cache-memory-bytes")) == SMALL.budget - 3 * 2 * 16 * sides
    for name, (rank, _) in SEEDS.items():
        config = json.loads((folder / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == words[2]  # what the resolver compares
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"], config["rank_pattern"]) == (rank, rank, True, {})
    assert list(made.left_out) == ["wide"] and "rank 32" in said[0] and "rank 32" in made.left_out["wide"]
    script = (tmp_path / "out" / "serve.sh").read_text()
    assert made.command.line in script and str(tmp_path) in script and ".new" not in script
    with pytest.raises(Invalid, match="give --budget"):
        handed(place / "llama", "llama", place / "adapters", tmp_path / "small", VLLM, SMALL._replace(budget=9000), 16)
    assert not (tmp_path / "small").exists()
    with pytest.raises(Invalid, match="ranks up to 512"):
        handed(place / "llama", "llama", None, tmp_path / "more", VLLM, SMALL, 513)


def test_a_model_of_ours_is_written_densely_with_its_own_adapter(tmp_path: Path, place: Path) -> None:
    plan = tiny.plan(fb.LoRA(rank=4, alpha=8), fb.NF(4, block=32))
    model, tokenizer = load_planned(fb.Plan(plan.modules, model=str(place / "llama"), levers=plan.levers))
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    ids = torch.tensor([[5, 9, 11, 3]])
    with torch.no_grad():
        expected = model(ids).logits
    fb.save(model, tmp_path / "saved", tokenizer)
    made = handed(tmp_path / "saved", "saved", None, tmp_path / "out", VLLM, SMALL, 16)
    assert list(made.written.adapters) == ["tuned"] and made.written.base == (tmp_path / "out" / "base").resolve()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.written.base), made.written.adapters["tuned"])
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, expected, atol=1e-4)


def test_what_is_written_for_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    from finebits.export import _gguf as conversion

    monkeypatch.setattr(conversion, "tokens", lambda *_: None)  # of words, which GGUF has no kind for
    made = handed(place / "llama", "llama", place / "adapters", tmp_path / "out", LLAMA, SMALL, 16)
    words = list(made.command.words)
    files = words[words.index("--lora") + 1].split(",")
    assert words[:2] == ["llama-server", "--model"] and Path(words[2]).is_file()
    assert [Path(f).stem for f in files] == sorted(SEEDS) and all(Path(f).is_file() for f in files)
    assert words[words.index("--ctx-size") + 1] == str(SMALL.batch * 256) and "--lora-init-without-apply" in words
    plain, own = load_peft(Path(files[0]), str(place / "llama")), load_peft(place / "adapters" / "brief", str(place / "llama"))
    ids = torch.tensor([[5, 9, 11, 3]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, own(ids).logits, atol=1e-5)
    path, body = LLAMA.question(made.written, "formal", [1, 2])
    assert path == "/completion" and [one["scale"] for one in body["lora"]] == [0.0, 1.0, 0.0]
    assert LLAMA.answer({"completion_probabilities": [{"top_logprobs": [{"id": 4, "token": "x", "logprob": -0.5}]}]}) == {4: -0.5}


@pytest.fixture
def words(place: Path, tmp_path: Path) -> Iterator[list[str]]:
    yield ["serve", str(place / "llama"), "--adapters", str(place / "adapters"), "--out", str(tmp_path / "out"), "--backend", "vllm"]


def test_the_command_is_printed_and_says_where_the_program_is_missing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "vllm serve " in out and "--enable-lora" in out and "vllm is not installed here" in err
    assert main([*words, "--overwrite", "--verify"]) == 1
    assert "vllm is not installed here" in capsys.readouterr().err


def test_a_program_is_started_compared_and_ended(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free()
    monkeypatch.setenv("PATH", str(put(tmp_path / "bin", "vllm")))
    assert main([*words, "--format", "json", "--port", str(port), "--verify"]) == 6  # it says the same of all
    data = json.loads(capsys.readouterr().out)["data"]
    assert [row["verdict"] for row in data["verified"]] == ["fail"] * 4
    assert "--max-lora-rank" in (tmp_path / "out" / "engine.log").read_text()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1)
    assert main([*words, "--port", str(port), "--verify", "--", "--broken"]) == 1
    assert "ended with code 3 before it served: the fake has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--backend", "tgi"], "wants vllm or llama.cpp"),
        (["--backend", "vllm", "--keys", "k.yaml"], "--keys is of the engine here"),
        (["--backend", "vllm", "--host", "0.0.0.0"], "a proxy before it"),
        (["--backend", "vllm", "--start", "--verify"], "choose one"),
        (["--start"], "add --backend"),
    ],
)
def test_what_does_not_go_together(
    more: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k.yaml").write_text("{}")
    assert main(["serve", "m", *more]) == 2
    assert said in capsys.readouterr().err


def test_verdicts() -> None:
    verdicts = [
        _judged(*given, 0.05).verdict for given in ((None, 0.01, 0, 1), ("a", 0.01, 1.0, 1), ("a", 0.04, 0.06, 1), ("a", 0.01, 0.0, 1))
    ]
    assert verdicts == ["ok", "ok", "fail", "ok, but it hardly moves the base"]
    assert _judged("a", float("nan"), 1.0, 1, 0.05).verdict == "fail"
    assert issubclass(Failed, RuntimeError)
