"""Flower as the engine of a federation: the same rounds, clients and aggregators, on its nodes.

    flower.server, flower.client      the apps of a Flower app's pyproject.toml; run-config `folder` is the folder of a federation
    flower.simulate(folder, …)        the same in Flower's simulation

A node is a client: number `partition-id` of its node-config. The server draws who takes part in a round, and tells the others; a node that
answers with an error, or not in time, has fallen out. Every message holds all that a client has to know, so that one that has missed rounds
is right in the next: with flora and fedex_lora that is the residual of all rounds, more than the news of the last that federated.json counts.
Numbers travel as float32, and come out as those of the loop in one process, to the bit.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # nobody asked for reports of who runs what

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict  # noqa: E402  # pyright: ignore[reportMissingImports]
from flwr.clientapp import ClientApp  # noqa: E402  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid, ServerApp  # noqa: E402  # pyright: ignore[reportMissingImports]
from flwr.serverapp.strategy import Strategy  # noqa: E402  # pyright: ignore[reportMissingImports]

from finebits.errors import Failed  # noqa: E402
from finebits.federate import _rounds as loop  # noqa: E402
from finebits.federate._rounds import Federation, Round  # noqa: E402
from finebits.federate.base import Sent, Server, Tensors  # noqa: E402
from finebits.interop.federated import Clients, federation_of, job_of  # noqa: E402

ROUNDS, NODES = "rounds", "flower"
WAIT = 600.0  # seconds for all nodes to be there
Each = Callable[[Round], None]


def record(**parts: Tensors) -> ArrayRecord:
    """Tensors by part, module and name."""
    flat = {f"{part}/{name}/{k}": Array(t.cpu().numpy()) for part, of in parts.items() for name, p in of.items() for k, t in p.items()}
    return ArrayRecord(flat)


def parts_of(arrays: ArrayRecord) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The inverse of `record`."""
    parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, array in arrays.items():
        part, name, k = key.split("/")
        parts.setdefault(part, {}).setdefault(name, {})[k] = torch.from_numpy(array.numpy().copy())
    return parts


class Rounds(Strategy):
    """The rounds of a federation as a strategy of Flower, whatever its aggregator. `each` is told of every round."""

    def __init__(self, federation: Federation, begun: Round, each: Each, wait: float = WAIT) -> None:
        self.federation, self.now, self.each, self.wait = federation.checked(begun.ranks), begun, each, wait

    def summary(self) -> None:
        """Nothing: the job says it."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        nodes, since = sorted(grid.get_node_ids()), time.monotonic()
        while len(nodes) < self.federation.clients:
            if time.monotonic() - since > self.wait:
                raise Failed(
                    f"{len(nodes)} of {self.federation.clients} nodes are there after {self.wait:.0f} s: start one for every client"
                )
            time.sleep(0.5)
            nodes = sorted(grid.get_node_ids())
        called = self.federation.participants(self.now.number + 1)
        said = ConfigRecord({"number": self.now.number, "ranks": list(self.now.ranks), "clients": called})
        content = RecordDict({"arrays": arrays, "config": said})
        return [Message(content, node, MessageType.TRAIN, group_id=str(self.now.number + 1)) for node in nodes]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        sent = {}
        for reply in replies:
            if reply.has_error() or "arrays" not in reply.content:
                continue
            about = reply.content["metrics"]
            sent[int(about["client"])] = Sent(
                parts_of(reply.content["arrays"])["tensors"], int(about["num-examples"]), float(about["scale"])
            )
        self.now = self.federation.aggregate(self.now, sent)
        self.each(self.now)
        server = self.now.server
        return record(tensors=server.tensors, residual=server.residual), MetricRecord({"clients": len(sent)})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None


def run(grid: Any, folder: Path, each: Each, at: str) -> Round:
    """The rounds that a federation's folder has still to come to, over a grid; those that it has are in its folder `at`."""
    job = job_of(folder)
    before = loop.load(folder / at)
    begun = Clients(folder).begun() if before is None else before[0]
    strategy = Rounds(federation_of(job), begun, each)
    arrays = record(tensors=begun.server.tensors, residual=begun.server.residual)
    if begun.number < job["rounds"]:
        strategy.start(grid, arrays, num_rounds=job["rounds"] - begun.number)
    return strategy.now


def server_app(folder: Path | None = None, each: Each | None = None) -> ServerApp:
    """The server of a federation's folder, which is run-config `folder` where none is given; without `each` it saves every
    round in `flower` there, and goes on from it."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        place = folder or Path(str(context.run_config["folder"]))
        run(grid, place, each or (lambda now: loop.save(now, place / NODES)), NODES if each is None else ROUNDS)

    return app


@functools.cache
def clients(folder: Path) -> Clients:
    """Those of a folder, over the model that this process has of it."""
    made = Clients(folder)
    torch.set_num_threads(made.job["threads"])
    return made


def client_app(folder: Path | None = None) -> ClientApp:
    """A client of a federation's folder."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        own = int(context.node_config["partition-id"])
        config = message.content["config"]
        if own not in config["clients"]:
            return Message(RecordDict({"metrics": MetricRecord({"client": own})}), reply_to=message)
        all_of = clients(folder or Path(str(context.run_config["folder"])))
        parts = parts_of(message.content["arrays"])
        server = Server(parts.get("tensors", {}), parts.get("residual", {}))
        sent = all_of(all_of.federation, Round(int(config["number"]), server, tuple(config["ranks"])), own)
        about = MetricRecord({"client": own, "num-examples": sent.examples, "scale": sent.scale})
        return Message(RecordDict({"arrays": record(tensors=sent.tensors), "metrics": about}), reply_to=message)

    return app


server, client = server_app(), client_app()


def simulate(folder: Path, each: Each) -> None:
    """The rounds of a federation's folder in Flower's simulation: a pool of processes, each with the model once. Raises what a round raised."""
    from flwr.simulation import run_simulation  # pyright: ignore[reportMissingImports]

    job = job_of(folder)
    done: list[int] = []

    def seen(now: Round) -> None:
        each(now)
        done.append(now.number)

    alone = {"client_resources": {"num_cpus": job["threads"], "num_gpus": 0.0}}
    run_simulation(server_app(folder, seen), client_app(folder), job["clients"], backend_config=alone)
    if not done or done[-1] < job["rounds"]:
        raise Failed(f"Flower's simulation ended after round {done[-1] if done else 0} of {job['rounds']}: its log above says why")
