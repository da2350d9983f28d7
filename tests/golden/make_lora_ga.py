"""LoRA-GA by its authors: github.com/Outsider565/LoRA-GA at 89af7de5fb2a2b994e87545d69a67c47089286ab, their fork of PEFT (lora_ga_init).

A 24 x 40 weight with a gradient of the same shape, rank 6 and alpha 9, scale "stable" with gamma 4: the base that is left, and both factors. 4 x
rank is the smaller side, so that their svd_lowrank holds all of the gradient.
"""

import sys

import torch
from torch import nn

from golden.values import checkout, keep

sys.path.insert(0, str(checkout("89af7de5fb2a2b994e87545d69a67c47089286ab") / "peft/src"))
from peft import LoraGAConfig, get_peft_model  # noqa: E402
from peft.utils.lora_ga_utils import LoraGAContext  # noqa: E402

torch.manual_seed(0)
W, G = torch.randn(24, 40).round(decimals=2), torch.randn(24, 40).round(decimals=2)
model = nn.Sequential(nn.Linear(40, 24, bias=False))
model[0].weight.data = W.clone()
with LoraGAContext(model, named_grad={"0": G}):
    config = LoraGAConfig(r=6, lora_alpha=9, target_modules=["0"], stable_gamma=4)
    layer = get_peft_model(model, config).base_model.model[0]
keep("lora_ga", W=W, G=G, base=layer.base_layer.weight, A=layer.lora_A["default"].weight, B=layer.lora_B["default"].weight)
