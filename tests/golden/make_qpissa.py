"""QPiSSA by its authors: github.com/GraphPKU/PiSSA at 87f4db6fc75a58b92c803cd9880c642bf011e69a, utils/init_qpissa.py. Needs bitsandbytes.

Three steps of pissa_quant for an 8 x 128 weight in NF4, blocks of 64, rank 4: the quantized rest and the product of the factors. Every step
gains, so that their last iterate is the best.
"""

import bitsandbytes
import torch

from golden.values import functions, keep

theirs = functions("87f4db6fc75a58b92c803cd9880c642bf011e69a", "utils/init_qpissa.py", torch=torch, bnb=bitsandbytes)
torch.manual_seed(0)
W, left = torch.randn(8, 128).round(decimals=2), []
for steps in (1, 2, 3):
    _, Q, R, L = theirs["pissa_quant"](W, 4, steps)
    left.append(float((W - Q - L @ R).norm()))
assert left == sorted(left, reverse=True), left
keep("qpissa", W=W, Q=Q, LR=L @ R)
