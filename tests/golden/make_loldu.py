"""LoLDU by its authors: github.com/SKDDJ/LoLDU at 4fe87a05a668006f55153539cece7fffa91ed91d, minloldu/loldu.py (LoLDUParametrization).

Weights of 19 x 31 (wide) and 31 x 19 (tall), rank 4 and alpha 6: what each becomes when its vector z moves by what is given. Of lightning they
take a class that is nn.Module here.
"""

import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from golden.values import authors, keep

sys.modules["lightning"] = SimpleNamespace(LightningModule=nn.Module)
theirs = authors("4fe87a05a668006f55153539cece7fffa91ed91d", "minloldu/loldu.py")
torch.manual_seed(0)
step = torch.randn(1, 4).round(decimals=2)


def moved(W: Tensor) -> Tensor:
    layer = nn.Linear(*reversed(W.shape), bias=False)
    layer.weight.data = W.clone()
    adapter = theirs.LoLDUParametrization.from_linear(layer, rank=4, lora_alpha=6)
    adapter(layer.weight)  # the first call takes the factors out of the weight
    adapter.vector_z.data = adapter.vector_z.data + step[0]
    return adapter(layer.weight)


wide, tall = torch.randn(19, 31).round(decimals=2), torch.randn(31, 19).round(decimals=2)
keep("loldu", wide=wide, tall=tall, step=step, wide_moved=moved(wide), tall_moved=moved(tall))
