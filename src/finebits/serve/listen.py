"""Where a server listens, and how it ends: it is asked to stop, answers what is in, and that is no failure."""

from __future__ import annotations

import os
import socket
from typing import Any

from finebits.errors import Failed, WrongUse


def free(host: str, port: int) -> None:
    """Raise WrongUse where nobody can listen: looked at before a model is loaded for it.

    >>> with socket.create_server(("127.0.0.1", 0)) as taken:
    ...     try:
    ...         free(*taken.getsockname())
    ...     except WrongUse as e:
    ...         print(str(e).replace(str(taken.getsockname()[1]), "8765"))
    127.0.0.1:8765 cannot be listened at (Address already in use): name another --port, or another --host
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as asked:
            if os.name == "posix":  # as servers ask for it, so that the last one's connections are no hindrance
                asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asked.bind(place)
    except OSError as e:
        raise WrongUse(f"{host}:{port} cannot be listened at ({e.strerror or e}): name another --port, or another --host") from None


def until_stopped(app: Any, host: str, port: int, **more: Any) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises WrongUse as `free` does, and Failed where the server could not start."""
    import uvicorn

    free(host, port)
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False, **more)
    except KeyboardInterrupt:  # which uvicorn passes on once it has ended
        pass
    except SystemExit:  # its way to say so
        raise Failed(f"the server at {host}:{port} could not start: what it said stands above") from None
