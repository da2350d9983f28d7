"""What every rank of a model that is cut does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import finebits as fb
from finebits.optim.base import known
from finebits.plan.base import Plan, Spec
from variants import methods

HELD = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.5}


class Net(nn.Module):
    """Blocks between two layers that are in none."""

    def __init__(self, middle: int) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(32, 64), nn.Linear(64, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, middle), nn.Tanh(), nn.Linear(middle, 64)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.after(x)


def net(kind: Any, middle: int) -> nn.Module:
    """With every tensor of the adapters somewhere else than where it starts, so that all have a gradient."""
    torch.manual_seed(0)
    spec = Spec(None if kind.itself else kind.candidates[0] if kind.form == "codes" else fb.NF(3, block=16), adapter=kind)
    made = fb.build(Net(middle), Plan({f"layers.{i}.{j}": spec for i in (0, 1) for j in (0, 2)}))
    gen = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
    return made


def far(kind: Any, middle: int) -> float | None:
    """How far gradients of two ranks with a half of the rows each are from those of one process; None where other tensors have one."""
    from finebits.interop import sharding

    gen, rank = torch.Generator().manual_seed(1), int(os.environ["RANK"])
    x, y = torch.randn(8, 32, generator=gen), torch.randn(8, 16, generator=gen)

    def of(wrap: Callable[[nn.Module], nn.Module], rows: slice) -> dict[str, Tensor]:
        model = net(kind, middle)
        (wrap(model)(x[rows]) - y[rows]).square().mean().backward()
        return sharding.whole({k: p.grad for k, p in model.named_parameters() if p.requires_grad and p.grad is not None})

    one = of(lambda model: model, slice(None))
    both = of(lambda model: sharding.Shards().cut(model, "cpu"), slice(4 * rank, 4 * rank + 4))
    return apart(one, both)


def apart(one: dict[str, Tensor], both: dict[str, Tensor]) -> float | None:
    if not one or one.keys() != both.keys():
        return None
    return max(float((both[k] - g).norm() / g.norm().clamp(min=1e-6)) for k, g in one.items())


def gradients() -> dict[str, float | None]:
    """Of every adapter over matrices, and of LoRA over weights whose rows two ranks cannot share."""
    found = {"odd": far(fb.LoRA(rank=3), 33)}
    for kind in (cls() for cls in methods("adapters")):
        if kind.over == "matrix":
            found[type(kind).__name__] = far(kind, 64)
    return found


def places() -> dict[str, float | None]:
    """The same of adapters over what is no matrix: a feed-forward sublayer, attention, the model, embeddings that a head follows."""
    from finebits.anatomy import found as places_of
    from finebits.interop import sharding
    from finebits.tasks import base as tasks
    from tiny_llama import fresh, names

    rank, found = int(os.environ["RANK"]), dict[str, float | None]()
    ids = torch.randint(3, 120, (4, 9), generator=torch.Generator().manual_seed(4))

    def of(kind: Any, wrap: Callable[[nn.Module], nn.Module], rows: slice) -> dict[str, Tensor]:
        model = fresh(seed=1, tie_word_embeddings=True)
        over = ["model.embed_tokens"] if kind.over == "matrix" else places_of(model, kind.over)
        model = fb.build(model, Plan(dict.fromkeys(names(), Spec(fb.NF(3, block=16))), over=dict.fromkeys(over, kind), tied=True))
        gen, batch = (
            torch.Generator().manual_seed(6),
            {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": ids[rows]},
        )
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
        (tasks.of(model).loss(wrap(model), batch) / batch["labels"][:, 1:].numel()).backward()
        return sharding.whole({k: p.grad for k, p in model.named_parameters() if p.requires_grad and p.grad is not None})

    for kind in (fb.MixLoRA(rank=2, experts=3), fb.PrefixTuning(tokens=3), fb.PromptTuning(tokens=3), fb.LoRA(rank=2)):
        one = of(kind, lambda model: model, slice(None))
        both = of(kind, lambda model: sharding.Shards().cut(model, "cpu"), slice(2 * rank, 2 * rank + 2))
        found[kind.over if kind.over != "matrix" else "table"] = apart(one, both)
    return found


def dense() -> Any:
    """All matrices trained themselves, and the gains of norms and the head with them."""
    from tiny_llama import fresh, names

    return fb.build(fresh(seed=1), Plan(dict.fromkeys(names(), Spec(adapter=fb.Full())), trained=("model.norm", "lm_head")))


def run(folder: Path, size: int) -> dict[str, Any]:
    from finebits.data.tokens import to_batch
    from finebits.interop import sharding
    from finebits.objectives.kto import KTO
    from training.small import rows, trained
    from training.test_objectives import pairs

    held = [to_batch(rows(4, seed=9), 0), to_batch(rows(3, seed=8), 0), to_batch(rows(1, seed=7), 0)]
    rates = lambda: [fb.LoRAPlus(4.0), fb.LayerwiseLR(0.9), fb.LayerDrop(0.4, seed=3)]  # noqa: E731
    runs: dict[str, dict[str, Any]] = {
        "lora": {"held": held, "rules": rates(), "gradient_checkpointing": True},
        "again": {
            "held": held,
            "rules": rates(),
            "gradient_checkpointing": True,
            "max_steps": 4,
            "resume": str(folder / "lora" / "checkpoint-2"),
        },
        "passes": {"gradient_accumulation_steps": 2, "rows": 24},
        "kto": {"objective": KTO(), "held": pairs(3), "examples": pairs(8)},
        "full": {"made": dense(), "held": held, "learning_rate": 1e-3},
        "lion": {"made": dense(), "optim": known()["lion"], "learning_rate": 1e-4},
        "sgd": {"made": dense(), "optim": "sgd", "weight_decay": 0.1},
    }
    found: dict[str, Any] = {}
    for name, more in runs.items():
        more |= {"examples": rows(more.pop("rows"))} if "rows" in more else {}
        settings = HELD | ({} if "held" in more else {"eval_strategy": "no"})
        events = folder / f"{name}.jsonl"
        place = folder / ("lora" if name == "again" else name)
        engine = trained(place, events=events, **settings | {"per_device_train_batch_size": size, "per_device_eval_batch_size": 2} | more)
        whole = sharding.whole(dict(engine.model.named_parameters()))
        lines = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
        found[name] = {
            "around": type(engine.model_wrapped).__name__,
            "bytes": sharding.bytes_of(engine.model),
            "losses": [e["loss"] for e in lines if e["event"] == "step"],
            "norms": [e["grad_norm"] for e in lines if e["event"] == "log"],
            "evals": [e["loss"] for e in lines if e["event"] == "eval"],
            "weights": {k: p.double().norm().item() for k, p in whole.items() if p.requires_grad},
            "state": sum(
                sharding.local(t).nbytes for state in engine.optimizer.state.values() for t in state.values() if torch.is_tensor(t)
            ),
            "saved": sorted(p.name for p in place.glob("checkpoint-*")),
        }
    return found
