"""The keys of what the planner may choose from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finebits.plan.candidates import CANDIDATES
from finebits.recipe.keys.base import Method, Section


class Constraints(Section):
    """What a plan must keep to beside its budgets; any of them makes the planner an integer program (pip install 'finebits[milp]')."""

    tie: list[list[str]] = Field(
        default=[],
        description="Groups of endings of names whose matrices share a format within a block of the model: [[q_proj, k_proj, v_proj]].",
    )
    max_formats: int | None = Field(default=None, ge=1, description="At most this many formats in one plan.")
    overhead: float | None = Field(default=None, ge=0, description="Scales take at most this share of the codes' bytes, such as 0.05.")

    def __bool__(self) -> bool:
        return bool(self.tie) or self.max_formats is not None or self.overhead is not None


class Quantization(Section):
    """What the planner may choose from."""

    candidates: list[Method] = Field(
        default=list(CANDIDATES),
        min_length=1,
        description="Number formats: short names such as nf4, nf3-b64, nf2-b64-bf16, int4-b128, int4a-b32 (method, bits, a for asymmetric, "
        "block, store of the scales) or mappings {paper: nf, bits: 3, block: 64, scale: bf16}.",
    )
    embeddings: list[Method | None] = Field(
        default=[],
        description="Number formats that the table of input embeddings may have, and with it a head that is the same tensor, written as "
        "candidates are: [null, int8-b64-fp16, nf4-b64-bf16]; null offers it dense; none: it is dense. Rounded by the quantizer where that "
        "needs no statistics, else to nearest.",
    )
    objective: Literal["weight", "output", "fisher", "kl"] = Field(
        default="output",
        description="What a plan keeps small: the error of the weights; that error weighed by the inputs that meet it; by the Fisher "
        "information, matrices against each other too; or that, with KL predicted from variants that are really measured.",
    )
    planner: Method = Field(default="lagrange", description="How the budget is spent: a name of finebits list --shape planners.")
    constraints: Constraints = Field(default=Constraints(), description="What a plan must keep to beside its budgets.")
    locks: dict[str, Method | None] = Field(
        default={},
        description="Modules (a whole name, its end, or a pattern with *) and the format that each must have, or null to keep it dense; "
        "they stand above overrides.",
    )
    quantizer: Method = Field(
        default="rtn",
        description="How weights are rounded: a name of finebits list --shape quantizers, or a mapping {paper: gptq, scales: search}.",
    )
    pricing: Method | None = Field(
        default=None,
        description="How candidates are rounded while they are priced: rtn takes a part of gptq's time and needs no statistics of its own; "
        "null rounds them as the quantizer will.",
    )
    calibration_rows: int = Field(default=32, ge=1, description="Training rows that statistics are gathered from.")
    calibration: Literal["collect", "sweep"] = Field(
        default="collect",
        description="What statistics are gathered from: collect takes one pass of the unquantized model; sweep quantizes block by block, and "
        "every block sees what the quantized blocks before it make of the rows.",
    )
    overrides: dict[str, Method | None] = Field(
        default={},
        description="Regular expressions over whole module names, each with the format that these must have, or null to keep them dense. "
        "The last one that matches counts; one that matches nothing is an error.",
    )
