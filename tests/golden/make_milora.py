"""MiLoRA by its authors: github.com/sufenlp/MiLoRA at 4740756d5d74700527d799a8d4a0c40dc9e92235, svd_init.py (initialize_lora_layer).

A 24 x 40 weight, rank 5 (their alpha is the rank): both factors and what is taken out of the weight, mode "min".
"""

import logging
import time

import torch

from golden.values import functions, keep

theirs = functions(
    "4740756d5d74700527d799a8d4a0c40dc9e92235", "svd_init.py", torch=torch, time=time, logger=logging.getLogger(), total_time=0.0
)
torch.manual_seed(0)
W = torch.randn(24, 40).round(decimals=2)
A, B, taken = theirs["initialize_lora_layer"](W, 5, "min")
keep("milora", W=W, A=A, B=B, taken=taken)
