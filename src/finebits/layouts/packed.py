"""Our own packed weights in a folder of transformers: `X.weight.codes`, `X.weight.scale`, … are the parts of a QTensor as they are, and
config.json says by format which modules have them, and of what shape.

    "quantization_config": {"quant_method": "finebits", "groups": [{"format": {"paper": "nf", …}, "modules": {"X": [m, n], …}}, …]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finebits import registry
from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.qtensor import format_of, key

METHOD = "finebits"
Held = dict[str, tuple[Format, tuple[int, ...]]]  # module -> the format and shape of its weight


def groups_of(held: Mapping[str, tuple[Format, Sequence[int]]]) -> list[dict[str, Any]]:
    """What config.json holds of packed modules.

    >>> groups_of({"up_proj": (fb.NF(4), (96, 64)), "down_proj": (fb.NF(4), (64, 96))})
    [{'format': {'paper': 'nf', 'bits': 4, 'block': 64, 'scale': 'fp32'}, 'modules': {'up_proj': [96, 64], 'down_proj': [64, 96]}}]
    """
    of: dict[str, dict[str, list[int]]] = {}
    for name, (format, shape) in held.items():
        of.setdefault(key(format), {})[name] = list(shape)
    return [{"format": registry.to_json(format_of(line)), "modules": modules} for line, modules in of.items()]


def held_by(groups: Any) -> Held:
    """The inverse of `groups_of`. Raises ValueError where it was written by something else.

    >>> held_by([{"format": {"paper": "nf", "bits": 4}, "modules": {"up_proj": [96, 64]}}])
    {'up_proj': (NF(bits=4, block=64, scale='fp32', unit=None), (96, 64))}
    """
    try:
        formats = [(registry.from_json("formats", dict(group["format"])), dict(group["modules"])) for group in groups]
        return {name: (format, tuple(map(int, shape))) for format, modules in formats for name, shape in modules.items()}
    except (KeyError, TypeError, AttributeError):
        raise Invalid(
            f"the groups of finebits' quantization_config are a list of {{format, modules}}, and {str(groups)[:80]} came: config.json was not "
            "written by finebits, export or save the model again"
        ) from None
