"""PiSSA and OLoRA: PEFT 0.21.2 of PyPI, tuners/lora/layer.py (pissa_init, olora_init). Needs no checkout.

A linear layer of 24 x 40, rank 5, alpha 8: the base that is left, and both factors.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from golden.values import keep, released

released("peft", "0.21.2")
torch.manual_seed(0)
W = torch.randn(24, 40).round(decimals=2)


def started(init: str) -> dict[str, Tensor]:
    model = nn.Sequential(nn.Linear(40, 24, bias=False))
    model[0].weight.data = W.clone()
    layer = get_peft_model(model, LoraConfig(r=5, lora_alpha=8, target_modules=["0"], init_lora_weights=init)).base_model.model[0]
    return {"base": layer.base_layer.weight, "A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}


keep("pissa", W=W, **started("pissa"))
keep("olora", W=W, **started("olora"))
