"""AdaLoRA: PEFT 0.21.2 of PyPI, tuners/adalora (RankAllocator, AdaLoraModel). Needs no checkout.

Layers of 6 x 9 and 7 x 5, rank 4 and alpha 6, target rank 2, t_i = 2, t_f = 3, ΔT = 1, β₁ = .8, β₂ = .7, 12 steps of w ← w − .3 g with all g
given: the update and the penalty on factors that are not orthonormal before the first step, after every step which gates are open, and the
scores that the last of them were chosen by.
"""

from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from golden.values import keep, released

released("peft", "0.21.2")
torch.manual_seed(0)
STEPS, NAMES = 12, {"A": "lora_A", "B": "lora_B", "gate": "lora_E"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(9, 6, bias=False), nn.Linear(5, 7, bias=False)])

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros(()))


net = Net()
config = AdaLoraConfig(
    init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=1, beta1=0.8, beta2=0.7, orth_reg_weight=0.5, total_step=STEPS, lora_alpha=6,
    target_modules=["0", "1"],
)  # fmt: skip
tuner = get_peft_model(net, config).base_model
triplets = [{k: getattr(layer, name)["default"] for k, name in NAMES.items()} for layer in net.layers]
kept: dict[str, Tensor] = {}
for i, p in enumerate(triplets):
    for k, w in p.items():
        w.data = torch.randn(w.shape).round(decimals=1)
        kept[f"{i}.{k}"] = w.detach().clone()
        kept[f"{i}.{k}.grads"] = torch.randn(STEPS, w.numel()).round(decimals=1)
    kept[f"{i}.update"] = net.layers[i].get_delta_weight("default")
kept["penalty"] = tuner().loss.reshape(1, 1)
opened = []
for step in range(1, STEPS + 1):
    for i, p in enumerate(triplets):
        for k, w in p.items():
            w.grad = kept[f"{i}.{k}.grads"][step - 1].view(w.shape)
            w.data -= 0.3 * w.grad
    if step == STEPS - config.tfinal:  # after it PEFT forgets
        score = tuner.rankallocator._element_score
        for i in range(2):
            A, B, gate = (score(f"layers.{i}.{NAMES[k]}.default") for k in ("A", "B", "gate"))
            kept[f"{i}.scores"] = (gate[:, 0] + A.mean(1) + B.mean(0))[None]
    tuner.update_and_allocate(step)
    opened.append(torch.cat([(p["gate"] != 0).float()[:, 0] for p in triplets]))
keep("adalora", **kept, opened=torch.stack(opened))
