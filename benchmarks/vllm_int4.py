"""A LoRA over a base of INT4 codes inside vLLM, by its rank: does it drift from what was trained (vllm-project/vllm#50059)?

    python benchmarks/vllm_int4.py [--ranks 8 32] [--times 2] [--python .venv-vllm/bin/python]

Two blocks of SmolLM2-135M's shapes with random weights in int4-b32-bf16, as compressed-tensors and as GPTQ, under a LoRA over every linear layer
that moves its answers by half a nat and more; the same adapter over the dense base beside them. What vLLM multiplies codes with is compiled for
AVX-512 alone: on other processors that one product, `cpu_gemm_wna16`, is made here of the same codes and in its own arithmetic (weights
rounded to 16 bits, sums in float32), and all else is vLLM's: how it reads the checkpoint, joins its layers and lays LoRA over them. Every
figure is asked for `--times`, in processes of their own: `again` is the largest difference among them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import served
import torch

import finebits as fb
from finebits.build import all_hosts, build, hosts
from finebits.evaluate.heldout import head_of, score, teacher
from finebits.interop import peft
from finebits.interop.runtimes import base as runtimes
from finebits.tasks import base as tasks

PRODUCT = """
import sys

with open("/proc/cpuinfo") as said:
    wanted = "avx512f" not in said.read()
if wanted:
    import torch

    held = torch.library.Library("_C", "FRAGMENT")
    held.define(
        "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, Tensor? zeros, Tensor? bias, SymInt pack_factor, "
        "str isa_hint) -> ()"
    )

    def product(input, q_weight, output, scales, zeros, bias, pack_factor, isa_hint):
        assert zeros is None and pack_factor == 8
        k = input.shape[1]
        words = q_weight.view(-1, k, 2).permute(1, 0, 2).reshape(k, -1)
        codes = ((words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).reshape(k, -1) - 8
        W = (codes.float() * scales.float().repeat_interleave(k // len(scales), 0)).to(input.dtype)
        y = input.float() @ W.float()
        output.copy_(y if bias is None else y + bias.float())

    held.impl("cpu_gemm_wna16", product, "CPU")
"""


def tuned(rank: int) -> Any:
    """The model with its adapter, which turns the likeliest word at most places."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=served.WORDS,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=128,
    )
    spec = fb.Spec(fb.Int(4, 32, scale="bf16"), adapter=fb.LoRA(rank, 2.0 * rank))
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in served.LINEARS]
    model = build(LlamaForCausalLM(config).eval(), fb.Plan(dict.fromkeys(names, spec), model="two", levers=fb.Levers(dtype="float32")))
    gen = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for _, host in all_hosts(model):
            for p in host.p.parameters():
                p.copy_(0.05 * (8 / rank) ** 0.25 * torch.randn(p.shape, generator=gen))  # as large an update at every rank
    return model


def moved(model: Any, batches: Any, trained: Any) -> float:
    """KL of the base alone from the tuned model."""
    held = {name: host.active for name, host in hosts(model)}
    for _, host in hosts(model):
        host.active = []
    scores = score(model, batches, trained, head=head_of(tasks.of(model).head(model)))
    for name, host in hosts(model):
        host.active = held[name]
    assert scores.kl is not None
    return float(scores.kl.sum() / scores.tokens.sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--to", nargs="+", default=["adapter", "compressed_tensors", "gptq"], help="exports that are looked at")
    parser.add_argument("--python", default=runtimes.RUNTIMES["vllm"].environment + "/bin/python")
    parser.add_argument("--times", type=int, default=2)
    given = parser.parse_args()
    runtime, batches, words = runtimes.RUNTIMES["vllm"], served.rows(), served.tokenizer()
    print("| rank | target | base | the adapter moves | KL | max Δ logit | top-1 | again |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="finebits-int4-") as scratch:
        place = Path(scratch)
        (place / "more").mkdir()
        (place / "more" / "sitecustomize.py").write_text(PRODUCT)
        python = place / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={place}/more exec {Path(given.python).absolute()} "$@"\n')
        python.chmod(0o755)
        for rank in given.ranks:
            model = tuned(rank)
            trained, exact = teacher(model, batches, dtype=torch.float32), peft.exactly(model, batches)
            far = moved(model, batches, trained)
            for to in given.to:
                folder = place / f"{to}-{rank}"
                peft.export(model, folder, to, words)
                logits = []
                for i in range(given.times):
                    (own := place / f"asked-{to}-{rank}-{i}").mkdir()
                    logits.append(runtimes.ask(runtime, str(python), folder, runtimes.asked(batches, words), own).logits)
                scores, largest = runtimes.scored(logits[0], trained, batches), runtimes.difference(logits[0], exact)
                assert scores.kl is not None and scores.agree is not None
                tokens, again = scores.tokens.sum(), max(float(abs(one - logits[0]).max()) for one in logits)
                kl, top1 = scores.kl.sum() / tokens, scores.agree.sum() / tokens
                base = {"adapter": "dense, float32", "gptq": "INT4, float16"}.get(to, "INT4, bfloat16")
                print(f"| {rank} | {to} | {base} | {far:.3f} | {kl:.1e} | {largest:.1e} | {top1:.1%} | {again:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
