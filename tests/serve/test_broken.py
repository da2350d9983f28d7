"""What breaks under a server: the thread that steps, the disk of its logs, the process itself."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from lora_folders import alone, factors, lora, merged

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

import tiny_llama as tiny  # noqa: E402
from finebits.errors import Failed  # noqa: E402
from finebits.interop.serving import based  # noqa: E402
from finebits.serve.engine import Engine, Limits  # noqa: E402
from finebits.serve.requests import Busy, Sampling  # noqa: E402
from finebits.serve.worker import Worker  # noqa: E402


def test_nobody_waits_for_a_worker_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(based(tiny.fresh()), Limits(1 << 20))
    step, died = engine.step, list[Any]()

    def breaks() -> bool:
        if engine.tokens > 2:
            raise SystemError("what no step may raise")
        return step()

    monkeypatch.setattr(engine, "step", breaks)
    monkeypatch.setattr("threading.excepthook", died.append)
    worker = Worker(engine)

    async def both() -> list[Exception]:
        found = list[Exception]()
        for wanted in (Failed, Busy):
            with pytest.raises(wanted) as raised:
                async for _ in await worker.answer([5, 6], Sampling(50), None, lambda ids: "x", ()):
                    pass
            found.append(raised.value)
        return found

    first, second = asyncio.run(both())
    assert "went down before this answer was over" in str(first) and "going down" in str(second)
    worker.close()
    assert not worker.alive and len(died) == 1 and engine.pool.free == engine.pool.count and not engine.hooks.hooked


def post(url: str, body: Any) -> Any:
    data = json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=120)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is /dev/full here")
def test_logs_on_a_full_disk_and_a_server_that_is_killed(tmp_path: Path) -> None:
    """It answers with nowhere to write; killed in the middle of an answer, it has told no end of it, and changed nothing on the disk."""
    tiny.worded(tmp_path / "llama", max_position_embeddings=256)
    lora(tmp_path / "adapters" / "a", 4, 1)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["serve", str(tmp_path / "llama"), "--adapters", str(tmp_path / "adapters"), "--port", str(port), "--budget", "4MiB"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([sys.executable, "-m", "finebits", *words], stdout=full, stderr=full)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "it ended before it served"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        body = {"model": "a", "prompt": [5, 7, 9], "temperature": 0, "max_tokens": 6}
        with post(f"{url}/v1/completions", body) as answer:
            text = json.load(answer)["choices"][0]["text"]
        ids = alone(merged(factors(4, 1), max_position_embeddings=256), [5, 7, 9], 6)
        assert text == " ".join(f"w{i}" for i in ids[: ids.index(0) if 0 in ids else None])
        with pytest.raises(urllib.error.HTTPError):
            post(f"{url}/v1/completions", body | {"model": "nobody"})
        more = {"max_tokens": 240, "stream": True, "temperature": 1.5, "seed": 1, "stop": ["never"]}
        with post(f"{url}/v1/completions", body | more) as answer:
            told = answer.readline()
            process.send_signal(signal.SIGKILL)
            try:
                told += answer.read()
            except (OSError, HTTPException) as e:
                told += getattr(e, "partial", b"")
        assert told.startswith(b"data: {") and b"[DONE]" not in told
    finally:
        process.kill()
        process.wait()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
