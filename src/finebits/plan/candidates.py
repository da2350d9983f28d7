"""What a plan chooses from unless it is told: a format of 2, 3, 4 and 8 bits, by their short names."""

CANDIDATES = ("nf2-b64-bf16", "nf3-b64-bf16", "nf4-b64-bf16", "int8-b128-bf16")

# The same where the weights themselves are trained, beside dense ones: Q-GaLore's groups of 256, with their own minimum.
TRAINED = ("int8a-b256",)
