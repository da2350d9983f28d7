"""The clients of a federation over one model in memory: of each, only adapters are put in and taken out, whatever the base is held in.

A federation's folder holds all that any of its processes needs: job.json (how, and whose rows are whose), rows.safetensors, the recipe, and the
started model. A client trains with the plain loop, a fresh optimizer every round, and the rates that its steps of all rounds come to.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from finebits import registry
from finebits.adapters._frozen import Frozen
from finebits.adapters.base import of_rank
from finebits.adapters.lora import LoRA
from finebits.build import Adapted, built, generator, hosts
from finebits.data import arrays
from finebits.errors import Invalid
from finebits.federate._privacy import Privacy
from finebits.federate._rounds import Federation, Round, seed_of
from finebits.federate.base import NONE, Sent, Server, Tensors
from finebits.files import read_json, write_text
from finebits.interop.hf import load
from finebits.optim._shell import made
from finebits.optim.base import Optimizer, named
from finebits.recipe import Recipe
from finebits.runfolder import RECIPE
from finebits.tasks import base as tasks
from finebits.train import epochs, number_of, train

SCHEMA = "finebits.federation/1"
JOB, ROWS, START = "job.json", "rows.safetensors", "start"
APP = """[project]
name = "finebits-federation"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "finebits"

[tool.flwr.app.components]
serverapp = "finebits_app:server"
clientapp = "finebits_app:client"

[tool.flwr.app.config]
folder = {folder}
"""
OVER = "rounds"  # the adapter that holds the residual of the rounds


def job_of(folder: Path) -> dict[str, Any]:
    """job.json of a federation's folder. Raises Invalid where there is none."""
    job = read_json(folder / JOB, most=1 << 28)
    if job.get("schema") != SCHEMA:
        raise Invalid(f"{folder / JOB} is not of schema {SCHEMA}: run finebits federate, which writes it")
    return job


def federation_of(job: Mapping[str, Any]) -> Federation:
    """The federation that a job says."""
    aggregator = registry.from_json("federate", job["aggregator"])
    privacy = None if job["privacy"] is None else Privacy(*job["privacy"])
    return Federation(aggregator, job["clients"], job["seed"], job["fraction"], job["dropout"], privacy)


def write_app(folder: Path) -> Path:
    """The federation's folder as an app of Flower, for `flwr run` on nodes that are started for it (finebits.interop.flower); its folder."""
    app = folder / "app"
    app.mkdir(exist_ok=True)
    write_text(app / "finebits_app.py", "from finebits.interop import flower\n\nserver = flower.server\nclient = flower.client\n")
    about = APP.format(folder=json.dumps(str(folder.resolve())))
    write_text(app / "pyproject.toml", about)
    return app


class Clients:
    """All clients of a federation's folder, on one model: called, one of them trains."""

    def __init__(self, folder: Path) -> None:
        self.job = job_of(folder)
        self.federation = federation_of(self.job)
        self.rows = arrays.load(folder.parent / ROWS)[0]["train"]
        self.recipe = Recipe.load(folder.parent / RECIPE)
        self.model, self.processor = load(folder / START)
        self.task = tasks.of(self.model)
        self.hosts: dict[str, Adapted] = {name: host for name, host in hosts(self.model) if "default" in host.kinds}
        self.kinds = {name: host.kinds["default"] for name, host in self.hosts.items()}
        first: Any = next(iter(self.kinds.values()))
        self.rank, self.scale = first.rank, first.s
        sends = self.federation.aggregator.sends
        held = {name: {k: t.detach().clone() for k, t in host.tensors("default").items()} for name, host in self.hosts.items()}
        self.still = {name: {k: t for k, t in p.items() if k not in sends} for name, p in held.items()}
        self.born: Tensors = {name: {k: t for k, t in p.items() if k in sends} for name, p in held.items()}

    def begun(self) -> Round:
        """Before the first round: every client starts from what the plan has started."""
        return Round(0, Server(self.born), tuple(self.job["ranks"]))

    @property
    def once(self) -> int:
        """Bytes of frozen factors that every client is sent before the first round, unless it draws them from the seed."""
        drawn = self.federation.aggregator.adapter == "lora_fa"  # A is uniform, from a seed
        return 0 if drawn else sum(t.numel() * t.element_size() for p in self.still.values() for t in p.values())

    def put(self, server: Server, rank: int, tensors: Tensors | None = None, seed: int = 0) -> None:
        """The model as this server and adapters of this rank have it; without tensors, with new adapters that `seed` draws."""
        tensors = server.tensors if tensors is None else tensors
        for name, host in self.hosts.items():
            for key in ("default", OVER):
                if key in host.kinds:
                    host.remove(key)
            over = server.residual.get(name)
            if over is not None:
                k = over["A"].shape[0]
                host.add(OVER, Frozen(LoRA(rank=k, alpha=float(k))), generator(0, name), dict(over))
            kind = self.kinds[name] if rank == self.kinds[name].rank else of_rank(self.kinds[name], rank)
            host.add("default", kind, generator(seed, name), self.still[name] | {k: t.clone() for k, t in tensors.get(name, {}).items()})

    def trained(self) -> Tensors:
        """What a client has to send: its tensors as they are now."""
        sends = self.federation.aggregator.sends
        return {
            name: {k: t.detach().clone() for k, t in host.tensors("default").items() if k in sends} for name, host in self.hosts.items()
        }

    def met(self, client: int, number: int) -> list[list[int]]:
        """The batches of a client in a round: its epochs go on from round to round, so that it has met all of its rows before any again."""
        t, own = self.job["training"], self.job["dealt"][client]
        lengths = [self.lengths[r] for r in own]
        size, passes = t["per_device_train_batch_size"], t["gradient_accumulation_steps"]
        count = number_of(len(own), size, passes, t["max_steps"], t["num_train_epochs"])
        batches = epochs(lengths, size, seed_of(self.federation.seed, "rows", client))
        return [[own[r] for r in batch] for batch in itertools.islice(batches, (number - 1) * count, number * count)]

    @cached_property
    def lengths(self) -> list[int]:
        return self.rows.lengths

    def __call__(self, federation: Federation, before: Round, client: int) -> Sent:
        """The client's part of the next round."""
        t, rank, plan = self.job["training"], before.ranks[client], built(self.model)
        assert plan is not None
        seed = seed_of(federation.seed, "client", before.number + 1, client)
        start = federation.start(before.server, rank)
        self.put(before.server, rank, start or NONE, seed)
        begun = self.trained()
        passes, batches = t["gradient_accumulation_steps"], self.met(client, before.number + 1)
        groups = [[self._batch(b, plan.plan.levers.rounding) for b in batches[i : i + passes]] for i in range(0, len(batches), passes)]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = made(_kind(t["optim"]), [{"params": trained, "weight_decay": t["weight_decay"]}], t["learning_rate"], seed=seed)
        if t["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of dropout
            train(
                self.model,
                groups,
                optimizer,
                total=len(groups),
                loss=lambda model, batch: self.task.loss(model, batch, self.job["loss_chunk"]),
                scheduler=_rates(t, optimizer, before.number * len(groups), self.job["rounds"] * len(groups)),
                rules=[*self.recipe.rule_values(), *federation.aggregator.rules()],
                clip=t["max_grad_norm"] or None,
            )
        self.model.eval()
        return Sent(federation.aggregator.kept(begun, self.trained()), len(self.job["dealt"][client]), self.scale)

    def _batch(self, rows: Sequence[int], multiple: int) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        batch = self.task.batch([vars(self.rows[r]) for r in rows], self.processor, multiple)
        return {k: v.to(device) for k, v in batch.items()}


def _kind(optim: Any) -> Optimizer:
    kind = registry.from_json("optim", optim) if isinstance(optim, dict) else named(optim)
    if kind.layerwise:
        raise Invalid(f"training.optim is {optim}, which moves weights within the backward pass; clients train adapters: take adamw")
    return kind


def _rates(t: Mapping[str, Any], optimizer: torch.optim.Optimizer, done: int, total: int) -> LambdaLR:
    """The schedule of a recipe over all steps of all rounds of a client, from where it stands."""
    warm = t["warmup_steps"]
    warm = math.ceil(warm * total) if warm < 1 else int(warm)
    whole: Any = get_scheduler(t["lr_scheduler_type"], optimizer, num_warmup_steps=warm, num_training_steps=total)
    at: Callable[[int], float] = whole.lr_lambdas[0]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    return LambdaLR(optimizer, lambda step: at(done + step))
