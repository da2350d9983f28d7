"""The cost table of a model: every matrix in every candidate, priced one at a time out of its safetensors, and kept on disk.

The table lies in the cache folder, one file for a model, an objective and a calibration; a line is one matrix under one list of candidates
and is written when it is done, so that a run that was stopped goes on where it stopped. Only what is missing is computed, and the
calibration is run only for that: the unquantized model goes by block by block, and a block's matrices are priced while its statistics are there.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finebits import __version__, registry
from finebits.build import Progress
from finebits.calibrate.blockwise import Shelf, forwards, gradients
from finebits.calibrate.whole_model import Needs, collect
from finebits.data.rows import Rows, gathered
from finebits.errors import Invalid
from finebits.files import write_text
from finebits.interop.checkpoint import Tensors, config_of, fingerprint
from finebits.interop.hf import cache, processor_of
from finebits.interop.streaming import Streamed
from finebits.lookup import put, rounded
from finebits.plan import cost
from finebits.plan.base import SLOTS, Option, Spec
from finebits.plan.compare import Text
from finebits.plan.kl_curve import Point
from finebits.plan.levers import Workload
from finebits.qtensor import dense
from finebits.quantizers.base import check_finite
from finebits.stats.base import Statistic, Stats
from finebits.stats.fisher_diag import FisherDiag
from finebits.stream import Flow
from finebits.tasks import base as tasks


class Calibration:
    """Rows of the user's data, and the unquantized model that runs on them; it is opened when it is first needed, and read block by block.

    The first `calibration_rows` rows are for statistics, as many after them (or, where there are no more, the same again) for evaluating
    variants. `hash` says what the numbers depend on beside the model: rows, lengths, labels, dtype.
    """

    def __init__(self, folder: Path, data: Any, workload: Workload) -> None:
        self.folder, self.levers, self.start, self.task = folder, workload.levers, workload.start, tasks.of(config_of(folder))
        rows = gathered(data)
        count = self.start.calibration_rows
        self.rows, self.others = rows[:count], rows[count : 2 * count] or rows[:count]
        self._streamed: Streamed | None = None

    @property
    def hash(self) -> str:
        kept: dict[str, Any] = {"dtype": self.levers.dtype, "max_length": self.levers.max_length}
        kept |= {"assistant_only_loss": self.start.assistant_only_loss}
        kept |= {} if self.levers.compute is None else {"compute": self.levers.compute}
        rows = [[r.said for r in part] for part in (self.rows, self.others)]
        return hashlib.sha256(json.dumps([kept, rows], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def streamed(self) -> Streamed:
        if self._streamed is None:
            dtype, wide = getattr(torch, self.levers.dtype), self.levers.compute
            attention = self.levers.attn_implementation
            self._streamed = Streamed(self.folder, dtype, attention, compute=getattr(torch, wide) if wide else None)
        return self._streamed

    def batches(self, rows: Rows) -> list[dict[str, Tensor]]:
        processor = processor_of(self.folder)
        examples = self.task.examples(rows, processor, self.levers.max_length, self.start.assistant_only_loss)
        return [self.task.batch([vars(e)], processor) for e in examples]

    @property
    def labels(self) -> int:
        """How many labels its rows have, 1 at least."""
        return max(sum(tasks.labelled(b, self.task) for b in self.batches(self.rows)), 1)

    def statistics(
        self, wanted: Needs, drawn: bool = False, progress: Progress = lambda done, total, name: None
    ) -> Iterator[dict[str, dict[type[Statistic], Statistic]]]:
        """Statistics of the modules, those of one block at a time: from the last block to the first where there are gradients among them.
        `drawn`: for labels that the model draws, not the data's."""
        batches, streamed = self.batches(self.rows), self.streamed
        loss = self.task.drawn(torch.Generator().manual_seed(0)) if drawn else self.task.loss
        flow = streamed.flow(batches, loss)
        keep = lambda i: self.task.inside(batches[i])  # noqa: E731
        inside = tuple(f"{name}." for name in streamed.blocks)
        tables = [n for n in wanted if isinstance(streamed.model.get_submodule(n), nn.Embedding)]
        ends = Ends(flow, self.task, batches) if tables else None
        asked, wanted = wanted, {n: w for n, w in wanted.items() if n not in tables}
        if outside := {n: w for n, w in wanted.items() if w and not n.startswith(inside)}:
            yield collect(streamed.model, batches, loss, outside, keep=self.task.inside)
        if any(S.backward for w in asked.values() for S in w):
            note = lambda done: progress(done, 2 * len(flow.names), "calibration")  # noqa: E731
            watched = () if ends is None else (ends.left, ends.entered_by)
            yield from gradients(flow, wanted, keep, streamed.read, note, *watched)
            if ends is not None:
                yield {name: {FisherDiag: ends.fisher} for name in tables}
        elif len(outside) < len(wanted):
            yield from forwards(flow, wanted, keep, streamed.read)


class Ends:
    """The Fisher information of the input embeddings, through both of their uses where the output head is the same tensor:

        F_vj = (1/t) Σ_t [token t is v] (∂L/∂e_tj)² + p_tv (1 − p_tv) a_tv² h_tj²

    with e what is looked up, h the final states, a the slope of the outputs by the products. The first term is of labels that were drawn, the
    second is the mean over all labels that could be. What the two uses have in common (a product of both gradients) is left out, as what the
    tokens of a row have in common is everywhere.
    """

    def __init__(self, flow: Flow, task: Any, batches: Sequence[Any]) -> None:
        model: Any = flow.model
        self.flow, self.task, self.batches, self.entrance, self.head = flow, task, batches, model.get_input_embeddings(), task.head(model)
        self.last = copy.copy(flow)
        self.last.run = task.states
        self.fisher = FisherDiag()
        self.fisher.total = torch.zeros(self.entrance.weight.shape)
        self.fisher.tokens = sum(task.inputs(b) for b in batches)

    def left(self, i: int, states: Tensor) -> None:
        """The states of batch i behind the last block."""
        if self.head.module.weight is not self.entrance.weight:
            return
        assert self.fisher.total is not None
        with torch.no_grad():
            h, _, _ = tasks.picked(self.task, self.last.leave(i, states), self.batches[i])
            for part in h.split(CHUNK):
                out = self.head(part)
                slope = self.head.scale * (1 if self.head.cap is None else 1 - (out / self.head.cap) ** 2)
                p = out.softmax(-1)
                spread = p.mul_(1 - p).mul_(slope**2)
                self.fisher.total.addmm_(spread.mT.cpu(), part.float().square().cpu())

    def entered_by(self, i: int, gradient: Tensor) -> None:
        """The gradient of the states of batch i before the first block."""
        assert self.fisher.total is not None
        seen: list[tuple[Tensor, Tensor]] = []
        handle = self.entrance.register_forward_hook(lambda m, inputs, out: seen.append((inputs[0], out.requires_grad_())))
        try:
            with torch.enable_grad():
                x = self.flow.enter(i)
                ((ids, out),) = seen
                (g,) = torch.autograd.grad(x, out, gradient.to(x.device))
        finally:
            handle.remove()
        rows = F.embedding(ids, self.entrance.weight).float()
        scale = (out.detach().float() * rows).sum() / rows.square().sum()  # some models multiply what they look up
        self.fisher.total.index_add_(0, ids.flatten().cpu(), (scale * g.float()).square().flatten(0, -2).cpu())


CHUNK = 64  # places that have outputs at a time


def gather(folder: Path, data: Any, wanted: Needs, workload: Workload, progress: Progress = lambda done, total, name: None) -> Shelf:
    """Statistics of the unquantized model over the first `calibration_rows` rows of `data`, in a file."""
    shelf = Shelf()
    for seen in Calibration(folder, data, workload).statistics(wanted, progress=progress):
        shelf.add(seen)
    return shelf


def calibration(folder: Path, data: Any, workload: Workload, per_batch: int) -> list[dict[str, Any]]:
    """The first `calibration_rows` rows of `data` as batches, rows of like length together."""
    task, processor = tasks.of(config_of(folder)), processor_of(folder)
    levers, start = workload.levers, workload.start
    rows = gathered(data)[: start.calibration_rows]
    examples = [vars(e) for e in task.examples(rows, processor, levers.max_length, start.assistant_only_loss)]
    if per_batch > 1:
        examples.sort(key=lambda e: -len(e["input_ids"]))
    return [task.batch(examples[i : i + per_batch], processor) for i in range(0, len(examples), per_batch)]


class CostTable:
    """The lines on disk: (module, candidates) -> cells."""

    def __init__(self, folder: Path, objective: str, calibration: str, width: int, starts: bool) -> None:
        kind = "fisher" if objective == "kl" else objective  # one table: the losses are the same
        seen = sorted(statistic.__name__ for statistic in cost.OBJECTIVES[kind])
        key = json.dumps([__version__, fingerprint(folder), kind, seen, calibration, width, starts, [f.name for f in fields(cost.Cell)]])
        self.path = cache() / "costs" / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
        self.cells: dict[tuple[str, str], list[cost.Cell]] = {}
        self.variants: dict[str, dict[str, float]] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a killed run was writing
            if "variant" in record:
                self.variants[record["variant"]] = record["measured"]
            else:
                self.cells[record["module"], record["candidates"]] = [cost.Cell(*c) for c in record["cells"]]
        if text and not text.endswith("\n"):
            write_text(self.path, text[: text.rfind("\n") + 1])

    def add(self, module: str, candidates: str, cells: Sequence[cost.Cell]) -> None:
        self.cells[module, candidates] = list(cells)
        self._append({"module": module, "candidates": candidates, "cells": [list(asdict(c).values()) for c in cells]})

    def add_variant(self, variant: str, measured: dict[str, float]) -> None:
        self.variants[variant] = measured
        self._append({"variant": variant, "measured": measured})

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


def digest(specs: Sequence[Spec]) -> str:
    """What a list of candidates is, in sixteen hexadecimal digits."""
    entries = [{slot: registry.to_json(getattr(s, slot)) for slot in SLOTS} for s in specs]
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


def price(
    folder: Path,
    candidates: Mapping[str, Sequence[Spec]],
    shapes: Mapping[str, tuple[int, int]],
    objective: str,
    calibration: Calibration | None,
    width: int,
    starts: bool = False,
    progress: Progress = lambda done, total, name: None,
) -> tuple[dict[str, list[cost.Cell]], CostTable]:
    """Every matrix in every one of its candidates, from the disk where it was priced before.

    Raises ValueError that names the matrix where a weight holds NaN or Inf, and where an objective needs calibration rows and there are none.
    """
    table = CostTable(folder, objective, calibration.hash if calibration else "", width, starts)
    keys = {name: digest(specs) for name, specs in candidates.items()}
    lacks = {name for name in candidates if (name, keys[name]) not in table.cells}
    lists = {_list(name) for name in lacks} - {""}  # an expert that no token met is priced by what its siblings have met
    missing = [name for name in candidates if name in lacks or _list(name) in lists]
    tensors = Tensors(folder)
    done = len(candidates) - len(missing)
    for group, own, labels, others in _statistics(missing, candidates, objective, calibration, starts, progress):
        for name in group:
            W = tensors[f"{name}.weight"]
            check_finite(W, f"{name}.weight")
            W = W.float()
            seen = own.get(name, {})
            tokens = max((s.tokens for s in seen.values()), default=1) / labels
            loss = cost.error(objective, W, seen, tokens)
            table.add(name, keys[name], cost.row(W, candidates[name], others.get(name, {}), loss, width, starts))
            done += 1
            progress(done, len(candidates), name)
    return {name: table.cells[name, keys[name]] for name in candidates}, table


def _list(name: str) -> str:
    """The list that a module is in by its number; empty where it is in none."""
    stem, _, leaf = name.rpartition(".")
    return stem if leaf.isdecimal() else ""


def _wants(specs: Sequence[Spec], starts: bool) -> frozenset[type[Statistic]]:
    return frozenset().union(*(s.quantizer.needs | (s.init.needs if starts else frozenset()) for s in specs))


def _statistics(
    names: Sequence[str],
    candidates: Mapping[str, Sequence[Spec]],
    objective: str,
    calibration: Calibration | None,
    starts: bool,
    progress: Progress,
) -> Iterator[tuple[list[str], Mapping[str, Stats], int, Mapping[str, Stats]]]:
    """Some of the matrices, what the objective needs of them, how many labels the rows have, and what quantizers and starts need; until all
    matrices were there."""
    own = {name: cost.OBJECTIVES[objective] for name in names if cost.OBJECTIVES[objective]}
    others = {name: wanted for name in names if (wanted := _wants(candidates[name], starts))}
    if (own or others) and calibration is None:
        what = f"the objective {objective} weighs errors by" if own else "the candidates' methods need"
        raise Invalid(f"{what} what calibration rows show, and there are none: name data.datasets, or use quantization.objective=weight")
    left = dict.fromkeys(names)

    def fresh(statistics: Mapping[str, Stats]) -> list[str]:
        return [name for name in statistics if left.pop(name, name) is None]

    if calibration is not None and (own or others):
        labels = calibration.labels if own else 1
        if not own or objective not in ("fisher", "kl"):
            joint = {name: own.get(name, frozenset()) | others.get(name, frozenset()) for name in names}
            for seen in calibration.statistics(joint, progress=progress):
                yield fresh(seen), seen, labels, seen
        elif not others:
            for seen in calibration.statistics(own, drawn=True, progress=progress):
                yield fresh(seen), seen, labels, {}
        else:
            shelf = Shelf()
            for seen in calibration.statistics(own, drawn=True, progress=progress):
                shelf.add(seen)
            for seen in calibration.statistics(others, progress=progress):
                yield fresh(seen), shelf, labels, seen
            yield list(left), shelf, labels, {}
            return
    yield list(left), {}, 1, {}


def unquantized(calibration: Calibration, table: CostTable) -> Text:
    """What the unquantized model loses on the calibration's other rows, and how much text they are; remembered in the table.

    Raises ValueError where these rows hold no trained token.
    """
    from finebits.evaluate.heldout import own, teacher

    if "unquantized" not in table.variants:
        batches = calibration.batches(calibration.others)
        streamed = calibration.streamed
        scores = own(teacher(streamed.model, batches, streamed.hidden(batches)), batches)
        size = calibration.task.size(batches, processor_of(calibration.folder))
        if not size:
            raise Invalid(
                "the rows that models are to be compared on hold nothing that is learned: name others, or take the objective weight"
            )
        table.add_variant("unquantized", {"loss": scores.loss, "tokens": float(scores.tokens.sum()), "bytes": size})
    measured = table.variants["unquantized"]
    return Text(measured["loss"], int(measured["tokens"]), int(measured["bytes"]))


def evaluate(
    calibration: Calibration, choices: Sequence[Mapping[str, Option]], table: CostTable, progress: Progress = lambda done, total, name: None
) -> list[Point]:
    """Really quantize as each choice says and measure KL to the unquantized model on the calibration's other rows; remembered in the table.

    Raises ValueError where a format's quantizer needs statistics: those are measured once the model is built.
    """
    from finebits.evaluate.heldout import head_of, score, teacher

    keys = [digest([choice[name].spec for name in sorted(choice)]) for choice in choices]
    todo = [i for i, key in enumerate(keys) if key not in table.variants and key not in keys[:i]]
    if todo:
        streamed = calibration.streamed
        batches, logits = calibration.batches(calibration.others), head_of(calibration.task.head(streamed.model))
        known = teacher(streamed.model, batches, streamed.hidden(batches), logits)
        for done, i in enumerate(todo):
            progress(done, len(todo), "measuring variants")
            streamed.instead = lambda name, W, choice=choices[i]: _rounded(choice.get(name.removesuffix(".weight")), W)
            with _ends(streamed.model, choices[i]):
                try:
                    own = head_of(calibration.task.head(streamed.model))
                    scores = score(streamed.model, batches, known, hidden=streamed.hidden(batches), head=own)
                finally:
                    streamed.instead = lambda name, W: W
            assert scores.kl is not None
            kl = float(scores.kl.sum() / scores.tokens.sum())
            residual = scores.kl - kl * scores.tokens
            n = len(scores.tokens)
            error = float((residual**2).sum() ** 0.5 / scores.tokens.sum() * (n / max(n - 1, 1)) ** 0.5)
            table.add_variant(keys[i], {"kl": kl, "error": error, "rows": n, "tokens": float(scores.tokens.sum())})
        progress(len(todo), len(todo), "measuring variants")
    points = []
    for key, choice in zip(keys, choices, strict=True):
        seen = table.variants[key]
        points.append(Point(sum(o.loss for o in choice.values()), seen["kl"], seen["error"] / seen["kl"] if seen["kl"] > 0 else 0.0))
    return points


@contextlib.contextmanager
def _ends(model: nn.Module, choice: Mapping[str, Option]) -> Iterator[None]:
    """Inside, the embeddings are as a choice has them, in codes, and so is a head that is tied to them."""
    before: list[tuple[nn.Module, type, Tensor]] = []
    for name, o in choice.items():
        table = model.get_submodule(name)
        if isinstance(table, nn.Embedding) and o.spec.format is not None:
            before += [(m, type(m), table.weight) for m in model.modules() if getattr(m, "weight", None) is table.weight]
            put(model, table, rounded(table.weight, o.spec, table.weight.dtype))
    try:
        yield
    finally:
        for m, kind, weight in before:
            m.__class__ = kind
            m._parameters["weight"] = cast(nn.Parameter, weight)


def _rounded(option: Option | None, W: Tensor) -> Tensor:
    """A matrix as an option would have it."""
    if option is None or option.spec.format is None:
        return W
    return dense(option.spec.quantizer(W.float(), option.spec.format, {}), torch.float32)
