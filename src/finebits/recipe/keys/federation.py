"""The keys of a federation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finebits.recipe.keys.base import Method, Section


class Federation(Section):
    """Rounds of clients who keep their rows: what finebits federate runs."""

    aggregators: list[Method] = Field(
        default=["fedavg"],
        min_length=1,
        description="What a server makes of what clients send: names of finebits list --shape federate, or mappings {paper: lora_fair, "
        "weight: 0.1}; several are compared.",
    )
    clients: int = Field(default=20, ge=1, description="The training rows are dealt to so many.")
    rounds: int = Field(default=10, ge=1, description="In each of them clients train as training says.")
    dirichlet_alpha: float | None = Field(
        default=None, gt=0, description="Skews the labels that clients have: small, few of them; null deals rows evenly."
    )
    fraction_train: float = Field(default=1.0, gt=0, le=1, description="The chance of a client to take part in a round.")
    client_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="The chance of one that takes part to fall out before it has sent anything."
    )
    client_ranks: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="Ranks of clients in turn, for flora and hetlora, at most adapter.rank; none: adapter.rank for all."
    )
    clipping_norm: float | None = Field(
        default=None,
        gt=0,
        description="Differential privacy of clients: the longest update that is averaged; null averages updates as they are.",
    )
    noise_multiplier: float | None = Field(default=None, ge=0, description="Noise on the sum of updates, in multiples of clipping_norm.")
    epsilon: float | None = Field(default=None, gt=0, description="In place of noise_multiplier: what all rounds together are to come to.")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="The delta of epsilon: well below 1 over the number of clients.")
    compare_central: bool = Field(default=True, description="Train on all rows in one place too, to compare with.")
