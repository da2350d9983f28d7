"""One part of the main job in a process of its own: `python -m finebits.worker FOLDER NAME OPTIONS`. Started by finebits.job."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finebits import runfolder
from finebits.errors import Failed
from finebits.files import write_text
from finebits.messages import explain
from finebits.process import interrupt, stoppable, tied
from finebits.progress import Progress, alive
from finebits.recipe import Recipe
from finebits.recipe.rows import rows_of
from finebits.runfolder import RunFolder
from finebits.sizes import show

NEW_TOKENS = 48  # of a sample


class Part:
    """What every part needs: the recipe, the plan, held-out batches, a meter that was started before any model existed."""

    def __init__(self, folder: str | Path, name: str, training: bool = False) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel package that nothing here uses
        import datasets  # noqa: F401  # imported before the baseline is taken, like all that a run needs
        import numpy  # noqa: F401
        import torch
        import trl  # noqa: F401

        from finebits.interop import trainer  # noqa: F401
        from finebits.interop.hf import checked_folder, tokenizer_of
        from finebits.meter import Meter
        from finebits.plan.base import Plan

        self.folder, self.name = RunFolder(folder), name
        self.run = self.folder.run(name)
        self.run.mkdir(parents=True, exist_ok=True)
        self.recipe = Recipe.load(self.folder / runfolder.RECIPE)
        self.plan = Plan.load(self.folder / runfolder.PLAN)
        self.model_folder = checked_folder(self.plan)
        self.tokenizer = tokenizer_of(self.model_folder)
        self.rows, self.held = rows_of(self.recipe)
        self.batches = self._held_out()
        self.examples = self._examples() if training else None
        gc.collect()
        warm()
        device = self.plan.levers.get("device", "cpu")
        self.meter = Meter(device if device == "cpu" or torch.cuda.is_available() else "cpu")  # loading says that there is none
        self.progress = Progress(name)

    def _held_out(self) -> list[dict[str, Any]]:
        from finebits.data.tokens import to_batch, tokenize
        from finebits.plan import memory

        data = self.recipe.data
        examples = tokenize(self.held, self.tokenizer, data.max_length, data.assistant_only_loss)
        examples.sort(key=lambda e: -len(e.input_ids))  # rows of like length share a batch; scores are per row, in this order everywhere
        size = self.recipe.evaluation.per_device_eval_batch_size
        pad, multiple = pad_of(self.tokenizer), memory.rounding(self.plan.levers)
        return [to_batch(examples[i : i + size], pad, multiple) for i in range(0, len(examples), size)]

    def _examples(self) -> Any:
        from finebits.data.tokens import tokenize
        from finebits.interop.trainer import dataset

        data = self.recipe.data
        return dataset(vars(e) for e in tokenize(self.rows, self.tokenizer, data.max_length, data.assistant_only_loss))

    def phase(self, name: str) -> None:
        """Say what comes next, and note it as an event."""
        self.progress = Progress(f"{self.name}: {name}", baseline=self.meter.baseline or 0, budget=self.plan.budget)
        with (self.run / runfolder.EVENTS).open("a") as f:
            f.write(json.dumps({"t": time.time(), "event": "phase", "name": name}) + "\n")

    def scores(self, model: Any, file: str, what: str) -> None:
        """Score a model on the held-out rows against the full-precision model's states."""
        import numpy as np

        from finebits.evaluate.heldout import score
        from finebits.train import sound

        self.phase(what)
        made = score(model, self.batches, self.teacher(model), chunk=self.plan.levers["loss_chunk"])
        sound("the loss", f"{self.name}, {what}", [made.loss])
        np.savez(self.run / file, **{k: v for k, v in vars(made).items() if v is not None})
        kl = "" if made.kl is None else f", KL {made.kl.sum() / made.tokens.sum():.4f}"
        self.progress.say(f"{self.name}: {what}: loss {made.loss:.4f}{kl}")

    def teacher(self, model: Any) -> Any:
        """The full-precision model's final states, from its own part, with its head: that of `model`, or read again where the plan has
        quantized it. None where the recipe leaves it out."""
        from finebits.evaluate.heldout import Teacher, head_of
        from finebits.interop.hf import dense_head

        if not self.recipe.evaluation.full_precision:
            return None
        return Teacher(head_of(dense_head(model, self.model_folder)), self.folder.run(runfolder.FULL) / runfolder.STATES)

    def prompts(self) -> tuple[list[list[int]], list[str], list[str]]:
        """Token ids, texts and references of the first held-out prompts."""
        picked = [r for r in self.held if r.messages][: self.recipe.evaluation.samples]
        ids, texts, references = [], [], []
        for row in picked:
            turns = list(row.messages or ())
            last = max(i for i, m in enumerate(turns) if m["role"] == "assistant")
            made = self.tokenizer.apply_chat_template(
                turns[:last], add_generation_prompt=True, tokenize=True, return_dict=True, **row.given
            )
            ids.append(list(made["input_ids"]))
            texts.append(turns[last - 1]["content"] if last else "")
            references.append(turns[last]["content"])
        return ids, texts, references

    def room(self, phase: str) -> int | None:
        """Bytes of the budget that a phase leaves; None where there is no budget."""
        return None if self.plan.budget is None else max(self.plan.budget - self.plan.rows.get(phase, 0), 0)

    def samples(self, model: Any) -> list[str]:
        """What the model answers to the prompts, greedily."""
        from finebits.evaluate.generate import greedy
        from finebits.interop.tokenizer import stops_of

        ids, _, _ = self.prompts()
        made = greedy(model, ids, NEW_TOKENS, stops_of(self.model_folder, self.tokenizer), self.room("eval"))
        return [self.tokenizer.decode(m, skip_special_tokens=True) for m in made]


def pad_of(tokenizer: Any) -> int:
    """The id that rows are filled up with; labels, not ids, say what is trained."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def warm() -> None:
    """Make the math library allocate what it keeps for good, so that it counts as the process and not as the run."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.linear(x, x).sum().backward()


def full(part: Part) -> None:
    """The unquantized, untuned model: its states are what every other model is compared with."""
    import numpy as np

    from finebits.evaluate.heldout import own, teacher
    from finebits.interop.streaming import Streamed
    from finebits.plan import memory
    from finebits.train import sound

    part.phase("scoring")
    with part.meter.phase("full"):
        streamed = Streamed.of(part.plan, part.model_folder)
        hidden = streamed.hidden(part.batches, part.progress)
        made = teacher(streamed.model, part.batches, hidden, file=part.run / runfolder.STATES)
        held = own(made, part.batches, chunk=part.plan.levers["loss_chunk"])
    sound(
        "the loss", "the unquantized, untuned model on the held-out rows", [held.loss], "look at its files, or set model.dtype to float32"
    )
    np.savez(part.run / runfolder.SCORES, **{k: v for k, v in vars(held).items() if v is not None})
    write_text(part.run / runfolder.PEAKS, json.dumps(part.meter.peaks))
    part.progress.say(f"full precision: loss {held.loss:.4f} on {len(held.tokens)} held-out rows")
    room = part.room("full")
    linears = sum(math.prod(cost["shape"]) for cost in part.plan.costs.values()) * memory.inner(part.plan.levers)
    if part.recipe.evaluation.samples and (room is None or linears <= room):
        part.phase("samples")
        with streamed.whole():
            write_text(part.run / runfolder.SAMPLES, json.dumps(part.samples(streamed.model)))
    elif part.recipe.evaluation.samples:
        part.progress.say(f"no samples of the unquantized model: its linears take {show(linears)}, and the budget leaves {show(room or 0)}")


def plan_for(part: Part) -> Any:
    """The plan of this run: the recipe's own, the same bits started at zero, or the same adapters over unquantized weights."""
    from finebits import job
    from finebits.init.loftq import LoftQ
    from finebits.init.zeros import Zeros

    if part.name == job.main_run(part.recipe):
        return part.plan
    starts = {"zeros": Zeros(), "loftq": LoftQ()}
    return part.plan.with_start(starts[part.name]) if part.name in starts else part.plan.unquantized()


def begin(part: Part) -> None:
    """Quantize, start the adapters, save that, and score it untuned. In a process of its own, so that training begins in a clean one."""
    import finebits as fb
    from finebits.build import needs
    from finebits.evaluate.heldout import score
    from finebits.interop.hf import sweeps
    from finebits.meter import relax

    (part.run / runfolder.EVENTS).unlink(missing_ok=True)
    part.phase("quantizing and starting")
    plan = plan_for(part)
    with part.meter.phase("start" if sweeps(plan) or needs(plan) else "load"):
        model, _ = fb.load_planned(plan, data=part.rows, progress=part.progress)
    fb.save(model, part.run / runfolder.STARTED)
    if made := fb.choices(model):
        write_text(part.run / runfolder.CHOICES, json.dumps(made, indent=1) + "\n")
        part.progress.say(f"{part.name}: {chosen(made)}")
    if told := getattr(model, "finebits_refined", {}):
        write_text(part.run / runfolder.REFINED, json.dumps(told, indent=1) + "\n")
        first, last = (sum(v[i] for v in told.values()) / len(told) for i in (0, 1))
        part.progress.say(
            f"{part.name}: refinements took the loss from {first:.4f} (first epoch) to {last:.4f} (last), mean of {len(told)}"
        )
    with part.meter.phase("eval"):
        score(model, part.batches[:1], chunk=part.plan.levers["loss_chunk"])  # the longest rows
    relax()
    part.scores(model, runfolder.START_SCORES, "scoring the start")
    write_text(part.run / runfolder.PEAKS, json.dumps(part.meter.peaks))


def chosen(choices: dict[str, Any]) -> str:
    """In one line: how many matrices each candidate won, and how much output error is left on average."""
    won = Counter(c["tried"][c["won"]]["init"]["paper"] for c in choices.values())
    share = sum(c["share"] for c in choices.values()) / len(choices)
    return f"{', '.join(f'{k} won {n}' for k, n in won.most_common())} of {len(choices)} matrices; output error {share:.3f} of zeros' on average"


def arguments_of(recipe: Recipe, plan: Any) -> tuple[dict[str, Any], int]:
    """(arguments of the trainer, tokens a chunk of the loss): the recipe's, and the levers as the plan has set them."""
    from finebits.plan.around import TRAINING

    wanted = recipe.training.model_dump() | {k: plan.levers[k] for k in TRAINING if k in plan.levers}
    return wanted, wanted.pop("loss_chunk")


def fit(part: Part, plan: Any, resume: bool = False) -> Any:
    """A run from its saved start (or from the plan, where none was saved): loaded, trained, saved. The model."""
    import finebits as fb
    from finebits.interop.trainer import Interrupted, checkpoints, trainer

    recipe, started = part.recipe, part.run / runfolder.STARTED
    part.phase("loading")
    with part.meter.phase("load"):
        model, tokenizer = fb.load(started) if started.exists() else fb.load_planned(plan)
    arguments, loss_chunk = arguments_of(recipe, plan)
    arguments |= {"save_strategy": "steps", "save_total_limit": 1}
    part.phase("training")
    with part.meter.phase("train"):
        engine = trainer(
            model,
            tokenizer,
            part.examples,
            part.run / runfolder.CHECKPOINTS,
            arguments,
            recipe.rule_values(),
            loss_chunk=loss_chunk,
            events=part.run / runfolder.EVENTS,
            watch=part.progress.event,
        )
        last = checkpoints(part.run / runfolder.CHECKPOINTS)[-1:] if resume else []
        engine.train(resume_from_checkpoint=str(last[0]) if last else None)
    if engine.moments.stop:
        raise Interrupted(f"stopped at step {engine.state.global_step}; go on with --resume")
    del engine
    gc.collect()
    part.phase("saving")
    with part.meter.phase("save"):
        fb.save(model, part.run / runfolder.MODEL)
    return model


def tune(part: Part, resume: bool = False) -> None:
    """One run from its saved start: train, save, score."""
    from finebits import job
    from finebits.meter import MALLOC, relax, settings

    recipe, main = part.recipe, job.main_run(part.recipe)
    plan = plan_for(part)
    model = fit(part, plan, resume)
    relax()
    part.scores(model, runfolder.SCORES, "scoring the tuned model")
    if part.name == main and recipe.evaluation.samples:
        part.phase("samples")
        _, texts, references = part.prompts()
        file = part.folder.run(runfolder.FULL) / runfolder.SAMPLES
        before = json.loads(file.read_text()) if file.exists() else [None] * len(texts)
        after = part.samples(model)
        made = [{"prompt": p, "reference": r, "before": b, "after": a} for p, r, b, a in zip(texts, references, before, after, strict=True)]
        write_text(part.folder / runfolder.SAMPLES, json.dumps(made, indent=1))
    if settings() == MALLOC:
        memory = measured(part, plan, model) | {"settings": settings()}
        write_text(part.run / runfolder.MEMORY, json.dumps(memory, indent=1) + "\n")


def peer(part: Part, start: bool = False) -> None:
    """QLoRA of the stock libraries on the batches of the recipe's own run: trained and scored, or (`start`) scored untuned. What a weight takes
    there is left in peer.json."""
    import torch

    from finebits.interop import peers
    from finebits.train import met

    recipe, plan = part.recipe, part.plan
    levers, adapter = plan.levers, recipe.adapter_value()
    names = [name for name, spec in plan.modules.items() if spec.adapter is not None]
    part.phase("loading")
    model = peers.qlora(part.model_folder, names, getattr(torch, levers.get("compute", levers["dtype"])), levers["device"])
    write_text(part.run / runfolder.PEER, json.dumps({"bits": peers.bits(model), "versions": peers.versions()}) + "\n")
    if start:
        part.scores(model, runfolder.START_SCORES, "scoring the start")
        return
    assert part.examples is not None
    arguments, _ = arguments_of(recipe, plan)
    size, passes = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    long = [len(ids) for ids in part.examples["input_ids"]]
    batches = met(long, size, recipe.training.seed, passes, recipe.training.max_steps, recipe.training.num_train_epochs)
    part.phase("training")
    torch.manual_seed(recipe.training.seed)
    model = peers.adapted(model, names, adapter.rank, adapter.alpha, recipe.adapter.dropout)
    peers.train(model, part.tokenizer, part.examples, batches, part.run / runfolder.CHECKPOINTS, arguments, part.progress.event)
    model.save_pretrained(part.run / runfolder.MODEL)
    part.scores(model.get_base_model(), runfolder.SCORES, "scoring the tuned model")


def measured(part: Part, plan: Any, model: Any) -> dict[str, Any]:
    """memory.json: what was planned and what was measured."""
    from finebits.build import hosts
    from finebits.qtensor import nbytes

    before = part.run / runfolder.PEAKS
    peaks = part.meter.peaks | {}
    for file in (part.folder.run(runfolder.FULL) / runfolder.PEAKS, before):  # quantizing took more than loading what was saved
        peaks |= json.loads(file.read_text()) if file.exists() else {}
    return {
        "schema": "finebits.memory/1",
        "planned": plan.memory,
        "planned_peak": plan.peak,
        "measured_peak": peaks.pop("train"),
        "baseline": part.meter.baseline,
        "stored": {
            "planned": sum(cost["bytes"] for cost in plan.costs.values()),
            "measured": sum(nbytes(host.weight) for _, host in hosts(model)),
        },
        "rows": [{"phase": k, "planned": plan.rows.get(k), "measured": v} for k, v in peaks.items()],
    }


PROBED = 8  # batches at most


def probe(part: Part) -> None:
    """The worst batches of the run, trained, scored and saved once, to see what the process holds beside tensors. Writes probe.json."""
    import tempfile

    import finebits as fb
    from finebits.evaluate.heldout import score
    from finebits.init.zeros import Zeros
    from finebits.interop.trainer import Given, trainer
    from finebits.meter import settings
    from finebits.plan import memory

    assert part.examples is not None

    plan = part.plan.with_start(Zeros())  # how an adapter starts does not change what it holds
    part.phase("loading")
    with part.meter.phase("load"):
        model, tokenizer = fb.load_planned(plan)
    arguments, loss_chunk = arguments_of(part.recipe, plan)
    batches = worst(part, arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"])
    passes = min(arguments["gradient_accumulation_steps"], 2)  # from two on, gradients are there when the loss is computed
    rows = [r for batch in batches for r in batch * passes]
    arguments |= {"max_steps": len(batches), "gradient_accumulation_steps": passes, "save_strategy": "no", "report_to": "none"}
    part.phase("probing")
    with part.meter.phase("train"), tempfile.TemporaryDirectory() as folder:
        watch = part.progress.event
        engine = trainer(model, tokenizer, part.examples, folder, arguments, loss_chunk=loss_chunk, watch=watch)
        engine.data_order = Given(rows)
        engine.train()
    del engine
    gc.collect()
    held = part.batches[:1]
    with part.meter.phase("eval"):
        score(model, held, chunk=loss_chunk)
    with part.meter.phase("save"), tempfile.TemporaryDirectory() as folder:
        fb.save(model, Path(folder) / runfolder.MODEL)
    peaks = part.meter.peaks
    if peaks["train"] is None:
        raise Failed("this system does not tell the high-water mark of a process, so there is nothing to probe: plan without --probe")
    runtime = memory.runtime(part.plan.levers) + peaks["train"] - part.plan.peak
    found = {"schema": "finebits.probe/1", "plan": part.plan.hash, "planned": part.plan.peak, "peaks": peaks, "runtime": max(runtime, 0)}
    write_text(part.folder / runfolder.PROBE, json.dumps(found | {"steps": len(batches), "settings": settings()}, indent=1) + "\n")


def worst(part: Part, size: int, passes: int) -> list[list[int]]:
    """The batches that a probe takes, as row numbers, out of those that the run meets and in its order: the first, after which the optimizer has
    its state, those after the first step that no other exceeds, and the first of every padded width, for which the matrix library keeps code
    from then on."""
    from finebits.losses import IGNORED
    from finebits.plan import memory
    from finebits.train import met

    assert part.examples is not None
    long = [len(ids) for ids in part.examples["input_ids"]]
    labelled = [sum(y != IGNORED for y in labels[1:]) for labels in part.examples["labels"]]
    t = part.recipe.training
    batches = met(long, size, t.seed, passes, t.max_steps, t.num_train_epochs)
    batches = [b for b in batches if len(b) == size] or [[i % len(long) for i in range(size)]]
    weigh = lambda b: (memory.padded(max(long[r] for r in b), part.plan.levers), sum(labelled[r] for r in b))  # noqa: E731
    pairs = [weigh(b) for b in batches]
    later = pairs[passes:]
    places = [0, *(passes + i for i in list(memory.worst(later).values())[-PROBED + 2 :])] if later else [0]
    widths = sorted({w for w, _ in pairs} - {pairs[i][0] for i in places}, reverse=True)
    places += [next(i for i, p in enumerate(pairs) if p[0] == w) for w in widths[: PROBED - len(places)]]
    return [batches[i] for i in sorted(places)]


def ship(part: Part, to: Sequence[str], verify: bool, overwrite: bool = False) -> None:
    """Export the recipe's own run and compare what stock libraries load with what was trained."""
    import numpy as np
    import torch

    import finebits as fb
    from finebits import job
    from finebits.evaluate.heldout import score
    from finebits.interop import peft

    main = job.main_run(part.recipe)
    part.phase("loading")
    with part.meter.phase("load"):
        model, tokenizer = fb.load(part.folder.run(main) / runfolder.MODEL)
    memory_file = part.folder.run(main) / runfolder.MEMORY
    told = {"recipe": part.recipe.to_yaml(), "memory": json.loads(memory_file.read_text()) if memory_file.exists() else None}
    few = part.batches[: max(1, -(-part.recipe.export.rows // part.recipe.evaluation.per_device_eval_batch_size))]
    made = []
    with part.meter.phase("export"):
        for target in to:
            part.phase(f"writing {target}")
            made.append(peft.export(model, part.folder.target(target), target, tokenizer, **told, overwrite=overwrite))
    if verify:
        results = []
        for row in made:
            part.phase(f"verifying {row['name']}")
            with part.meter.phase("verify"):
                results.append(
                    peft.verify(row["path"], row["name"], model, few, None, part.recipe.export.tolerance, part.plan.levers["loss_chunk"])
                )
            part.progress.say(
                f"{row['name']}: largest logit difference {results[-1]['max_logit_difference']:.2e}: {results[-1]['verdict']}"
            )
        made = results
        if "adapter" in to:
            del model
            part.phase("scoring the export")
            wide = getattr(torch, part.plan.levers.get("compute", part.plan.levers["dtype"]))
            theirs = peft.streamed(part.folder.target("adapter"), "adapter", wide)
            hidden = theirs.hidden(part.batches)
            held = score(theirs.model, part.batches, part.teacher(theirs.model), part.plan.levers["loss_chunk"], hidden)
            np.savez(part.run / runfolder.SCORES, **{k: v for k, v in vars(held).items() if v is not None})
    table = peft.table(made, part.recipe.export.tolerance, sum(len(b["labels"]) for b in few) if verify else 0)
    write_text(part.folder / runfolder.EXPORTED, json.dumps(table, indent=1) + "\n")
    if memory_file.exists():
        memory = json.loads(memory_file.read_text())
        found = {k: v for k, v in part.meter.peaks.items() if k != "load"}
        memory["rows"] = [r for r in memory["rows"] if r["phase"] not in found]
        memory["rows"] += [{"phase": k, "planned": part.plan.rows.get(k), "measured": v} for k, v in found.items()]
        write_text(memory_file, json.dumps(memory, indent=1) + "\n")


def main(folder: str, name: str, options: str = "{}") -> int:
    """Exit code. While it works, it is never silent for long."""
    with alive(f"{name}: starting"):
        return run(folder, name, options)


def run(folder: str, name: str, options: str) -> int:
    """The part, with whatever goes wrong told in a sentence."""
    try:
        given = json.loads(options)
        part = Part(folder, name, training=name not in (runfolder.FULL, runfolder.EXPORT) and not given.get("start"))
        if name == runfolder.FULL:
            full(part)
        elif name == "qlora":
            peer(part, given.get("start", False))
        elif given.pop("start", False):
            begin(part)
        elif name == "probe":
            probe(part)
        elif name == runfolder.EXPORT:
            ship(part, **given)
        else:
            tune(part, **given)
        return 0
    except BaseException as e:
        message = explain(e)
        print(message.text, file=sys.stderr)
        return message.code


if __name__ == "__main__":
    with stoppable(interrupt):
        tied()
        code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written; taking the interpreter down piece by piece is seconds of silence
