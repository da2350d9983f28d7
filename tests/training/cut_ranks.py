"""What every rank of a model that is cut does: `python -m training.cut_ranks FOLDER`. The first one writes what it found."""

from __future__ import annotations

import json
import os
import sys
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
    """Blocks of which the second layer has an odd number of rows, between two layers that are in none."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(32, 32), nn.Linear(32, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 33), nn.Tanh(), nn.Linear(33, 32)) for _ in "ab"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.after(x)


def net(kind: Any) -> nn.Module:
    """With every tensor of the adapters somewhere else than where it starts, so that all have a gradient."""
    torch.manual_seed(0)
    spec = Spec(None if kind.itself else fb.NF(3, block=16), adapter=kind)
    made = fb.build(Net(), Plan({f"layers.{i}.{j}": spec for i in (0, 1) for j in (0, 2, 4)}))
    gen = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
    return made


def gradients() -> dict[str, float | None]:
    """Of every adapter over matrices, how far gradients of two ranks with a half of the rows each are from those of one process; None where
    other tensors have one."""
    from finebits.interop import sharding

    gen, rank, found = torch.Generator().manual_seed(1), int(os.environ["RANK"]), dict[str, float | None]()
    x, y = torch.randn(8, 32, generator=gen), torch.randn(8, 16, generator=gen)
    for cls in methods("adapters"):
        kind: Any = cls()
        if kind.over != "matrix" or kind.form == "codes":
            continue

        def of(model: nn.Module, wrap: Callable[[nn.Module], nn.Module], rows: slice) -> dict[str, Tensor]:
            (wrap(model)(x[rows]) - y[rows]).square().mean().backward()
            return sharding.whole({k: p.grad for k, p in model.named_parameters() if p.requires_grad and p.grad is not None})

        one = of(net(kind), lambda model: model, slice(None))
        both = of(net(kind), lambda model: sharding.Shards().cut(model, "cpu"), slice(4 * rank, 4 * rank + 4))
        far = (
            max((float((both[k] - g).norm() / g.norm().clamp(min=1e-6)) for k, g in one.items()), default=9.0)
            if one.keys() == both.keys()
            else None
        )
        found[cls.__name__] = far
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Path(sys.argv[1])
    result = {"runs": run(here, 2), "gradients": gradients()}
    if os.environ["RANK"] == "0":
        (here / "found.json").write_text(json.dumps(result))
