"""EVA: PEFT 0.21.2 of PyPI, tuners/lora/eva.py (get_eva_state_dict). Needs no checkout.

Layers a, b and c, rank 3 on average and rho 2, see inputs of 20 features: [Z; −Z] of each layer's Z, since PEFT subtracts the mean and this has
none. How many rows A has is the rank that the layer was given. "whitened" is layer a's A of rank 3 with whiten; "moved" is the same without
whiten for inputs [Z; −Z] + 1. One batch is passed twice, which is what PEFT takes at least: the directions are those of one pass.
"""

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch import Tensor, nn

from golden.values import keep, released

released("peft", "0.21.2")
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self, names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(20, 8, bias=False) for name in names})

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {name: self.layers[name](x) for name, x in inputs.items()}


def directions(rho: float, whiten: bool = False, **inputs: Tensor) -> dict[str, Tensor]:
    names = [f"layers.{name}" for name in inputs]
    config = LoraConfig(
        r=3,
        target_modules=names,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=0.0, whiten=whiten, adjust_scaling_factors=False),
    )
    plain = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    found = get_eva_state_dict(Net("".join(inputs)), [inputs], config, **plain)
    return {name.removeprefix("layers."): A for name, A in found.items()}


def inputs(*shares: float) -> Tensor:
    """30 rows whose first directions explain these shares; what they leave is spread over the others."""
    left, right = torch.linalg.qr(torch.randn(30, 20)).Q, torch.linalg.qr(torch.randn(20, 20)).Q
    rest = torch.full((20 - len(shares),), (1 - sum(shares)) / (20 - len(shares)))
    return (10 * left * torch.cat([torch.tensor(shares), rest]).sqrt() @ right).round(decimals=2)


Z = {"a": inputs(0.23, 0.2, 0.18, 0.15, 0.13, 0.1), "b": inputs(0.45, 0.3, 0.15, 0.07), "c": inputs(0.9, 0.08, 0.015)}
both = {name: torch.cat([z, -z]) for name, z in Z.items()}
found = directions(2.0, **both)
keep(
    "eva",
    **{f"Z_{name}": z for name, z in Z.items()},
    **{f"A_{name}": found[name] for name in Z},
    whitened=directions(1.0, whiten=True, a=both["a"])["a"],
    moved=directions(1.0, a=both["a"] + 1)["a"],
)
