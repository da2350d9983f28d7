"""A federation out of a recipe: its plan for every aggregator, rows dealt to clients, rounds in this process, scores after each of them, next to
central training; federated.json and federated.svg."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finebits import registry
from finebits.errors import Invalid
from finebits.federate import _privacy as privacy
from finebits.federate import _rounds as loop
from finebits.federate._skew import dirichlet
from finebits.federate.base import Aggregator
from finebits.files import ours, write_json, write_text
from finebits.plan.base import Plan
from finebits.progress import Progress
from finebits.recipe import Recipe
from finebits.run.material import Material, gated
from finebits.run.plans import priced
from finebits.run.source import Source
from finebits.run.stage import recorded
from finebits.run.tune import arguments_of
from finebits.runfolder import HEAD, MODEL, RECIPE, RunFolder, digest

SCHEMA = "finebits.federated/1"
FOLDER, RESULTS, PICTURE, CENTRAL = "federate", "federated.json", "federated.svg", "central"


class How(NamedTuple):
    """A recipe's federation, and what runs it. `alpha` skews the kinds of rows that clients have, None deals them evenly; `ranks` are given to
    clients in turn, none is the adapter's for all; `noise` is in multiples of `clip`, and `epsilon` is in its place what it is to come to."""

    aggregators: tuple[Any, ...] = ("fedavg",)
    clients: int = 20
    rounds: int = 10
    alpha: float | None = None
    fraction: float = 1.0
    dropout: float = 0.0
    ranks: tuple[int, ...] = ()
    clip: float | None = None
    noise: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    central: bool = True
    engine: str = "process"  # or flower

    @classmethod
    def of(cls, recipe: Recipe, engine: str = "process") -> How:
        """What a recipe says of it.

        >>> recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["federation.clipping_norm=1", "epsilon=3", "clients=5"])
        >>> how = How.of(recipe)
        >>> how.clients, round(how.privacy.noise, 2)
        (5, 4.73)
        """
        f = recipe.federation
        who = (tuple(f.aggregators), f.clients, f.rounds, f.dirichlet_alpha, f.fraction_train, f.client_dropout, tuple(f.client_ranks))
        return cls(*who, f.clipping_norm, f.noise_multiplier, f.epsilon, f.delta, f.compare_central, engine)

    @property
    def values(self) -> dict[str, Aggregator]:
        """The aggregators by name."""
        made = [registry.from_json("federate", entry) for entry in self.aggregators]
        return {registry.to_json(value)["paper"]: value for value in made}

    @property
    def privacy(self) -> privacy.Privacy | None:
        """Raises Invalid where what was given of it does not make one."""
        if self.clip is None:
            if self.noise is not None or self.epsilon is not None:
                raise Invalid("noise is in multiples of the longest update of a client: give --clip too (federation.clipping_norm)")
            return None
        if (self.noise is None) == (self.epsilon is None):
            raise Invalid("with --clip give one of --noise and --epsilon (federation.noise_multiplier, .epsilon); --noise 0 clips alone")
        noise = self.noise if self.epsilon is None else privacy.noise_for(self.epsilon, self.rounds, self.delta, self.fraction)
        return privacy.Privacy(self.clip, noise or 0.0, self.fraction)


def federate(recipe: Recipe, how: How, resume: bool = False, overwrite: bool = False, prepare: bool = False) -> dict[str, Any]:
    """Every aggregator's rounds, and what federated.json says of them; with `prepare` what nodes of Flower need for them. Raises Invalid before
    anything is loaded where `how` makes no rounds, and where output_dir holds a federation and is neither to be gone on with nor replaced."""
    if how.engine == "flower" and importlib.util.find_spec("flwr") is None:
        raise Invalid("--engine flower runs Flower's simulation, which is not installed here: pip install 'flwr[simulation]'")
    values = {name: _checked(aggregator, how, recipe) for name, aggregator in how.values.items()}
    folder = RunFolder(recipe.output_dir)
    say = Progress("").say
    with folder.locked():
        ours(folder / RESULTS, SCHEMA)
        ours(folder / PICTURE, SCHEMA)
        source = Source.of(recipe)
        material = gated(source)[1]
        dealt = deal([_kind(row) for row in source.rows[0]], how, recipe.training.seed)
        plan = priced(recipe, (material.train, material.held))
        _checked_plan(plan, recipe)
        say(plan.summary().replace("\n", "\n "))
        settings = recorded(recipe)
        said = [settings[k] for k in ("training", "rules", "data")]
        made_of = digest(said, plan.hash, source.hash, dealt, how._replace(aggregators=(), engine="", central=True))
        place = folder / FOLDER
        _take(place, resume, overwrite)
        _shared(place, recipe, material)
        told = {
            "schema": SCHEMA,
            "model": recipe.model.model_name_or_path,
            "rounds": how.rounds,
            "alpha": how.alpha,
            "seed": recipe.training.seed,
        }
        told |= {"clients": [len(rows) for rows in dealt], "fraction": how.fraction, "dropout": how.dropout, "privacy": _told(how)}
        batches = material.batches(
            source.model.task, source.model.processor, recipe.evaluation.per_device_eval_batch_size, plan.levers.rounding
        )
        runs = {}
        for name, aggregator in values.items():
            job = _job(recipe, how, aggregator, plan, dealt, made_of)
            runs[name] = Run(place / name, plan, material, job, batches, name, how.engine)
        if prepare:
            return told | {"apps": {name: str(run.prepared()) for name, run in runs.items()}}
        if how.central:
            job = _central(recipe, how, plan, dealt, made_of)
            runs[CENTRAL] = Run(place / CENTRAL, plan, material, job, batches, CENTRAL, "process")
        curves = {name: run.made() for name, run in runs.items()}
        told["curves"] = scored(curves, source.model.task)
        write_json(folder / RESULTS, told)
        write_text(folder / PICTURE, picture(told))
        return told


def _checked(aggregator: Aggregator, how: How, recipe: Recipe) -> Aggregator:
    ranks = _ranks(how, recipe)
    loop.Federation(aggregator, how.clients, 0, how.fraction, how.dropout, how.privacy).checked(ranks)
    if how.rounds < 1:
        raise Invalid(f"rounds is {how.rounds}; at least 1 is wanted")
    if max(ranks) > recipe.adapter_value().rank:
        raise Invalid(
            f"a client has rank {max(ranks)}, and the recipe's adapter {recipe.adapter_value().rank}: raise adapter.rank to the largest"
        )
    if how.privacy is not None and recipe.quantization.objective != "weight" and len(recipe.formats()) > 1:
        raise Invalid(
            f"with quantization.objective {recipe.quantization.objective} the plan chooses among formats by what training rows say of them, and "
            "no noise covers that: with --clip take the objective weight, or one candidate"
        )
    return aggregator


def _ranks(how: How, recipe: Recipe) -> tuple[int, ...]:
    each = how.ranks or (recipe.adapter_value().rank,)
    return tuple(each[k % len(each)] for k in range(max(how.clients, 0)))


def _checked_plan(plan: Plan, recipe: Recipe) -> None:
    """Raise Invalid unless the plan trains LoRAs of one rank over matrices, and nothing else."""
    kinds = {spec.adapter for spec in plan.modules.values() if spec.adapter is not None}
    if plan.over or plan.trained or len(kinds) != 1 or type(next(iter(kinds))).__name__ != "LoRA":
        raise Invalid(
            "clients train LoRAs of one rank over matrices, in the forms that aggregators want: let the recipe's adapter be lora, without "
            "modules_to_save, adapters to choose from, or patterns of ranks"
        )
    if recipe.training.report_to not in ("none", []):
        raise Invalid("training.report_to is a tracker of transformers' Trainer, which clients do not train with: set it to none")


def _kind(row: Any) -> Hashable:
    """What a row is: its label, or the last thing that is said in it, whose speaker is to be learned from."""
    if row.label is not None:
        return row.label
    return row.messages[-1]["content"] if row.messages else None


def deal(kinds: Sequence[Hashable], how: How, seed: int) -> list[list[int]]:
    """Whose rows are whose. Raises Invalid where rows are to be skewed and are of no kinds."""
    if how.alpha is None:
        return dirichlet([0] * len(kinds), how.clients, 1e6, seed)
    counts = Counter(kinds)
    if len(counts) < 2 or len(counts) > max(len(kinds) // 4, 2):
        raise Invalid(
            f"--alpha skews labels, and the {len(kinds)} training rows have {len(counts)} different ones (a row's label, or its last "
            "answer): leave --alpha out to deal them evenly, or give rows with a label"
        )
    return dirichlet(kinds, how.clients, how.alpha, seed)


def _take(place: Path, resume: bool, overwrite: bool) -> None:
    from finebits import artefacts
    from finebits.interop.federated import JOB, ROWS, START

    jobs = sorted(place.glob(f"*/{JOB}"))
    if jobs and not (resume or overwrite):
        raise Invalid(f"{place} holds a federation: go on with --resume, replace it with --overwrite, or name another output_dir")
    for job in jobs if overwrite else ():
        for artefact in (job.parent / START, job.parent / MODEL):
            artefacts.remove(artefact)
        for rounds in (job.parent / "rounds", job.parent / "flower"):
            for path in (*rounds.glob(f"*-{loop.TENSORS}"), rounds / loop.ABOUT):
                path.unlink(missing_ok=True)
        job.unlink()
    for path in (place / ROWS, place / RECIPE) if overwrite else ():
        path.unlink(missing_ok=True)


def _shared(place: Path, recipe: Recipe, material: Material) -> None:
    from finebits.data import arrays
    from finebits.interop.federated import ROWS

    ours(place / ROWS, arrays.SCHEMA)
    ours(place / RECIPE, HEAD)
    place.mkdir(parents=True, exist_ok=True)
    arrays.save(place / ROWS, {"train": material.train}, {})
    write_text(place / RECIPE, HEAD + recipe.to_yaml())


def _job(recipe: Recipe, how: How, aggregator: Aggregator, plan: Plan, dealt: list[list[int]], made_of: str) -> dict[str, Any]:
    import torch

    from finebits.interop.federated import SCHEMA as JOBS

    training, chunk = arguments_of(recipe, plan)
    known = how.privacy
    return {
        "schema": JOBS,
        "made_of": digest(made_of, registry.to_json(aggregator)),
        "aggregator": registry.to_json(aggregator),
        "clients": how.clients,
        "rounds": how.rounds,
        "seed": recipe.training.seed,
        "fraction": how.fraction,
        "dropout": how.dropout,
        "privacy": None if known is None else list(known),
        "ranks": list(_ranks(how, recipe)),
        "training": training,
        "loss_chunk": chunk,
        "dealt": dealt,
        "threads": torch.get_num_threads(),
    }


def _central(recipe: Recipe, how: How, plan: Plan, dealt: list[list[int]], made_of: str) -> dict[str, Any]:
    """One client with all rows, which between two scores sees as many of them as all clients together do in a round."""
    alone = how._replace(clients=1, ranks=(), fraction=1.0, dropout=0.0, clip=None, noise=None, epsilon=None)
    job = _job(recipe, alone, registry.from_json("federate", "fedavg"), plan, [sorted(r for rows in dealt for r in rows)], made_of)
    t = job["training"]
    if t["max_steps"] > 0:
        steps = t["max_steps"] * how.clients * how.fraction * (1 - how.dropout)
        job["training"] = t | {"max_steps": max(1, round(steps))}
    return job


def plan_for(plan: Plan, aggregator: Aggregator, private: bool) -> Plan:
    """The recipe's plan with the adapter that the aggregator wants, and its start: the same bits."""
    from finebits.init.zeros import Zeros

    kind = registry.load("adapters", aggregator.adapter)
    init = None if aggregator.init is None else Zeros() if private else registry.from_json("init", aggregator.init)

    def own(spec: Any) -> Any:
        if spec.adapter is None:
            return spec
        a = spec.adapter
        adapter = a if aggregator.adapter == "lora" else kind(rank=a.rank, alpha=a.s * a.rank)
        return replace(spec, adapter=adapter, init=spec.init if init is None else init)

    made = replace(plan, modules={name: own(spec) for name, spec in plan.modules.items()})
    return made if init is None else replace(made, start=plan.start.plain)


class Run:
    """The rounds of one aggregator, with a score after each: what of them is in its folder is not made again."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        material: Material,
        job: dict[str, Any],
        batches: list[dict[str, Any]],
        name: str,
        engine: str,
    ) -> None:
        self.folder, self.plan, self.material, self.job, self.batches, self.name = folder, plan, material, job, batches, name
        self.engine = engine

    def prepared(self) -> Path:
        """The folder of an app of Flower, with all that its nodes read."""
        from finebits.interop.federated import write_app

        self._begin()
        return write_app(self.folder)

    def made(self) -> dict[str, Any]:
        """Every round's scores and bytes."""
        import finebits as fb
        from finebits.interop.federated import Clients

        self._begin()
        clients = Clients(self.folder)
        before = loop.load(self.folder / "rounds")
        if before is None:
            now = clients.begun()
            history = [self._entry(clients, now)]
            loop.save(now, self.folder / "rounds", history=history)
        else:
            now, history = before[0], before[1]["history"]

        def each(now: loop.Round) -> None:
            history.append(self._entry(clients, now))
            loop.save(now, self.folder / "rounds", history=history)

        if now.number < self.job["rounds"] and self.engine == "flower":
            from finebits.interop import flower

            flower.simulate(self.folder, each)
        else:
            for now in loop.rounds(clients.federation, clients, now, self.job["rounds"]):
                each(now)
        reached = loop.load(self.folder / "rounds")
        assert reached is not None
        clients.put(reached[0].server, clients.rank)
        fb.save(clients.model, self.folder / MODEL, overwrite=True)
        return {"once": clients.once, "history": history}

    def _begin(self) -> None:
        import finebits as fb
        from finebits.build import needs
        from finebits.interop.federated import JOB, START, federation_of, job_of

        self.progress = Progress(self.name)
        if (self.folder / JOB).exists():
            if job_of(self.folder)["made_of"] != self.job["made_of"]:
                raise Invalid(
                    f"{self.folder} was begun with other rows or settings: begin anew with --overwrite, or name another output_dir"
                )
            return
        federation = federation_of(self.job)
        plan = plan_for(self.plan, federation.aggregator, federation.privacy is not None)
        if federation.privacy is not None and (needs(plan) or plan.start.refine):
            raise Invalid(
                f"{self.name} starts from what training rows say of the model (quantizer, init or refine), and no noise covers that: with "
                "--clip take quantizer rtn, init zeros or loftq, and no refine"
            )
        if plan.start != self.plan.start:
            self.progress.say(f"{self.name}: starts by itself, so what the recipe refines is left as it was rounded")
        self.progress.say(f"{self.name}: quantizing and starting")
        model, _ = fb.load_planned(plan, data=self.material.train)
        fb.save(model, self.folder / START, packed=False, overwrite=True)
        del model
        write_json(self.folder / JOB, self.job)

    def _entry(self, clients: Any, now: loop.Round) -> dict[str, Any]:
        from finebits.evaluate.heldout import score
        from finebits.train import sound

        clients.put(now.server, clients.rank)
        made = score(clients.model, self.batches, chunk=self.job["loss_chunk"])
        sound("the loss", f"{self.name}, round {now.number}", [made.loss])
        there = f", {len(now.sent)} clients, {now.up:,} bytes up, {now.down:,} down" if now.number else ""
        self.progress.say(f"{self.name}: round {now.number} of {self.job['rounds']}: held-out loss {made.loss:.4f}{there}")
        sums = {"nll": made.nll.tolist(), "tokens": made.tokens.tolist(), "right": None if made.right is None else made.right.tolist()}
        rank = {"ranks": sorted(set(now.ranks), reverse=True)}
        return {"round": now.number, "clients": len(now.sent), "up": now.up, "down": now.down} | rank | {"sums": sums}


def scored(curves: Mapping[str, Mapping[str, Any]], task: Any) -> dict[str, Any]:
    """What every round of `{name: {"once": bytes, "history": entries of rounds}}` came to, with intervals over held-out rows, and the difference
    from central training at the end."""
    from finebits.evaluate.heldout import Scores, table

    rows = [(name, e) for name, c in curves.items() for e in c["history"]]
    keys = [f"{name}/{e['round']}" for name, e in rows]

    def scores(sums: dict[str, Any]) -> Scores:
        nll, tokens, right = (None if v is None else np.array(v) for v in (sums["nll"], sums["tokens"], sums["right"]))
        assert nll is not None and tokens is not None
        return Scores(nll, tokens, right=right)

    all_of = {key: scores(e["sums"]) for key, (_, e) in zip(keys, rows, strict=True)}
    last = {name: f"{name}/{c['history'][-1]['round']}" for name, c in curves.items()}
    against = {last[name]: last[CENTRAL] for name in curves if name != CENTRAL} if CENTRAL in curves else {}
    made = table(all_of, {k: k for k in keys}, dict.fromkeys(keys, "tuned"), against=against, task=task)
    told: dict[str, Any] = {name: {"once": c["once"], "rounds": []} for name, c in curves.items()}
    for (name, e), entry in zip(rows, made["entries"], strict=True):
        said = {k: v for k, v in e.items() if k != "sums"} | {"loss": entry["loss"], "interval": entry["intervals"]["loss"]}
        if "accuracy" in entry:
            said |= {"accuracy": entry["accuracy"], "accuracy_interval": entry["intervals"]["accuracy"]}
        told[name]["rounds"].append(said)
        if entry["paired"] is not None:
            told[name]["minus_central"] = entry["paired"]["loss"]
    return told


def _told(how: How) -> dict[str, Any] | None:
    known = how.privacy
    if known is None:
        return None
    spent = privacy.epsilon(known.noise, how.rounds, how.delta, known.q)
    about = {"unit": "client", "clip": known.clip, "noise": known.noise, "delta": how.delta, "accountant": "RDP of the sampled Gaussian"}
    return about | {"epsilon": spent if math.isfinite(spent) else None}


def picture(told: dict[str, Any]) -> str:
    """Every aggregator's held-out loss by round, and central training's, with intervals, as a file of its own."""
    title = f"{len(told['clients'])} clients" + ("" if told["alpha"] is None else f", labels skewed by {told['alpha']:g}")
    return f"<!-- {SCHEMA} -->\n{drawn({title: told['curves']})}"


def drawn(panels: Mapping[str, Mapping[str, Any]], axis: str = "held-out loss (nats per label)") -> str:
    """`{title: what `scored` gave}` as one SVG file, a panel under the other. A name has one colour in all of them."""
    from finebits.report import svg
    from finebits.report.figure import figure
    from finebits.report.panels.base import COLOURS

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves if name != CENTRAL))
    classes = {name: f"s{i}" if i < COLOURS else f"t{i % 12}" for i, name in enumerate(names)} | {CENTRAL: "neutral"}

    def curve(name: str, rounds: Sequence[Mapping[str, Any]], aside: float) -> svg.Curve:
        points = [(float(e["round"]), e["loss"]) for e in rounds]
        spans = [(e["round"] + aside, *e["interval"]) for e in rounds if e["interval"] is not None]
        return svg.Curve(name, classes[name], points, points, spans=spans)

    charts = []
    for title, curves in panels.items():
        apart = [0.06 * (i - (len(curves) - 1) / 2) for i in range(len(curves))]
        series = [curve(name, c["rounds"], by) for (name, c), by in zip(curves.items(), apart, strict=True)]
        charts.append((title, svg.curves(title, series, "round", axis)))
    return figure(charts)


def summary(told: dict[str, Any]) -> str:
    """A line an aggregator."""
    from finebits.sizes import show

    lines = []
    for name, curve in told["curves"].items():
        first, last = curve["rounds"][0], curve["rounds"][-1]
        interval = "" if last["interval"] is None else " ({:.4f} to {:.4f})".format(*last["interval"])
        accuracy = f", accuracy {last['accuracy']:.3f}" if "accuracy" in last else ""
        minus = curve.get("minus_central")
        apart = (
            ""
            if minus is None
            else f", {minus[0]:+.4f} from central" + ("" if minus[1] is None else f" ({minus[1]:+.4f} to {minus[2]:+.4f})")
        )
        lines.append(f"{name:10}  loss {first['loss']:.4f} -> {last['loss']:.4f}{interval}{accuracy}{apart}")
        if name != CENTRAL:
            per = max(last["clients"], 1)
            lines.append(f"{'':10}  a client and round: {show(last['up'] // per)} up, {show(last['down'] // len(told['clients']))} down")
    p = told["privacy"]
    if p is not None:
        spent = "no bound without noise" if p["epsilon"] is None else f"epsilon {p['epsilon']:.2f} at delta {p['delta']:g}"
        lines.append(
            f"privacy of clients: {spent}; clip {p['clip']:g}, noise {p['noise']:.3f} ({p['accountant']}, {told['rounds']} rounds)"
        )
    return "\n".join(lines)
