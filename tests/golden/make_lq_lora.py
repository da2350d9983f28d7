"""LQ-LoRA's weighted factors by its authors: github.com/HanGuo97/lq-lora at c2424b3adc27197815da1ac9e1304565168d824d.

models/factorizations_utils.py: weighted_svd_decomposition(A, W, heuristic="two-sided", randomized=False) of a 19 x 43 weight, rank 4; the
product of its factors.
"""

import torch

from golden.values import authors, keep

theirs = authors("c2424b3adc27197815da1ac9e1304565168d824d", "models/factorizations_utils.py")
torch.manual_seed(0)
W, F = torch.randn(19, 43).round(decimals=2), (torch.rand(19, 43) + 0.1).round(decimals=2)
L1, L2 = theirs.weighted_svd_decomposition(W.double(), F.double(), heuristic="two-sided", randomized=False, num_ranks=4)
keep("lq_lora", W=W, F=F, L1L2=L1 @ L2)
