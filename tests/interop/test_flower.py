"""Flower as the engine: its simulation, and a SuperLink with SuperNodes, give the numbers of the loop in one process, to the bit.

They run where Flower is: make verify-flower.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is in an environment of its own: make verify-flower")

import federation  # noqa: E402
from finebits.federate import _rounds as loop  # noqa: E402
from finebits.federate._rounds import Round  # noqa: E402
from finebits.interop import flower  # noqa: E402
from finebits.interop.federated import Clients, write_app  # noqa: E402
from finebits.run import federated  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Flower's and Ray's own, of processes and sockets that they leave open
]
HOW = federated.How(("flora", "fed_sb"), clients=3, rounds=2, alpha=0.3, dropout=0.3, central=False)
HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = federation.recipe(tmp_path_factory.mktemp("flower"), **{"training.max_steps": 1})
    threads = torch.get_num_threads()
    federated.federate(recipe, HOW)
    assert torch.get_num_threads() == threads
    return Path(recipe.output_dir) / "federate"


def reached(folder: Path, name: str = "rounds") -> Round:
    now = loop.load(folder / name)
    assert now is not None
    return now[0]


def same(a: Round, b: Round) -> bool:
    parts = [(a.server.tensors, b.server.tensors), (a.server.residual, b.server.residual)]
    tensors = all(x.keys() == y.keys() and all(torch.equal(t, y[name][k]) for name, p in x.items() for k, t in p.items()) for x, y in parts)
    return tensors and a[0] == b[0] and a[2:] == b[2:]


@pytest.fixture
def begun(made: Path, tmp_path: Path) -> Iterator[Any]:
    """A federation's folder as it was before the first round."""

    @contextmanager
    def aside(name: str) -> Iterator[Path]:
        folder, kept = made / name, made / name / "kept"
        (folder / "rounds").rename(kept)
        try:
            yield folder
        finally:
            kept.rename(folder / "rounds")

    with ExitStack() as stack:
        yield lambda name: stack.enter_context(aside(name))


def test_records_hold_tensors_to_the_bit(made: Path) -> None:
    server = reached(made / "flora").server
    parts = flower.parts_of(flower.record(residual=server.residual))
    assert all(torch.equal(t, server.residual[name][k]) for name, p in parts["residual"].items() for k, t in p.items())


@pytest.mark.parametrize("name", ["flora", "fed_sb"])
def test_the_simulation_gives_the_same_numbers(made: Path, begun: Any, name: str) -> None:
    expected, seen = reached(made / name), list[Round]()
    flower.simulate(begun(name), seen.append)
    assert [r.number for r in seen] == [1, 2] and same(seen[-1], expected)


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_superlink_and_its_supernodes_give_the_same_numbers(made: Path, begun: Any, tmp_path: Path) -> None:
    """A SuperLink and a SuperNode for every client, over loopback."""
    expected, folder = reached(made / "fed_sb"), begun("fed_sb")
    where, home, at = Path(sys.executable).parent, tmp_path / "home", port()
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{at}"\ninsecure = true\n')
    path = os.pathsep.join([str(HERE / "src"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env |= {"PATH": os.pathsep.join([str(where), env["PATH"]])}
    processes = []

    def start(name: str, *words: str) -> None:
        log = (tmp_path / f"{name}-{len(processes)}.log").open("w")
        processes.append(subprocess.Popen([where / name, *words], env=env, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True))

    try:
        start("flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(at))
        for client in range(HOW.clients):
            own = ("--node-config", f"partition-id={client}", "--host", "127.0.0.1", "--port", str(port()))
            start("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{at}", *own)
        until = time.monotonic() + 540
        told = ""
        while time.monotonic() < until and not (folder / "flower").exists():
            done = subprocess.run([where / "flwr", "run", write_app(folder), "here"], env=env, capture_output=True, text=True, timeout=120)
            told = done.stdout + done.stderr
            assert "Invalid" not in told, told
            if done.returncode == 0:
                break
            time.sleep(2)  # the SuperLink is not there yet
        while time.monotonic() < until:
            now = loop.load(folder / "flower")
            if now is not None and now[0].number == HOW.rounds:
                break
            time.sleep(1)
        logs = "\n".join(f"{p.name}\n{p.read_text()[-3000:]}" for p in sorted(tmp_path.glob("*.log")))
        assert (folder / "flower").exists(), told + logs
        assert same(reached(folder, "flower"), expected)
    finally:
        for process in reversed(processes):  # with the processes of apps that each has started
            os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_node_that_fails_has_fallen_out(made: Path) -> None:
    class Reply:
        def __init__(self, content: Any) -> None:
            self.content = content

        def has_error(self) -> bool:
            return self.content is None

    clients = Clients(made / "fed_sb")
    begun, seen = clients.begun(), list[Round]()
    strategy = flower.Rounds(clients.federation, begun, seen.append)
    strategy.aggregate_train(1, [Reply(None), Reply({"metrics": {"client": 1}})])
    assert seen[0].number == 1 and seen[0].sent == () and seen[0].server is begun.server
