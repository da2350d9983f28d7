"""KaSA by its authors: github.com/juyongjiang/KaSA at f85e88c22d0fa4cb8ab2923d7c2bf1bbec152da3, their fork of PEFT (tuners/lora/layer.py).

A 31 x 19 weight (tall) and a 19 x 31 one (wide), rank 4 and alpha 6: the base that is left of each, the update of the tall one
(get_delta_weight) with factors A, B and the diagonal given, and what the layer then makes of x.
"""

import sys

import torch
from torch import nn

from golden.values import checkout, keep

sys.path.insert(0, str(checkout("f85e88c22d0fa4cb8ab2923d7c2bf1bbec152da3") / "peft/src"))
from peft import LoraConfig, get_peft_model  # noqa: E402

torch.manual_seed(0)


def adapted(W: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(*reversed(W.shape), bias=False))
    model[0].weight.data = W.clone()
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["0"])).base_model.model[0]


tall, wide = torch.randn(31, 19).round(decimals=2), torch.randn(19, 31).round(decimals=2)
A, B, gate, x = (torch.randn(shape).round(decimals=2) for shape in ((4, 19), (31, 4), (1, 4), (3, 19)))
layer = adapted(tall)
base = layer.base_layer.weight.clone()
layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data, layer.lora_diag["default"].data = A, B, gate[0]
keep(
    "kasa",
    tall=tall,
    wide=wide,
    A=A,
    B=B,
    gate=gate,
    x=x,
    tall_base=base,
    wide_base=adapted(wide).base_layer.weight,
    update=layer.get_delta_weight("default"),
    y=layer(x[None])[0],
)
