"""A server that is asked to stop has ended well; one that cannot listen says so, and with the code of bad usage."""

from __future__ import annotations

import socket
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")
from finebits.errors import Failed, WrongUse  # noqa: E402
from finebits.serve.listen import free, until_stopped  # noqa: E402


def test_a_port_in_use_is_bad_usage() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for ask in (free, lambda host, port: until_stopped(None, host, port)):
            with pytest.raises(WrongUse, match=r"127.0.0.1:\d+ cannot be listened at \(Address already in use\)") as caught:
                ask(*taken.getsockname())
            assert caught.value.code == 2
    with pytest.raises(WrongUse, match="nowhere.invalid:80 cannot be listened at"):
        free("nowhere.invalid", 80)


@pytest.mark.parametrize(("ends", "fails"), [(KeyboardInterrupt(), False), (None, False), (SystemExit(3), True)])
def test_how_a_server_ends(monkeypatch: pytest.MonkeyPatch, ends: BaseException | None, fails: bool) -> None:
    """uvicorn leaves with 3 where it could not start, which is the code of what does not fit the budget."""

    def run(app: Any, **given: Any) -> None:
        if ends is not None:
            raise ends

    monkeypatch.setattr(uvicorn, "run", run)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    if not fails:
        return until_stopped(None, "127.0.0.1", port)
    with pytest.raises(Failed, match="could not start"):
        until_stopped(None, "127.0.0.1", port)
