"""QERA by its authors: github.com/ChengZhang-98/QERA at bd7fc86a2e44d41f95b9b0421f27f5624dd37064, src/qera. Needs SciPy, pandas and nvitop.

A 19 x 31 weight, 50 inputs, rank 5: the weight in their int quantizer's 3 bits, and the product of the factors (approximate.py) with the scales
of their profilers (statistic_profiler/scale.py) "rxx" (exact), "diag" (approx) and "identity", which is the SVD of the error.
"""

import sys

import torch
from torch import Tensor, nn

from golden.values import checkout, keep

sys.path.insert(0, str(checkout("bd7fc86a2e44d41f95b9b0421f27f5624dd37064") / "src"))
from qera.approximate import compute_AB_and_approximation_error  # noqa: E402
from qera.quantize import get_quantizer  # noqa: E402
from qera.statistic_profiler import register_scale_hooks  # noqa: E402

torch.manual_seed(0)
W = torch.randn(19, 31).round(decimals=2)
X = (torch.randn(50, 31) @ (torch.eye(31) + 0.3 * torch.randn(31, 31))).round(decimals=1)
three_bits = {"fp_min": float(W.min()), "fp_max": float(W.max()), "n_bits": 3, "is_affine": True}


def product(mode: str) -> Tensor:
    model = nn.Sequential(nn.Linear(31, 19, bias=False))
    model[0].weight.data = W.clone()
    profiler = register_scale_hooks(model, [{"target_layer": "0", "layers_sharing_scale": []}], mode=mode, torch_dtype=torch.float32)
    model(X)
    settings = {"rank": 5, "w_quantizer": {"name": "integer", **three_bits}, "x_quantizer": {"name": "bypass"}}
    found, _ = compute_AB_and_approximation_error(model, ["0"], profiler.get_scale_dict(), {"0": "all", "all": settings})
    return (found["0.A"] @ found["0.B"]).mT


Q = get_quantizer("integer")(W, **three_bits)
keep("qera", W=W, X=X, Q=Q, exact=product("rxx"), approx=product("diag"), identity=product("identity"))
