"""GPTQ by its authors: github.com/IST-DASLab/gptq at 2d65066eeb06a5c9ff5184d8cebdf33662c67faf, gptq.py (GPTQ.fasterquant) and quant.py.

A layer of 7 x 48, 90 inputs whose features depend on each other, 4 bits with and without a zero point, groups of 16 columns, each fitted
to the columns as they are when it is entered, as their paper has it (their code does so where blocksize is the size of a group, and else fits it
to those of the last block); then act-order, with groups fitted beforehand (static_groups).
"""

import torch

from golden.values import authors, keep

gptq = authors("2d65066eeb06a5c9ff5184d8cebdf33662c67faf", "gptq.py")
torch.cuda.synchronize = lambda: None  # they time themselves on a GPU
torch.manual_seed(0)
W = torch.randn(7, 48).round(decimals=2)
X = (torch.randn(90, 48) @ (torch.eye(48) + 0.3 * torch.randn(48, 48))).round(decimals=1)


def quantized(sym: bool, **settings: bool) -> torch.Tensor:
    layer = torch.nn.Linear(48, 7, bias=False)
    layer.weight.data = W.clone()
    solver = gptq.GPTQ(layer)
    solver.quantizer = gptq.Quantizer()
    solver.quantizer.configure(4, perchannel=True, sym=sym)
    solver.add_batch(X, None)
    solver.fasterquant(blocksize=16, percdamp=0.01, groupsize=16, **settings)
    return layer.weight.data


keep("gptq", W=W, X=X, symmetric=quantized(True), asymmetric=quantized(False), ordered=quantized(False, actorder=True, static_groups=True))
