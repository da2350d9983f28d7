"""LoftQ and NormalFloat by LoftQ's authors: github.com/yxli2123/LoftQ at ae33fd4fd05fd4ba146555cd77c13d307eb4e9b3, glue/. Needs SciPy.

Three steps of quant_first_iter (utils.py) for an 8 x 128 weight in NF of 4 bits, blocks of 64, rank 4: the quantized weight and the product of
the factors. The seed is one where every step gains, so that their last iterate is the best. Beside it, the levels of create_normal_map
(utils_qaunt.py) of 2, 3 and 4 bits.
"""

import torch

from golden.values import authors, keep

theirs = authors("ae33fd4fd05fd4ba146555cd77c13d307eb4e9b3", "glue/utils.py")
from utils_qaunt import create_normal_map  # noqa: E402

torch.manual_seed(0)
W, L, R, left = torch.randn(8, 128).round(decimals=2), 0, 0, []
for _ in range(3):
    _, L, R, Q, rest = theirs.quant_first_iter(W, L, R, 4, 4, "normal_float")
    left.append(float(rest.norm()))
assert left == sorted(left, reverse=True), left
keep("loftq", W=W, Q=Q, LR=L @ R)
keep("normal_float", **{f"nf{bits}": create_normal_map(num_bits=bits)[None] for bits in (2, 3, 4)})
