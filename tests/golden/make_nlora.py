"""NLoRA by its authors: github.com/TracyGuo2001/NLoRA at b66f88d7f94d0f8f077edd4a225f2c583d5be5d8, their fork of PEFT (nlora_init).

A 24 x 40 weight, rank 5 and alpha 8: the base, the three factors, and the update that they make (get_delta_weight).
"""

import sys

import torch
from torch import nn

from golden.values import checkout, keep

sys.path.insert(0, str(checkout("b66f88d7f94d0f8f077edd4a225f2c583d5be5d8") / "peft/src"))
from peft import LoraConfig, get_peft_model  # noqa: E402

torch.manual_seed(0)
W = torch.randn(24, 40).round(decimals=2)
model = nn.Sequential(nn.Linear(40, 24, bias=False))
model[0].weight.data = W.clone()
layer = get_peft_model(model, LoraConfig(r=5, lora_alpha=8, target_modules=["0"], init_lora_weights="n_lora")).base_model.model[0]
factors = {k: getattr(layer, f"lora_{k}")["default"].weight for k in "ABN"}
keep("nlora", W=W, base=layer.base_layer.weight, **factors, update=layer.get_delta_weight("default"))
