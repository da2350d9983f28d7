"""RandLoRA (PEFT: RandLoraConfig): λ and γ as they are; A and the B_j of a module are the corners, as large as its weight, of one randlora_A and
one randlora_B.

PEFT pairs the columns of its B, which go by base first, with rows of Λ A Γ that go by direction first; the columns of a module's B are in the
order here that makes the same pairs. Weights of several shapes can be written where their bases are corners of one set: those that came from
PEFT. PEFT 0.21 writes all bases once more for every module; they are read and written once, which it warns of and loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pad

from finebits.adapters import randlora as paper
from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.peft_forms.base import Form, Held, Written, check_shape, one_of, projections, spread

LAM, GAMMA = "randlora_lambda", "randlora_gamma"
COMMON = ("base_model.randlora_A", "base_model.randlora_B")


@dataclass(frozen=True)
class RandLora(Form):
    """s·Σ_j B_j Λ_j A Γ_j.

    >>> p = {"A": torch.ones(1, 2), "B": torch.eye(2), "lam": torch.ones(1, 2), "gamma": torch.ones(2, 2)}
    >>> RandLora().write({"q": Held(fb.RandLoRA(basis=1, alpha=1), p, (2, 2))}).settings
    {'r': 1, 'randlora_alpha': 1, 'save_projection': True}
    """

    peft: ClassVar[str] = "RANDLORA"
    adapter: ClassVar[type] = paper.RandLoRA
    parts: ClassVar[tuple[str, ...]] = (LAM, GAMMA)
    maybe: ClassVar[tuple[str, ...]] = ("randlora_A", "randlora_B")
    common: ClassVar[tuple[str, ...]] = COMMON
    reads: ClassVar[frozenset[str]] = frozenset({"r", "randlora_alpha", "save_projection", "sparse", "very_sparse"})
    idle: ClassVar[frozenset[str]] = frozenset({"projection_prng_key"})
    dropout: ClassVar[str] = "randlora_dropout"

    def write(self, held: Mapping[str, Held]) -> Written:
        r, alpha = one_of([(h.adapter.basis, h.adapter.alpha) for h in held.values()], "(r, alpha)", "RANDLORA")
        A = spread([h.p["A"] for h in held.values()])
        B = spread([_theirs(h.p["B"], r) for h in held.values()])
        if A is None or B is None:
            raise Invalid(
                "PEFT's RANDLORA takes the bases of all modules from one set, and these have a set for every shape: export target merged "
                "writes the weights"
            )
        sides = [max(h.shape[i] for h in held.values()) for i in (0, 1)]  # PEFT's are of the size for a weight of the most rows and columns
        A = pad(A, (0, min(sides) - A.shape[1]))
        B = pad(B, (0, 0, 0, -(-min(sides) // r) - B.shape[1], 0, max(sides) - len(B)))
        tensors = {module: {LAM: h.p["lam"], GAMMA: h.p["gamma"]} for module, h in held.items()}
        settings = {"r": r, "randlora_alpha": alpha, "save_projection": True}
        return Written(settings, tensors, dict(zip(COMMON, (A[:, None], B), strict=True)))

    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        A, B = projections(self, settings, common)
        bases = "very_sparse" if settings.get("very_sparse") else "sparse" if settings.get("sparse") else "dense"
        adapter, held, corners = paper.RandLoRA(int(settings["r"]), float(settings["randlora_alpha"]), bases), {}, dict[Any, Params]()
        for module, p in found.items():
            m, n = shapes[module]
            wanted = adapter.shapes(m, n)
            N, k = wanted["gamma"]
            own = corners.setdefault((m, n), {"A": A[:, 0, :k], "B": _ours(B[: max(m, n), :N])})
            trained = {
                "lam": check_shape(module, LAM, p[LAM], wanted["lam"]),
                "gamma": check_shape(module, GAMMA, p[GAMMA], wanted["gamma"]),
            }
            held[module] = Held(adapter, own | trained)
        return held


def _ours(B: Tensor) -> Tensor:
    """(max, N, r) of PEFT -> (max, N·r): its column i·N + j stands at j·r + i."""
    _, N, r = B.shape
    return B.flatten(1).unflatten(1, (r, N)).mT.flatten(1)


def _theirs(B: Tensor, r: int) -> Tensor:
    N = B.shape[1] // r
    return B.unflatten(1, (N, r)).mT.flatten(1).unflatten(1, (N, r))
