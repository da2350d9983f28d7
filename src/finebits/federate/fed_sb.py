"""Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA Fine-Tuning.
Singhal, Ponkshe, Vartak, Varshney, Vepakomma, TMLR 2026.  arXiv:2502.15436v2.

W + s·B R A with B and A frozen and the same everywhere, from LoRA-SB's start; R, of r × r, is all that is trained and sent:

    R ← Σ pₖ Rₖ    ⇒    B R A = Σ pₖ B Rₖ A,    exactly

Bytes of a client and a round: b·r² up, the same down, whatever the size of the matrix and however many clients there are; B and A are sent once.
Deviations: clients weigh as they have examples, where the authors' code takes the plain mean; the start is made from the rows that calibrate,
which are the training rows where a recipe names no others: with differential privacy another start is wanted (the zeros of LoRA-XS, whose B
and A come from W alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.federate.base import Usual


@dataclass(frozen=True)
class FedSB(Usual):
    """The mean of R between two frozen factors.

    >>> from finebits.federate.base import Sent, Server
    >>> one, two = (Sent({"q": {"R": torch.full((1, 1), v)}}, 1) for v in (0.0, 4.0))
    >>> FedSB()(Server({}), [one, two]).server.tensors["q"]["R"]
    tensor([[2.]])
    """

    adapter: ClassVar[str] = "lora_xs"
    init: ClassVar[str | None] = "lora_sb"
    sends: ClassVar[tuple[str, ...]] = ("R",)
    linear: ClassVar[bool] = True
