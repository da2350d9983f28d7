"""An application that listens on a port of its own, in a thread."""

from __future__ import annotations

import socket
import threading
import time
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

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
