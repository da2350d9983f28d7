"""PEFT as a boundary: stock folders out, and the proof that stock libraries compute what was trained.

Export target `adapter` is one folder: a PEFT adapter at its root and, in `base/`, the dense model that it belongs to. Target `merged` is
one transformers folder. Both are written beside their place and then moved into it, file by file.

What the tolerance of `verify` applies to. Two models in half precision differ by their rounding, which says nothing about the files; so
the largest logit difference is taken with both sides computing in float32: the exported files as the stock libraries read them, and our
model with the weights that it has (evaluate/exact.py). For `adapter` this difference must not exceed the tolerance: same weights, same
function. `merged` rounds base plus update once more, to bf16; the difference is reported and may make the verdict "same". For both, KL from
the trained model as it runs (packed, in its own dtype) must be small, which ties the proof to what was trained and evaluated, kernels included;
and the two losses in float32 must agree, since rounding moves the loss of unlikely words by more than a wrong file might.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finebits import causal_lm, files
from finebits.errors import Invalid
from finebits.evaluate.exact import float32
from finebits.evaluate.heldout import Batch, Head, Hidden, Teacher, evaluating, head_of, own, score, teacher
from finebits.export import (
    FORMAT,
    VerificationFailed,
    base_entries,
    card,
    check_size,
    merged_entries,
    portable,
    target_modules,
    write_model,
)
from finebits.files import record, write_text
from finebits.interop.stock import Stock
from finebits.losses import IGNORED
from finebits.store import plan_of
from finebits.tensorfile import Entry, size, write

Target = Literal["adapter", "merged"]
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SCHEMAS = {"adapter": "finebits.adapter/1", "merged": "finebits.merged/1"}
KL, LOSS = 1e-2, 1e-2  # nats a token: more than half-precision arithmetic differs by, less than a wrong weight does


def to_peft(model: nn.Module, base: str) -> tuple[Any, dict[str, Tensor]]:
    """(peft.LoraConfig, tensors by PEFT's names) of the active adapters, for the base model named `base`: one rank r, lora_alpha = r.

    Raises ValueError that names the module whose adapter is not a low-rank update.
    """
    from peft import LoraConfig

    rank, products = portable(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules(model, list(products)),
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        init_lora_weights=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    tensors = {}
    for name, (L, R) in products.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = R
        tensors[f"base_model.model.{name}.lora_B.weight"] = L
    return config, tensors


def export(
    model: Any,
    folder: str | Path,
    target: Target,
    tokenizer: Any = None,
    *,
    base_name: str | None = None,
    data: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    memory: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `folder` for one target; returns its row of export.json as far as it is known without verification: name, path, bytes.

    The base is written in the plan's dtype, so that it holds exactly what training multiplied with; merged is bf16. `base_name` is what the
    adapter says that it belongs to, for example a hub id; otherwise `folder`/base as an absolute path. `data`, `recipe` and `memory` go
    into the cards. Files of others in `folder` stay. Raises ValueError for an adapter that is not low-rank, with target "adapter", and,
    without `overwrite`, if the folder holds another model or files of others under names that would be written.
    """
    plan, folder = plan_of(model), Path(folder)
    told: dict[str, Any] = {"data": data, "recipe": recipe, "memory": memory}
    name = folder.name
    if target == "merged":
        entries = merged_entries(model, torch.bfloat16)
        with files.folder(folder, SCHEMAS[target], overwrite) as new:
            bytes_ = write_model(model, entries, new, torch.bfloat16, tokenizer)
            write_text(new / "README.md", card(plan, "merged", title=name, **told))
            record(new, SCHEMAS[target], plan=plan.hash)
        return {"name": target, "path": str(folder), "bytes": bytes_}
    config, tensors = to_peft(model, base_name or str(folder.resolve() / "base"))
    dtype = _dtype(model)
    held = {k: Entry.of(t) for k, t in tensors.items()}
    with files.folder(folder, SCHEMAS[target], overwrite) as new:
        bytes_ = write_model(model, base_entries(model, dtype), new / "base", dtype, tokenizer)
        write_text(new / "base" / "README.md", card(plan, "base", title=f"{name}: base", **told))
        bytes_ += write(new / ADAPTER, held, FORMAT)
        check_size(new / ADAPTER, size(held, FORMAT))
        config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        write_text(new / "README.md", card(plan, "adapter", title=name, **told))
        record(new, SCHEMAS[target], plan=plan.hash)
    return {"name": target, "path": str(folder), "bytes": bytes_}


def verify(
    folder: str | Path,
    target: Target,
    model: Any,
    batches: Sequence[Batch],
    trained: Teacher | None = None,
    tolerance: float = 1e-3,
    chunk: int = 256,
) -> dict[str, Any]:
    """Run an exported folder through the modules of transformers and peft alone, block by block, and compare it with the trained model on
    held-out batches.

    Returns a row of export.json: name, path, bytes, max_logit_difference, kl, top1, loss, verdict ("same" or "ok"). `trained` is
    `teacher(model, batches)` of the model as it was trained, made here if not given. The head of this module says what must hold.
    Peak memory above the model: embeddings and head of the artefact, and one block of it in float32. Raises VerificationFailed (code 6).
    """
    folder = Path(folder)
    files.settle(folder)
    trained = trained or teacher(model, batches, dtype=_dtype(model))
    with evaluating(model), float32(model):
        reference = teacher(model, batches, dtype=torch.float32)
        exact = own(reference, batches, chunk=chunk).loss
    theirs = streamed(folder, target)
    states = theirs.hidden(batches)
    head = head_of(causal_lm.head(theirs.model))
    scores = score(theirs.model, batches, trained, chunk, states, head)
    difference = _max_difference(states, head, batches, reference, chunk)
    assert scores.kl is not None and scores.agree is not None
    kl, top1 = float(scores.kl.sum() / scores.tokens.sum()), float(scores.agree.sum() / scores.tokens.sum())
    same = difference <= tolerance
    ok = kl <= KL and abs(scores.loss - exact) <= LOSS and (same or target == "merged")
    result = {
        "name": target,
        "path": str(folder),
        "bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")),
        "max_logit_difference": difference,
        "kl": kl,
        "top1": top1,
        "loss": scores.loss,
        "verdict": "fail" if not ok else "same" if same else "ok",
    }
    if not ok:
        raise VerificationFailed(
            f"{folder} is not the model that was trained: largest logit difference {difference:.3g} (tolerance {tolerance:g}, "
            f"{'binding' if target == 'adapter' else 'reported only'}), KL {kl:.3g} (at most {KL:g}), "
            f"loss {scores.loss:.4f} against {exact:.4f} (at most {LOSS:g} apart)",
            result,
        )
    return result


def table(results: Sequence[dict[str, Any]], tolerance: float, rows: int) -> dict[str, Any]:
    """export.json."""
    return {"targets": list(results), "tolerance": tolerance, "rows": rows}


def stock(folder: Path, target: Target, dtype: torch.dtype = torch.float32) -> Any:
    """An exported folder as people load it, with transformers and peft alone."""
    from transformers import AutoModelForCausalLM

    if target == "merged":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    from peft import PeftModel

    _rank(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, folder).get_base_model()


def streamed(folder: Path, target: Target, dtype: torch.dtype = torch.float32) -> Stock:
    """What stock libraries make of an exported folder, with one block of it in memory."""
    if target == "merged":
        return Stock(folder, None, dtype)
    _rank(folder)
    return Stock(folder / "base", folder / ADAPTER, dtype)


def _rank(folder: Path) -> int:
    try:
        rank = json.loads((folder / CONFIG).read_text())["r"]
    except (FileNotFoundError, KeyError, ValueError) as e:
        raise Invalid(f"{folder} is not an exported adapter ({type(e).__name__}: {e}): export it again") from None
    assert rank >= 1
    return rank


def _max_difference(hidden: Hidden, head: Head, batches: Sequence[Batch], reference: Teacher, chunk: int) -> float:
    largest = 0.0
    with torch.no_grad():
        for i, b in enumerate(batches):
            y = b["labels"][:, 1:]
            ours, theirs = reference.batch(i), hidden(b)[:, :-1][y != IGNORED]
            for j in range(0, len(ours), chunk):
                gap = (reference.head(ours[j : j + chunk]) - head(theirs[j : j + chunk]).to(ours.device)).abs().max()
                largest = max(largest, float(gap))
    return largest


def _dtype(model: nn.Module) -> torch.dtype:
    return getattr(torch, plan_of(model).levers["dtype"])
