"""Training at the size of an 8B model with random weights: steps of ours, and of PEFT over bitsandbytes or 16 bits."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from gpu_found import Out, caught, installed

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("ours, nf4", "PEFT + bitsandbytes")
MORE = ("ours, nf3", "PEFT, 16-bit LoRA")
RANK, STEPS, WARM = 16, 10, 2


def train(out: Out, device: str, contender: str) -> None:
    """Ten steps at each length: tokens a second, the allocator's peak, and for ours what the plan said."""
    import torch

    if contender == "PEFT + bitsandbytes" and not installed("bitsandbytes"):
        return out.set(note="bitsandbytes is not installed here")
    real = device == "cuda"
    small = installed("bitsandbytes") and real
    folder = ROOT / "recipes/configs/llama-3.1-8b" if real else _small_config(out.path.parent)
    lengths = (1024, 2048) if real else (64,)
    start = time.perf_counter()
    if contender.startswith("ours"):
        model, plans = _ours(folder, device, lengths, int(contender[-1]), small)
    else:
        model, plans = _peer(folder, device, quantized="bitsandbytes" in contender), {}
    trained = [p for p in model.parameters() if p.requires_grad]
    built = {"seconds": round(time.perf_counter() - start, 1), "trained numbers": sum(p.numel() for p in trained)}
    out.set(contender=contender, built=built, optimizer="8-bit Adam" if small else "torch.optim.AdamW")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    for length in lengths:
        with caught(out, f"{contender}, {length} tokens"):
            row = {"tokens": length, **_steps(model, trained, device, length, contender.startswith("ours"), small)}
            if length in plans:
                plan = plans[length]
                row |= {"planned": plan.peak - plan.memory["runtime"], "planned runtime": plan.memory["runtime"], "terms": plan.memory}
                if row["peak"]:
                    row["planned over peak"] = round(row["planned"] / row["peak"], 4)
            out.add("rows", row)
        for p in trained:
            p.grad = None
        if real:
            torch.cuda.empty_cache()


def _small_config(place: Path) -> Path:
    """The same architecture for a CPU."""
    folder = place / "small"
    folder.mkdir(exist_ok=True)
    config = json.loads((ROOT / "recipes/configs/llama-3.1-8b/config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 512, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}))
    return folder


def _random(shape: Any, device: str) -> Any:
    import torch

    return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02


def _rest(model: Any, leave: frozenset[str], device: str) -> Any:
    """Random values on the device for every parameter that is still on the meta device; norms are one."""
    import torch

    for name, p in list(model.named_parameters()):
        if p.device.type == "meta" and name not in leave:
            owner, _, leaf = name.rpartition(".")
            value = torch.ones(p.shape, device=device, dtype=torch.bfloat16) if p.ndim == 1 else _random(p.shape, device)
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model


def _ours(folder: Path, device: str, lengths: tuple[int, ...], bits: int, small: bool) -> tuple[Any, dict[int, Any]]:
    """(built model, plan by length): every matrix is made on the device, quantized there, and forgotten."""
    import torch

    import finebits as fb
    from finebits.build import build
    from finebits.interop.hf import skeleton
    from finebits.interop.planning import Settings

    def plan(length: int) -> Any:
        settings = Settings(
            formats=(fb.NF(bits, block=64, scale="bf16"),), adapter=fb.LoRA(rank=RANK, alpha=RANK), init=fb.Zeros(), device=device,
            dtype="bfloat16", max_length=length, per_device_train_batch_size=1, loss_chunk=512, objective="weight",
            optim="adamw_bnb_8bit" if small else "adamw_torch",
        )  # fmt: skip
        return fb.plan_model(folder, None, settings=settings, fast=True)

    plans = {length: plan(length) for length in lengths}
    made = plans[lengths[0]]
    model = skeleton(folder, torch.bfloat16)
    _rest(model, frozenset(f"{name}.weight" for name in made.modules), device)
    shapes = {name: model.get_submodule(name).weight.shape for name in made.modules}
    build(model, made, read=lambda name: _random(shapes[name], device))
    return model.to(device), plans


def _peer(folder: Path, device: str, quantized: bool) -> Any:
    """PEFT's LoRA over bitsandbytes' NF4 with double quantization, or over bf16."""
    import torch
    from peft import LoraConfig, get_peft_model

    from finebits.interop.hf import skeleton

    model = skeleton(folder, torch.bfloat16)
    linears = [name for name, m in model.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"]
    if quantized:
        import bitsandbytes as bnb

        for name in linears:
            owner, _, leaf = name.rpartition(".")
            old = model.get_submodule(name)
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            W = _random(old.weight.shape, device)
            new.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new)
            setattr(model.get_submodule(owner), leaf, new.to(device))
        model.is_loaded_in_4bit = True
    _rest(model, frozenset(), device)
    for p in model.parameters():
        p.requires_grad_(False)
    return get_peft_model(model.to(device), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linears, task_type="CAUSAL_LM"))


def _steps(model: Any, trained: list[Any], device: str, length: int, chunked: bool, small: bool) -> dict[str, Any]:
    """Ours with its loss in chunks; the peer as Trainer runs it with bf16=True, under autocast and with its own loss."""
    import torch

    from finebits.tasks.causal_lm import CausalLM

    if small:
        import bitsandbytes as bnb

        optimizer = bnb.optim.AdamW8bit(trained, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
    real = device == "cuda"
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if real:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def loss() -> Any:
        if chunked:
            return CausalLM().loss(model, batch, 512) / (length - 1)
        with torch.autocast(device, torch.bfloat16):
            return model(**batch).loss

    seconds, losses = [], []
    for _ in range(WARM + (STEPS if real else 1)):
        start = time.perf_counter()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))  # waits for the device
        if real:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[WARM:])
    peaks = (
        {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()} if real else {"peak": 0, "reserved": 0}
    )
    return {"step seconds": step, "tokens a second": length / step, **peaks, "first loss": losses[0], "last loss": losses[-1]}
