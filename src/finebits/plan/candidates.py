"""What a plan chooses from unless it is told: a format of 2, 3, 4 and 8 bits, by their short names."""

CANDIDATES = ("nf2-b64-bf16", "nf3-b64-bf16", "nf4-b64-bf16", "int8-b128-bf16")
