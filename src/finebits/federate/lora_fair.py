"""LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement.  Bian, Wang, Zhang, Xu, ICCV 2025.  arXiv:2411.14961v3.

Factors are averaged, the server adds to B̄ what brings the product nearer to the mean of the products, and clients start from both:

    min_ΔB  S(ΔW*, (B̄ + ΔB) Ā) + λ‖ΔB‖²,    ΔW* = Σ pₖ Bₖ Aₖ

With S the squared distance this is ridge regression, and nothing of the size of the weight is made for it:

    ΔB = (Σ pₖ Bₖ (Aₖ Āᵀ) − B̄ Ā Āᵀ)(Ā Āᵀ + λ′ I)⁻¹,    λ′ = λ·tr(Ā Āᵀ)/r

Bytes of a client and a round: b·r(m+n) up, the same down.
Deviations: S is the squared distance, solved in closed form, where the paper takes a cosine and a thousand steps of gradient descent on the
server; so λ is counted in units of Ā's mean square, and the default keeps the paper's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finebits.errors import Invalid
from finebits.federate.base import Aggregated, Sent, Server, Usual, by_module, check, mean, shares


@dataclass(frozen=True)
class LoRAFAIR(Usual):
    """The mean of A, and the mean of B corrected; λ is `weight`: the larger, the less.

    >>> one = Sent({"q": {"A": torch.tensor([[1.0, 0.0]]), "B": torch.tensor([[1.0]])}}, 1)
    >>> two = Sent({"q": {"A": torch.tensor([[3.0, 0.0]]), "B": torch.tensor([[3.0]])}}, 1)
    >>> made = LoRAFAIR(weight=1e-9)(Server({}), [one, two]).server.tensors["q"]
    >>> made["B"] @ made["A"]  # (1·1 + 3·3)/2, where the means' product is 4
    tensor([[5., 0.]])
    """

    weight: float = 0.01

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise Invalid(f"weight is {self.weight}; it must be positive, or B drifts as far as the rows of A allow")

    def __call__(self, server: Server, sent: Sequence[Sent]) -> Aggregated:
        check(self, sent)
        p = shares(sent)
        averaged = mean(sent, p)

        def corrected(name: str) -> dict:
            A, B = averaged[name]["A"].double(), averaged[name]["B"].double()
            gram = A @ A.mT
            ideal = sum((w * s.tensors[name]["B"].double() @ (s.tensors[name]["A"].double() @ A.mT) for s, w in zip(sent, p, strict=True)))
            ridge = max(self.weight * float(gram.diagonal().mean()), torch.finfo(torch.float64).tiny)
            step = torch.linalg.solve(gram + ridge * torch.eye(len(A), dtype=A.dtype), (ideal - B @ gram).mT).mT
            return {"A": averaged[name]["A"], "B": (B + step).float()}

        made = by_module(sent, corrected)
        return Aggregated(Server(made, server.residual), made)
