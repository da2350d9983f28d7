"""HQQ by its authors: github.com/mobiusml/hqq at d3f14b494eb9939e05a7aba854796eab13da3d3b, hqq/core/optimize.py.

optimize_weights_proximal_legacy of 2 bits with its own settings (p = .7, beta = 10, kappa = 1.01), one block of 16 weights a row and each row
by itself, since they stop all rows together. Every row has the range 3, so that its scale is one and their units are ours. They give the codes
of the zero point behind the last iterate; here that is also the best one, since every step gains. The commit is the last one whose β grows: the
next, a566c78, left that line out.
"""

import torch

from golden.values import authors, keep

theirs = authors("d3f14b494eb9939e05a7aba854796eab13da3d3b", "hqq/core/optimize.py")
torch.manual_seed(0)
STEPS = 3


def error(w: torch.Tensor, q: torch.Tensor, zero: torch.Tensor) -> float:
    return float((w - (q - zero)).abs().sum())


rows, found = [], []
while len(rows) < 6:
    w = (torch.rand(1, 16) * 1.6 + 0.3).round(decimals=3)
    w[:, 0], w[:, 1] = -1.0, 2.0
    one, iterates = torch.ones(1, 1), []
    for steps in range(1, STEPS + 1):
        settings = {"lp_norm": 0.7, "beta": 1e1, "kappa": 1.01, "iters": steps}
        q, _, zero = theirs.optimize_weights_proximal_legacy(w, one, one, [0, 3], axis=1, device="cpu", opt_params=settings)
        iterates.append((error(w, q, zero), q - zero))
    errors = [error(w, torch.round(w + 1).clamp(0, 3), one)] + [e for e, _ in iterates]
    if all(a > b + 1e-4 for a, b in zip(errors, errors[1:])):
        rows.append(w)
        found.append(iterates[-1][1])
keep("hqq", W=torch.cat(rows), found=torch.cat(found))
