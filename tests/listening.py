"""An application that listens on a port of its own, in a thread."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import uvicorn


class Listening:
    """Serves `app` until `end`. The port is held from the moment that it is found, so that nobody else can take it in between."""

    def __init__(self, app: Any) -> None:
        held = socket.socket()
        held.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{held.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=([held],), daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "it ended before it listened"
            time.sleep(0.02)

    def open(self, path: str, body: Any = None, key: str | None = None, **headers: str) -> Any:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        more = {"Authorization": f"Bearer {key}"} if key else {}
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, more | headers), timeout=60)

    def ask(self, path: str, body: Any = None, key: str | None = None, **headers: str) -> tuple[int, Any]:
        """(status, what was answered: of JSON where it is an object)."""
        try:
            with self.open(path, body, key, **headers) as answer:
                text, code = answer.read().decode(), answer.status
        except urllib.error.HTTPError as e:
            text, code = e.read().decode(), e.code
        return code, json.loads(text) if text.startswith("{") else text

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
