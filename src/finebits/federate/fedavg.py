"""FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data.  McMahan et al., AISTATS 2017 (PMLR 54).
Over LoRA: Towards Building the Federated GPT: Federated Instruction Tuning (FedIT).  Zhang et al., ICASSP 2024.  arXiv:2305.05644v2.

    A ← Σ pₖ Aₖ,    B ← Σ pₖ Bₖ,    pₖ = nₖ/Σn

What comes out is not the mean of the products: it lacks Σ pₖ (Bₖ − B̄)(Aₖ − Ā). Bytes of a client and a round: b·r(m+n) up, the same down.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.federate.base import Usual


@dataclass(frozen=True)
class FedAvg(Usual):
    """The mean of every factor.

    >>> from finebits.federate.base import Sent, Server
    >>> one, two = (Sent({"q": {"A": torch.full((1, 2), v), "B": torch.full((2, 1), v)}}, n) for v, n in ((0.0, 1), (4.0, 3)))
    >>> FedAvg()(Server({}), [one, two]).server.tensors["q"]["A"]
    tensor([[3., 3.]])
    """

    linear: ClassVar[bool] = True
