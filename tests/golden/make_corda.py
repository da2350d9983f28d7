"""CorDA by its authors: github.com/iboing/CorDA at baffb03ac090f23305e5fb586a2d3c16df7f12db, cordalib/decomposition.py; and PEFT 0.21.2 of PyPI.

decompose_to_adapter of a 19 x 31 weight with rank 5 and the mean of x xᵀ over 45 inputs: the product of the factors, of the first components and
of the last. Beside it PEFT's preprocess_corda ("ipm") and corda_init at alpha 8, whose covariance comes from two batches: the first 20 inputs,
and the others, each divided by its largest entry (as in the authors' calib_cov_distribution, which needs a model of transformers). Needs attrs.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from golden.values import authors, keep, released

released("peft", "0.21.2")
theirs = authors("baffb03ac090f23305e5fb586a2d3c16df7f12db", "cordalib/decomposition.py")
torch.manual_seed(0)
W = torch.randn(19, 31).round(decimals=2)
X = (torch.randn(45, 31) @ (torch.eye(31) + 0.3 * torch.randn(31, 31))).round(decimals=1)


def layer() -> nn.Linear:
    made = nn.Linear(31, 19, bias=False)
    made.weight.data = W.clone()
    return made


def product(first: bool) -> Tensor:
    linear = layer()
    linear.covariance_matrix = X.mT @ X / len(X)
    made = theirs.decompose_to_adapter(linear, cov_aware=True, r=5, first_eigen=first)
    return made.ALinear.weight @ made.BLinear.weight


def of_peft() -> Tensor:
    model = nn.Sequential(layer())
    config = LoraConfig(r=5, lora_alpha=8, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    preprocess_corda(model, config, run_model=lambda: [model(x) for x in (X[:20], X[20:])])
    made = get_peft_model(model, config).base_model.model[0]
    return made.scaling["default"] * made.lora_B["default"].weight @ made.lora_A["default"].weight


keep("corda", W=W, X=X, preview=product(True), preserve=product(False), peft=of_peft())
