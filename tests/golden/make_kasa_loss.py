"""KaSA's loss and its start where a weight is wide: PEFT 0.21.2 of PyPI, tuners/lora/variants.py (KasaLinearVariant) and model.py. No checkout.

Two layers of 19 x 31 and 31 x 19, rank 4: _get_kasa_loss at beta .3 and gamma .7 with all factors given, and the base that is left of the first.
"""

import torch
from peft import KasaConfig, LoraConfig, get_peft_model
from torch import nn

from golden.values import keep, released

released("peft", "0.21.2")
torch.manual_seed(0)
wide = torch.randn(19, 31).round(decimals=2)
model = nn.Sequential(nn.Linear(31, 19, bias=False), nn.Linear(19, 31, bias=False))
model[0].weight.data = wide.clone()
config = LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"], kasa_config=KasaConfig(beta=0.3, gamma=0.7))
tuned = get_peft_model(model, config)
given = {}
for i, layer in enumerate(model):
    for name, of in (("A", layer.lora_A["default"].weight), ("B", layer.lora_B["default"].weight), ("gate", layer.lora_diag["default"])):
        of.data = torch.randn(of.shape).round(decimals=2)
        given[f"{i}.{name}"] = torch.atleast_2d(of)
loss = tuned.base_model._get_kasa_loss()
keep("kasa_loss", wide=wide, wide_base=model[0].base_layer.weight, **given, loss=loss.reshape(1, 1))
