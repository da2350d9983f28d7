"""Training through transformers' Trainer: our row order, our task's loss without all of its outputs, our rules at its four moments, our events.

A built model also trains in a stock Trainer or SFTTrainer; this subclass adds what makes a run reproducible and watchable.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as distributed
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

from finebits import artefacts, files
from finebits.build import all_hosts, built, hosts
from finebits.carrier import carriers
from finebits.data.limits import positions_of
from finebits.errors import Invalid
from finebits.evaluate.heldout import evaluating
from finebits.interop import sharding
from finebits.interop.cutting import Cutting
from finebits.interop.feeding import Order, Rows, dataset, lengths_of
from finebits.interop.packed import try_packs
from finebits.interop.preferring import Preferring, check_sizes, held_batches
from finebits.objectives.base import Objective
from finebits.optim._shell import Shell, made, refuse_layerwise
from finebits.optim.base import Optimizer, known
from finebits.plan.levers import Levers
from finebits.process import stoppable
from finebits.qtensor import parts_of
from finebits.rules.base import Rule, Run, factor
from finebits.tasks import base as tasks
from finebits.tasks._categories import unwrapped
from finebits.tasks.base import Batch
from finebits.train import Diverged, met, sound

TRAINED, RULES = "adapter.safetensors", "rules.pt"
CHECKPOINT, SAVING = "finebits.checkpoint/1", artefacts.STAGE


class Interrupted(KeyboardInterrupt):
    """Stopped by the user after the step; a checkpoint was saved."""


class Moments(TrainerCallback):
    """The four moments of a step, events to a JSONL file, and the first wish to stop (Ctrl-C, SIGTERM, a hang-up)."""

    def __init__(
        self, rules: Sequence[Rule], events: Path | None, watch: Callable[[dict[str, Any]], None], more: Sequence[str] = ()
    ) -> None:
        self.rules, self.events, self.watch, self.stop, self.more = list(rules), events, watch, False, more
        self.run: Run | None = None
        self.listening = contextlib.ExitStack()
        self.step: dict[str, float | Tensor] = {}
        self.loss: Any = 0.0  # of the step, whoever computes it

    def note(self, **event: Any) -> None:
        line = {"t": time.time(), **event}
        if self.events is not None:
            with self.events.open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
        self.watch(line)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, optimizer: Any = None, **kw: Any) -> None:
        assert model is not None
        if state.global_step > state.max_steps:
            raise Invalid(
                f"the run was trained to step {state.global_step} and {state.max_steps} steps are asked for: ask for as many or more"
            )
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"  # its folder may have moved since
        state.best_model_checkpoint = str(best) if state.best_global_step and best.is_dir() else None
        self.run = Run(model, dict(all_hosts(model)), optimizer, state.global_step, state.max_steps)
        if (shell := _shell(optimizer)) is not None:
            shell.attach()  # the Trainer has moved the model to its device since
        self.listening.enter_context(stoppable(self._asked))

    def _asked(self) -> None:
        self.stop = True
        self.note(event="phase", name="stopping after this step; press Ctrl-C again to stop at once")

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kw: Any) -> None:
        self.listening.close()
        if (shell := _shell(optimizer)) is not None:
            shell.detach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        assert self.run is not None
        self.run.step, self.loss = state.global_step, 0.0
        self.step = {"loss": 0.0, "tokens": 0, "seen": 0} | dict.fromkeys(self.more, 0.0)
        for rule in self.rules:
            rule.before_forward(self.run)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        assert self.run is not None
        trained = [p for p in self.run.model.parameters() if p.grad is not None]
        self._sound("the loss", args, state.global_step + 1, state.max_steps, [self.loss])
        self._sound(
            "the gradient of the loss", args, state.global_step + 1, state.max_steps, [p.grad for p in trained if p.grad is not None]
        )
        for rule in self.rules:
            rule.after_backward(self.run)

    def _sound(self, what: str, args: Any, step: int, total: int, numbers: Sequence[Any]) -> None:
        lower = f"lower training.learning_rate ({args.learning_rate:g} now)"
        if args.max_grad_norm == 0:
            lower += ", or set training.max_grad_norm (0 now, so that no gradient is cut)"
        try:
            sound(what, f"step {step} of {total}", sharding.seen(numbers), lower)
        except Diverged as e:
            self.note(event="phase", name=str(e))
            raise

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        assert self.run is not None
        self.run.step = state.global_step + 1
        for rule in self.rules:
            rule.after_step(self.run)

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> Any:
        held = [p for p in self.run.model.parameters() if p.requires_grad] if self.run is not None else []
        trained = [t for p in held for t in parts_of("", p).values() if t.is_floating_point()]
        self._sound("a weight behind the loss", args, state.global_step, state.max_steps, trained)
        seen = torch.tensor([*(float(v) for v in self.step.values()), float(self.stop)], device=args.device)
        if args.world_size > 1:
            distributed.all_reduce(seen)
            self.stop = bool(seen[-1])  # of one is of all
            seen[:-1] /= torch.tensor([1 if k in ("tokens", "seen") else args.world_size for k in self.step], device=args.device)
        rate = float(kw["lr_scheduler"].get_last_lr()[0]) / kw["optimizer"].param_groups[0].get("rate", 1.0)
        done = {"step": state.global_step, "total": state.max_steps, "lr": rate, "rss": resident()}
        done |= {"device": torch.cuda.memory_reserved()} if torch.cuda.is_available() and torch.cuda.memory_reserved() else {}
        self.note(event="step", **done, **dict(zip(self.step, seen[:-1].tolist(), strict=True)))
        if self.stop:
            control.should_save, control.should_training_stop = True, True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kw: Any) -> None:
        found = {k.removeprefix("eval_"): v for k, v in (metrics or {}).items() if k.startswith("eval_")}
        self._sound("the loss on the held-out rows", args, state.global_step, state.max_steps, [found["loss"]])
        name = args.metric_for_best_model or "loss"
        before, best = (state.best_metric, state.best_global_step), (found[name], state.global_step)
        if before[0] is not None and not (best[0] > before[0] if args.greater_is_better else best[0] < before[0]):
            best = before
        self.note(event="eval", step=state.global_step, **found, best=best[0], best_step=best[1])

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.note(event="save", step=state.global_step)


def _shell(optimizer: Any) -> Shell | None:
    """The optimizer that steps weights one at a time, inside of what the Trainer has made of it."""
    own = getattr(optimizer, "optimizer", optimizer)
    return own if isinstance(own, Shell) else None


class BudgetTrainer(Cutting):
    """Trainer with finebits' order, loss, rules and events. Made by `trainer`."""

    model: Any
    moments: Moments
    task: tasks.Task
    loss_chunk: int
    data_order: Sampler[int]
    held: Sequence[Batch]  # held-out rows, to evaluate on meanwhile
    kept: int | None  # checkpoints that stay, the last ones, beside the best where that is looked for
    smoothing: float
    preferring: Preferring | None = None  # where whole answers are compared
    trained: frozenset[str]  # names of parameters, whether or not they are trained at the moment
    optimizer_kind: Optimizer | None = None  # where it is none that transformers has a name for
    gathered: Mapping[str, Tensor]  # what is trained, whole, while a checkpoint is written
    saving = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Ours where args.optim names one of them (finebits.optim), over the parameters that the Trainer decays and those that it does not; with
        what the rules ask of its settings. A model that is to be cut among processes is cut by then."""
        if said := self.cut():
            self.moments.note(event="phase", name=said)
        args, name = self.args, str(getattr(self.args.optim, "value", self.args.optim))
        stock = known().get(name)
        kind = self.optimizer_kind or (stock if stock is not None and stock.hf == name and not args.optim_args else None)
        if self.optimizer is None and kind is not None:
            parts = self._groups(self.model if model is None else model, args.weight_decay)
            betas = args.adam_beta1, args.adam_beta2
            self.optimizer = made(kind, parts, args.learning_rate, betas, args.adam_epsilon, args.seed)
        optimizer = super().create_optimizer(model)
        factor(optimizer, self.moments.rules, Run(self.model, dict(all_hosts(self.model)), optimizer))
        return optimizer

    def _groups(self, model: Any, decay: float) -> list[dict[str, Any]]:
        """Parameters by whether they decay, those that are matrices of the model apart from all others where there are any."""
        decayed = set(self.get_decay_parameter_names(model))
        matrices = {f"{name}.weight" for name, _ in hosts(model)}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(d, m): [] for m in (False, True) for d in (True, False)}
        for n, p in model.named_parameters():
            if p.requires_grad:
                groups[n in decayed, n in matrices].append(p)
        settings = {
            key: {"weight_decay": decay if key[0] else 0.0} | ({"matrices": key[1]} if self.optimizer_kind else {}) for key in groups
        }
        return [{"params": held} | settings[key] for key, held in groups.items() if held or not key[1]]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As the Trainer has it, but for what computes in float32 whatever the model is held in (`Adapter.kept`): routers keep their scale."""
        kept = {f"{n}.p.{a}.{k}" for n, host in carriers(model) for a, kind in host.kinds.items() for k in kind.kept}
        return [name for name in super().get_decay_parameter_names(model) if name not in kept]

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        several = self.args.average_tokens_across_devices and self.args.world_size > 1
        if self.preferring is None:
            found = sum(tasks.labelled(b, self.task) for b in batch_samples)
        else:
            self.preferring.measure(self.around, batch_samples, self.args.device, several)
            found = self.preferring.count(batch_samples)
        count = torch.tensor(found, device=device)
        return cast(Tensor, self.accelerator.gather(count)).sum() if several else count

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.data_order

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if unwrapped(model) is not self.model:
            loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            loss, seen = self._found(model, inputs)
            count = seen.pop("count")
            share = 1 / max(float(count if num_items_in_batch is None else num_items_in_batch), 1.0)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                share *= self.accelerator.num_processes  # those of all processes were counted, and gradients are averaged over them
            loss = loss * share
            if self.model.training:
                self.moments.step["seen"] += self.task.inputs(inputs)
                for k, v in seen.items():
                    self.moments.step[k] += v if k == "tokens" else v * share
        run = self.moments.run
        if self.model.training and self.moments.rules and run is not None:
            loss = loss + sum(rule.penalty(run) for rule in self.moments.rules) / self.current_gradient_accumulation_steps
        return loss

    def _found(self, model: Any, inputs: Batch) -> tuple[Tensor, dict[str, Any]]:
        """(the sum of a batch's losses, what is seen of it): how many there are (count) and sums of what is shown, detached."""
        if self.preferring is None:
            tokens = tasks.labelled(inputs, self.task)
            loss = self.task.loss(model, inputs, self.loss_chunk, self.smoothing)
            return loss, {"count": tokens, "loss": loss.detach(), "tokens": tokens}
        loss, sums = self.preferring.found(model, inputs)
        return loss, {"count": self.preferring.count([inputs])} | dict(zip(("loss", "accuracy", "margin", "tokens"), sums, strict=True))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over the held-out rows, with the task's own loss (or the objective's); they leave no trace in what is trained."""
        rank, world = self.args.process_index, self.args.world_size
        sums: dict[str, Tensor] = {}
        if self.preferring is not None:
            own, last = self.held[rank::world], self.held[-1:]
            self.preferring.measure(self.around, own, self.args.device, world > 1, [*last] * (-(-len(self.held) // world) - len(own)))
        smoothing, self.smoothing = self.smoothing, 0.0
        with evaluating(self.model):
            for i in range(-(-len(self.held) // world)):  # all processes make as many passes
                batch = self.held[min(i * world + rank, len(self.held) - 1)]
                _, seen = self._found(self.around, {k: v.to(self.args.device) for k, v in batch.items()})
                counts = float(i * world + rank < len(self.held))
                for k, v in seen.items():
                    part = torch.as_tensor(v, dtype=torch.float64, device=self.args.device) * counts
                    sums[k] = sums[k] + part if k in sums else part
        self.smoothing = smoothing
        self.let_go()
        if world > 1:
            for total in sums.values():
                distributed.all_reduce(total)
        count = float(sums.pop("count").clamp(min=1))
        metrics = {f"{metric_key_prefix}_{k}": float(v) / count for k, v in sums.items() if k != "tokens"}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note the best; where save_strategy is best, the state is saved after every evaluation, so that a run that is killed goes on from the
        last one, and the best stays beside it."""
        super()._determine_best_metric(metrics, trial)
        return True

    def _load_best_model(self) -> None:
        if not self.moments.stop and self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _run_epoch(self, *args: Any, **kw: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # transformers takes a step first, also of a run that had taken all
            return super()._run_epoch(*args, **kw)
        self.control.should_training_stop = True

    def training_step(self, *args: Any, **kw: Any) -> Any:
        loss = super().training_step(*args, **kw)
        self.moments.loss = self.moments.loss + loss.detach()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "grad_norm" in logs:
            self.moments.note(event="log", step=self.state.global_step, **{k: v for k, v in logs.items() if isinstance(v, (int, float))})
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), SAVING if self.saving else "")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written beside the others and renamed when it is whole; then those before it go, but for as many as are to be kept."""
        folder, first, self.gathered = Path(self._get_output_dir(trial)), self.args.should_save, self.whole()
        with files.writing(folder):
            if first:
                shutil.rmtree(folder / SAVING, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.saving, self.gathered = False, {}
            self.accelerator.wait_for_everyone()
            if first:
                (checkpoint,) = (folder / SAVING).iterdir()
                best = folder / f"checkpoint-{self.state.best_global_step}"
                there = self.state.best_global_step and (best.is_dir() or best.name == checkpoint.name)
                self.state.best_model_checkpoint = str(best) if there else None
                self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
                artefacts.record(checkpoint, CHECKPOINT)
                artefacts.remove(folder / checkpoint.name)
                os.replace(checkpoint, folder / checkpoint.name)
                (folder / SAVING).rmdir()
                for old in checkpoints(folder)[: -self.kept] if self.kept else []:
                    if not (self._keeps_best and old == best):
                        artefacts.remove(old)

    @property
    def _keeps_best(self) -> bool:
        return self.args.load_best_model_at_end or self.args.save_strategy == SaveStrategy.BEST

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What was trained, and the rules: the frozen base is made again from the plan."""
        folder = Path(output_dir or cast(str, self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: t.detach().contiguous() for k, t in self.gathered.items()}, folder / TRAINED)
        if self.moments.rules:
            torch.save([r.state_dict() for r in self.moments.rules], folder / RULES)

    def _parts(self) -> dict[str, Tensor]:
        """The tensors of all that is trained, those of weights in codes by their parts."""
        held = {k: p for k, p in self.model.named_parameters() if k in self.trained}
        return {name: t for k, p in held.items() for name, t in parts_of(k, p.data).items()}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / TRAINED).exists():
            raise Invalid(f"{folder} holds no {TRAINED}, so it is no checkpoint of finebits: name another, or start anew")
        saved = load_file(folder / TRAINED)
        trained = self._parts()
        if saved.keys() != trained.keys():
            raise Invalid(f"{folder} was saved by a run with other adapters: resume with its own plan, or start anew")
        for k, t in trained.items():
            sharding.write(t, saved[k])
        if self.moments.rules:
            for rule, state in zip(self.moments.rules, torch.load(folder / RULES, weights_only=True), strict=True):
                rule.load_state_dict(state)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, those of more steps last; a damaged one, or one of another program, is none."""
    intact = [p for p in folder.glob("checkpoint-*") if artefacts.recorded(p).get("schema") == CHECKPOINT and artefacts.intact(p)]
    return sorted(intact, key=lambda p: int(p.name.rpartition("-")[2]))


def resident() -> int:
    """Bytes of this process in memory now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096
    except OSError:
        return 0


def own_kind(optim: Any) -> Optimizer | None:
    """An optimizer with settings of its own, or one that transformers has no name for; None where the Trainer knows what is meant.

    >>> own_kind("adamw_torch") is None, own_kind(known()["sgd"]) == known()["sgd"]
    (True, True)
    """
    if isinstance(optim, Optimizer):
        return optim
    kind = known().get(str(getattr(optim, "value", optim)))
    return kind if kind is not None and not kind.hf else None


def trainer(
    model: Any,
    processor: Any,
    examples: Dataset | Sequence[Mapping[str, list[int]]],
    output_dir: str | Path,
    training: Mapping[str, Any],
    rules: Sequence[Rule] = (),
    *,
    loss_chunk: int = 256,
    events: Path | None = None,
    watch: Callable[[dict[str, Any]], None] = lambda event: None,
    held: Sequence[Any] = (),
    objective: Objective | None = None,
    patience: tuple[int, float] | None = None,
) -> BudgetTrainer:
    """A trainer over rows (input_ids, labels), perhaps made by `dataset`.

    `training` holds SFTConfig names; what it leaves out is SFTConfig's default, but for packing, truncation and reporting, which are off here.
    It is evaluated on the batches `held`, where `training` says so, and stops after so many evaluations in turn that gain no more than so
    much (`patience`). Where an `objective` compares answers, `examples` and `held` are rows of tokens that say whether they are liked, and the
    model is as it starts: that is when the reference is asked.
    """
    shards = sharding.taken()
    seed, first = training.get("seed", 42), next(model.parameters())
    device = first.device.type
    build = built(model)
    positions, learned = positions_of(model.config.get_text_config(), model)
    most = positions if learned else None
    plain = Levers(dtype=str(first.dtype).removeprefix("torch."), max_length=most or Levers.max_length)
    levers = plain if build is None else build.plan.levers
    levers = replace(levers, device=device, positions=most if levers.positions is None else levers.positions)
    settings = {
        "report_to": "none",
        "use_cpu": device == "cpu",
        "bf16": False,
        "fp16": False,
        "packing": False,
        "max_length": None,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": patience is not None,
    }
    task, multiple = tasks.of(model), levers.rounding
    wanted = settings | dict(training)
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__ and "gradient_checkpointing" in wanted:
        wanted["activation_checkpointing"] = wanted.pop("gradient_checkpointing")  # the name that transformers is moving to
    keep, smoothing = wanted.pop("save_total_limit", None), float(wanted.pop("label_smoothing_factor", 0.0))
    kind = own_kind(wanted.get("optim"))
    wanted |= {} if kind is None else {"optim": "adamw_torch"}  # which nobody makes then
    args = SFTConfig(output_dir=str(output_dir), **wanted)
    if kind is not None and kind.layerwise:
        refuse_layerwise(args.gradient_accumulation_steps, args.max_grad_norm, args.world_size, bool(rules))
    collate: Callable[[Any], dict[str, Tensor]] = lambda rows: task.batch(rows, processor, multiple)  # noqa: E731
    together, preferring, more = 1, None, ()
    if objective is None:
        rows: Any = examples if isinstance(examples, Dataset) else dataset(examples)
        if "segments" in rows.column_names:
            try_packs(task, model, processor, rows.select(range(min(len(rows), 64))))
    else:
        preferring, together, more = (
            Preferring(objective, task, processor, multiple, loss_chunk),
            objective.together,
            ("accuracy", "margin"),
        )
        per, evaluated = args.per_device_train_batch_size, args.eval_strategy != "no" or args.eval_on_start
        check_sizes(objective, per, args.per_device_eval_batch_size if evaluated else 0)
        given = preferring.rows(examples)
        used = met(lengths_of(given), per, seed, args.gradient_accumulation_steps, args.max_steps, args.num_train_epochs, together)
        preferring.refer(model, given, per, {i for batch in used for i in batch} if args.world_size == 1 else None)
        asked = preferring.rows(held) if evaluated else []
        preferring.refer(model, asked, args.per_device_eval_batch_size)
        rows, held = Rows(given), held_batches(preferring, asked, args.per_device_eval_batch_size)
        collate = preferring.batch
    moments = Moments(rules, events if args.process_index == 0 else None, watch, more)
    callbacks: list[TrainerCallback] = [moments]
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(*patience))
    engine = BudgetTrainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=Rows(held) if held else None,
        processing_class=processor,
        callbacks=callbacks,
    )
    engine.remove_callback(PrinterCallback)
    engine.held, engine.kept, engine.smoothing, engine.preferring = held, keep, smoothing, preferring
    engine.moments, engine.loss_chunk, engine.task, engine.model_accepts_loss_kwargs = moments, loss_chunk, task, True
    engine.shards, engine.optimizer_kind, engine.trained = (
        shards,
        kind,
        frozenset(k for k, p in model.named_parameters() if p.requires_grad),
    )
    engine.data_order = Order(lengths_of(rows), args.per_device_train_batch_size * args.world_size, seed, together)
    return engine
