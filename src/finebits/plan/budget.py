"""A memory budget as people state it: in bytes, as an average number of bits, or as a share of what another choice would take.

    "400MiB"        bytes, for every phase of the job
    "3.1 bits"      of a linear weight on average, scales and padding included; nothing else is bounded, so the plan is the same on every machine
    "80% of nf4"    of what the whole job would take were every linear matrix that format, on the same machine with the same settings

The planner makes bytes of the last two (`finebits.plan.solve`), and a plan holds both: `budget` in bytes, and `stated` as it was said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finebits import registry, sizes
from finebits.errors import Invalid

FORMS = 'a size ("400MiB", "8GiB"), an average of bits ("3.1 bits") or a share of another choice ("80% of nf4", "50% of bf16")'
NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
BITS = re.compile(rf"{NUMBER}[\s-]*bits?", re.I)
SHARE = re.compile(rf"{NUMBER}\s*%\s*of\s+(\S.*)", re.I)
DENSE = re.compile(r"bf16|16[\s-]*bits?", re.I)
BARE = 2**17  # a number without a unit below this was hardly meant in bytes


@dataclass(frozen=True)
class Bits:
    """An average number of bits of a linear weight.

    >>> read("3.1 bits")
    Bits(average=3.1)
    """

    average: float

    def bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        """What these matrices may take together.

        >>> Bits(3.1).bytes([(8, 128), (128, 8)])  # 2048 weights, 3.1 / 8 of a byte each
        793
        """
        return math.floor(self.average * sum(map(math.prod, shapes)) / 8 + 1e-6)


@dataclass(frozen=True)
class Share:
    """A share of what the job takes with one format for all matrices; None is 16 bits.

    >>> read("50% of bf16")
    Share(share=0.5, format=None)
    """

    share: float
    format: Any

    def bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        """What these matrices take in that format.

        >>> Share(0.8, fb.NF(4)).bytes([(8, 128)]), Share(0.5, None).bytes([(8, 128)])  # the whole of which it is a share
        (576, 2048)
        """
        if self.format is None:
            return 2 * sum(map(math.prod, shapes))
        return sum(math.prod(experts) * self.format.storage_bits(m, n) // 8 for *experts, m, n in shapes)


def read(stated: Any) -> int | Bits | Share | None:
    """Bytes, bits or a share; None where there is no limit.

    Raises ValueError, which names the forms, for anything else.

    >>> read("400MiB"), read("3.1 bits"), read("80% of nf4")
    (419430400, Bits(average=3.1), Share(share=0.8, format=NF(bits=4, block=64, scale='fp32', unit=None)))
    """
    if stated is None:
        return None
    text = str(stated).strip()
    if isinstance(stated, bool) or not isinstance(stated, str | int | float):
        raise Invalid(f"a budget is {FORMS}, and {stated!r} came")
    if match := BITS.fullmatch(text):
        if not 0 < float(match[1]) <= 64:
            raise Invalid(f"an average above 0 and up to 64 bits a weight is wanted, and {stated!r} came")
        return Bits(float(match[1]))
    if match := SHARE.fullmatch(text):
        if not float(match[1]) > 0:
            raise Invalid(f"a share above 0% is wanted, and {stated!r} came")
        return Share(float(match[1]) / 100, _format(match[2].strip(), stated))
    if re.fullmatch(r"0*\.?0*", text):
        raise Invalid(f"a budget of {text or 'nothing'} holds no model: write {FORMS}; leave it out for no limit")
    if re.fullmatch(r"\d*\.?\d+", text) and float(text) < BARE:
        raise Invalid(f"{stated!r} does not say what is meant: write {text}GiB, {text}MiB or, of a linear weight on average, '{text} bits'")
    size = sizes.FORM.fullmatch(text)
    if not size or size[2].lower() not in {"", *sizes.UNITS, "k", "m", "g", "t"}:
        raise Invalid(f"a budget is {FORMS}, and {stated!r} came")
    return sizes.parse(stated if isinstance(stated, int) else text)


def _format(name: str, stated: Any) -> Any:
    if DENSE.fullmatch(name):
        return None
    try:
        return registry.from_json("formats", registry.spelled(name))
    except (ValueError, TypeError) as e:
        raise Invalid(f"{stated!r} names a format that finebits does not have ({str(e).splitlines()[0]})") from None
