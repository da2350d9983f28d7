"""Universal Language Model Fine-tuning for Text Classification (discriminative fine-tuning).  Howard & Ruder, ACL 2018.  arXiv:1801.06146v5.
With the decay by depth of BEiT: BERT Pre-Training of Image Transformers.  Bao et al., ICLR 2022.  arXiv:2106.08254v2.
Use it where the first layers should stay near what they are: each learns at a share of the rate of the one after it.

    η_l = η · decay^(L + 1 − l),    l = 0 for embeddings, 1 … L for the blocks, L + 1 for what comes after them

ULMFiT divides by 2.6 a layer; BEiT's .65 to .75 are for a dozen of blocks. A parameter is of the first part of the model that holds it, so
that a tied head counts with the embeddings; an adapter's are of its module.
Deviations: which parameters decay is left as it is; BEiT exempts those of one dimension.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Across, Rule, Run


class LayerwiseLR(Rule):
    """`decay` by block.

    >>> [round(fb.LayerwiseLR(decay=0.75).scale(layer, blocks=12), 4) for layer in (0, 1, 12, 13)]
    [0.0238, 0.0317, 0.75, 1.0]
    """

    null: ClassVar[dict[str, Any]] = {"decay": 1.0}
    across: ClassVar[Across] = "rows"

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 < decay <= 1:
            raise Invalid(f"LayerwiseLR needs a decay above 0 and at most 1; got {decay}")
        self.decay = decay

    def scale(self, layer: int, blocks: int) -> float:
        """What the rate of layer l of a model of L blocks is multiplied by."""
        return self.decay ** (blocks + 1 - layer)

    def suit(self, model: nn.Module) -> None:
        family.blocks(model, self)

    def factors(self, run: Run) -> dict[nn.Parameter, dict[str, float]]:
        if self.decay == 1:
            return {}
        blocks = family.blocks(run.model, self)
        outer = blocks[0].rpartition(".")[0] + "."
        tables = [f"{name}." for name, module in run.model.named_modules() if isinstance(module, nn.Embedding)]

        def layer(name: str) -> int:
            if name.startswith(outer):
                return 1 + int(name[len(outer) :].split(".")[0])
            return 0 if any(name.startswith(table) for table in tables) else len(blocks) + 1

        trained = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
        return {p: {"lr": self.scale(layer(name), len(blocks))} for name, p in trained}
