"""4-bit tables by QLoRA's authors: bitsandbytes 0.50.2 of PyPI, functional.get_4bit_type. Needs no checkout.

By code, largest number one: "nf4" and "fp4".
"""

from bitsandbytes.functional import get_4bit_type

from golden.values import keep, released

released("bitsandbytes", "0.50.2")
keep("bitsandbytes", **{name: get_4bit_type(name, device="cpu")[None] for name in ("nf4", "fp4")})
