"""AdaLoRA by its authors: github.com/QingruZhang/AdaLoRA at d10f5ebee16c478fa2f41a44a237b38e8c9b0338, loralib/loralib/adalora.py.

Layers of 6 x 9 and 7 x 5, rank 4 and alpha 6, target rank 2, t_i = 2, t_f = 3, ΔT = 1, β₁ = .8, β₂ = .7, 12 steps of w ← w − .3 g with all g
given: the update (what SVDLinear merges) and the penalty at weight .5 before the first step, after every step which gates are open, and the
scores that the last of them were chosen by.
"""

import sys

import torch
from torch import Tensor, nn

from golden.values import checkout, keep

sys.path.insert(0, str(checkout("d10f5ebee16c478fa2f41a44a237b38e8c9b0338") / "loralib"))
from loralib.adalora import RankAllocator, SVDLinear, compute_orth_regu  # noqa: E402

torch.manual_seed(2)
STEPS, FINAL, NAMES = 12, 3, {"A": "lora_A", "B": "lora_B", "gate": "lora_E"}
model = nn.Sequential(*(SVDLinear(n, m, r=4, lora_alpha=6, bias=False) for m, n in ((6, 9), (7, 5))))
kept: dict[str, Tensor] = {}
for i, layer in enumerate(model):
    for k, name in NAMES.items():
        w = getattr(layer, name)
        w.data = torch.randn(w.shape).round(decimals=2)
        kept[f"{i}.{k}"] = w.detach().clone()
        kept[f"{i}.{k}.grads"] = torch.randn(STEPS, w.numel()).round(decimals=2)
    layer.weight.data.zero_()
    layer.eval()
    kept[f"{i}.update"] = layer.weight.detach().clone()
kept["penalty"] = compute_orth_regu(model, 0.5).reshape(1, 1)
allocator = RankAllocator(
    model, lora_r=4, target_rank=2, init_warmup=2, final_warmup=FINAL, mask_interval=1, beta1=0.8, beta2=0.7, total_step=STEPS
)
opened = []
for step in range(1, STEPS + 1):
    for i, layer in enumerate(model):
        for k, name in NAMES.items():
            w = getattr(layer, name)
            w.grad = kept[f"{i}.{k}.grads"][step - 1].view(w.shape)
            w.data -= 0.3 * w.grad
    allocator.update_and_mask(model, step)
    opened.append(torch.cat([(layer.lora_E != 0).float()[:, 0] for layer in model]))
for i in range(2):
    A, B, gate = (allocator.calculate_score(f"{i}.{name}") for name in NAMES.values())
    kept[f"{i}.scores"] = (gate[:, 0] + A.mean(1) + B.mean(0))[None]
keep("adalora", **kept, opened=torch.stack(opened))
