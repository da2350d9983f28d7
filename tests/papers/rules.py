"""What papers of training rules are shown on: one linear under an adapter, a step of a run, a small transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import finebits as fb
from finebits.plan.base import Plan, Spec
from finebits.rules.base import Rule, Run


def linears(adapter: Any, sizes: Sequence[tuple[int, int]] = ((7, 5),), seed: int = 0) -> nn.Module:
    """Linears (out, in) side by side, called 0, 1, …, whose adapters are somewhere on the way."""
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in sizes)
    fb.build(model, Plan({str(i): Spec(adapter=adapter) for i in range(len(sizes))}))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) / 2)
    return model


def tensors(model: nn.Module, name: str = "0") -> dict[str, nn.Parameter]:
    return dict(model.get_submodule(name).p["default"].items())


def step(model: nn.Module, rule: Rule, loss: Any, optimizer: torch.optim.Optimizer, at: int = 0, total: int = 10) -> Run:
    """One step of a run with all four moments."""
    run = Run(model, dict(fb.hosts(model)), optimizer, at, total)
    model.train()
    optimizer.zero_grad()
    rule.before_forward(run)
    (loss(model) + rule.penalty(run)).backward()
    rule.after_backward(run)
    optimizer.step()
    run.step += 1
    rule.after_step(run)
    return run


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


WORDS = 40


def llama(adapter: Any = None, layers: int = 3, **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=WORDS, pad_token_id=0, **more))
    names = [n for n, m in made.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    built = fb.build(made, Plan(dict.fromkeys(names, Spec(format=fb.NF(4, block=16), adapter=adapter or fb.LoRA(rank=2, alpha=4.0)))))
    with torch.no_grad():
        for p in built.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return built


def recomputing(model: Any) -> Any:
    """The same, whose blocks are computed again on the way back."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def words(rows: int = 2, length: int = 6, pad: int = 0) -> dict[str, Tensor]:
    """A batch, of whose rows but the first the last `pad` tokens are padding."""
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (rows, length), generator=gen)
    mask = torch.ones_like(ids)
    if pad:
        ids[1:, -pad:], mask[1:, -pad:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
