"""What of a quantized weight a refinement can move, by the format that it is in."""

from __future__ import annotations

from collections.abc import Iterable

from finebits.formats.base import Format
from finebits.formats.int import Int
from finebits.formats.vq import VQ
from finebits.refine._scales import clips
from finebits.refine.base import Refine


def unmovable(refine: Iterable[Refine], formats: Iterable[Format | None]) -> str | None:
    """Why a refinement cannot move what it moves in one of these formats; None where all can.

    >>> unmovable([fb.EfficientQAT()], [fb.Int(2), fb.NF(4)])[:67]
    'EfficientQAT rounds weights to integers, and NF(bits=4, block=64, s'
    """
    held = [f for f in dict.fromkeys(formats) if f is not None]
    for r in refine:
        who = type(r).__name__
        for f in held:
            if "clips" in r.moves and not clips(f):
                return (
                    f"{who}'s clip moves the extremes that a block is scaled by, and {f} has none: offer nf or int, or use its scales "
                    "instead of clip, which serve any codes"
                )
            if "weights" in r.moves and not isinstance(f, Int):
                return f"{who} rounds weights to integers, and {f} has other levels: offer int, or take apiq with scales, which serves any codes"
            if "words" in r.moves and not isinstance(f, VQ):
                return f"{who} moves codes among the words of codebooks, and {f} has none: offer vq, or take efficient_qat for integers"
    return None
