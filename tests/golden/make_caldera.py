"""CALDERA by its authors: github.com/pilancilab/caldera at d3bb3a468e7a4ee7f6bb59342bdecb6397808d51, src/caldera/decomposition/.

Needs SciPy. A 19 x 31 weight, 60 inputs, rank 5, factors in full precision, and a Q of 4 bits that is round to nearest with one scale, round(7 w
/ max) max / 7: the low-rank product first ("LR", "Q") and last, 5 iterations each. QuIP#, which quantizes theirs else, is not called and stands
empty.
"""

import sys
from unittest.mock import MagicMock

import torch
from torch import Tensor

from golden.values import checkout, keep

sys.path.insert(0, str(checkout("d3bb3a468e7a4ee7f6bb59342bdecb6397808d51") / "src"))
for name in ("lib", "lib.utils", "lib.utils.math_utils", "lib.algo", "lib.algo.quip"):
    sys.modules[name] = MagicMock()
from caldera.decomposition.alg import caldera  # noqa: E402
from caldera.decomposition.dataclasses import CalderaParams  # noqa: E402

torch.manual_seed(0)
W = torch.randn(19, 31).round(decimals=2)
X = (torch.randn(60, 31) @ (torch.eye(31) + 0.3 * torch.randn(31, 31))).round(decimals=1)


def parts(*order: str) -> tuple[Tensor, Tensor]:
    settings = CalderaParams(
        Q_bits=4,
        L_bits=16,
        R_bits=16,
        rank=5,
        iters=5,
        activation_aware_Q=False,
        lattice_quant_Q=False,
        rand_svd=False,
        update_order=[*order],
    )
    found = caldera(settings, W, X.mT @ X / len(X), device="cpu", use_tqdm=False, scale_W=False)
    best = min(error for errors in found.errors.values() for error in errors)
    assert best in found.errors["LR"], found.errors
    return found.Q, found.L @ found.R


(Q_svd, LR_svd), (Q, LR) = parts("LR", "Q"), parts("Q", "LR")
keep("caldera", W=W, X=X, Q_svd=Q_svd, LR_svd=LR_svd, Q=Q, LR=LR)
