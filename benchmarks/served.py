"""Models whose shapes are odd, of random weights, through every target and the runtimes that serve it.

    python benchmarks/served.py [--only CASE ...] [--to TARGET ...] [--runtimes]

A Llama of two blocks, groups of three heads to a key, matrices of 96 and 200 columns, a vocabulary that no power of two divides, under adapters
that were moved at random (ranks and scalings differ by matrix); the same of 192 columns, whose heads are wide enough for vLLM. What a target
cannot hold is told in its sentence. With `--runtimes`, llama.cpp and vLLM are asked as `finebits export --verify` does, in .venv-llama and
.venv-vllm of this folder. Exit code 6 where anything is another model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import finebits as fb
from finebits.build import all_hosts, build
from finebits.errors import Invalid
from finebits.evaluate.heldout import teacher
from finebits.export.base import VerificationFailed, check_plan
from finebits.interop import peft
from finebits.interop.runtimes import base as runtimes
from finebits.report.results import failed

WORDS = 331
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DENSE = ("adapter", "merged", "packed", "peft")
SERVED, DOWN = ("merged", "packed", "gptq", "compressed_tensors"), ("mlp.down_proj",)
MIXES = ("gguf:f16", "gguf:q8_0", "gguf:q4_k_m", "gguf:q3_k_m", "gguf:q2_k")
# case: columns of the model, format, adapter by matrix, matrices that are left dense, targets
CASES: dict[str, tuple[int, Any, Any, tuple[str, ...], tuple[str, ...]]] = {
    "int4 rows": (96, fb.Int(4, "row", scale="bf16"), None, (), (*DENSE, "gptq", "compressed_tensors", "bitsandbytes", "gguf")),
    "int3 rows": (96, fb.Int(3, "row", scale="bf16"), None, (), ("packed", "gptq", "compressed_tensors")),
    "int4 of all": (96, fb.Int(4, 16, scale="bf16"), None, (), ("packed", "gptq", "compressed_tensors")),
    "int4": (96, fb.Int(4, 16, scale="bf16"), None, DOWN, ("packed", "gptq", "compressed_tensors")),
    "nf4 of all": (96, fb.NF(4, 32), None, (), ("bitsandbytes",)),
    "nf4": (96, fb.NF(4, 32), None, DOWN, ("packed", "bitsandbytes")),
    "q4_0 of all": (96, fb.Int(4, 32, scale="fp16"), None, (), ("gguf",)),
    "q4_0": (96, fb.Int(4, 32, scale="fp16"), None, DOWN, ("gguf", *MIXES)),
    **{f"l4q {bits} rows": (96, None, fb.L4Q(rank=2, bits=bits, block="row"), (), SERVED) for bits in (4, 3, 2)},
    "l4q q4_0": (96, None, fb.L4Q(rank=2, bits=4, block=32, scale="fp16"), DOWN, ("packed", "gguf", "gptq", "compressed_tensors")),
    "peqa": (96, fb.Int(4, 16, scale="bf16"), fb.PEQA(16), DOWN, SERVED),
    "peqa rows": (96, fb.Int(3, "row", scale="bf16"), fb.PEQA("row"), (), SERVED),
    "wider": (192, fb.Int(4, "row", scale="bf16"), None, (), ("adapter", "peft", "merged", "gptq", "compressed_tensors")),
}


def tokenizer() -> Any:
    """Byte-level BPE of WORDS tokens that splits as GPT-2 does, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks, text = ["<pad>", "<s>", "</s>"], (__doc__ or "").split()
    inner.train_from_iterator(
        [" ".join(text)] * 9,
        trainers.BpeTrainer(
            vocab_size=WORDS, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template)


def tuned(hidden: int, format: Any, adapter: Any, dense: tuple[str, ...]) -> Any:
    """The model, with every adapter somewhere else than where it begins."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=128,
    )
    own = {name: adapter or fb.LoRA(rank=2 + i, alpha=3.0 + 2 * i) for i, name in enumerate(LINEARS)}
    own |= {name: fb.LoRA(rank=2, alpha=4.0) for name in dense} if adapter is None else {}
    specs = {}
    for block in range(2):
        for name in LINEARS:
            left = name in dense
            lies = None if left and adapter is not None else own[name]
            specs[f"model.layers.{block}.{name}"] = fb.Spec(None if left else format, adapter=lies)
    model = build(LlamaForCausalLM(config).eval(), fb.Plan(specs, model="odd", levers=fb.Levers(dtype="float32")))
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, host in all_hosts(model):
            for p in host.p.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape, generator=gen))
    return model


def rows() -> list[dict[str, torch.Tensor]]:
    """Batches of token ids, filled up on the right."""
    gen, made = torch.Generator().manual_seed(2), []
    for lengths in ((9, 17, 13), (30, 21, 8)):
        ids = torch.randint(3, WORDS, (3, max(lengths)), generator=gen)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        labels = torch.where((mask == 1) & (torch.arange(max(lengths)) >= max(lengths) - 16), ids, -100)
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


def case(name: str, place: Path, pythons: dict[str, str], only: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of export.json, sentences of what was refused)."""
    hidden, format, adapter, dense, targets = CASES[name]
    model, batches, words = tuned(hidden, format, adapter, dense), rows(), tokenizer()
    trained, exact = teacher(model, batches, dtype=torch.float32), peft.exactly(model, batches)
    found, refused = [], []
    for to in targets if only is None else [to for to in targets if to in only]:
        folder = place / f"{name}-{to}".replace(" ", "_").replace(":", "-")
        try:
            check_plan(model.finebits.plan, [to], model.config.to_dict())
            row = peft.export(model, folder, to, words)
        except Invalid as e:
            refused.append(f"{name} to {to}: {e}")
            continue
        try:
            row |= peft.verify(folder, to, model, batches, trained, reference=exact)
        except VerificationFailed as e:
            row |= e.result
        found.append(row | {"runtimes": runtimes.verify(folder, to, pythons, trained, batches, words, exact=exact)})
    return found, refused


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--to", nargs="+", default=None, metavar="TARGET", help="these targets alone")
    parser.add_argument("--runtimes", action="store_true")
    given = parser.parse_args()
    pythons, wrong, refused = runtimes.found({}, beside=True) if given.runtimes else {}, list[str](), list[str]()
    print("| case | target | read by | max Δ logit | KL | top-1 | loss − trained's | verdict |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="finebits-served-") as scratch:
        for name in given.only:
            found, no = case(name, Path(scratch), pythons, given.to)
            refused += no
            for row in (row for t in found for row in (t, *t["runtimes"])):
                figures = "– | – | – | –"
                if "kl" in row:
                    figures = f"{row['max_logit_difference']:.1e} | {row['kl']:.1e} | {row['top1']:.1%} | {row['lost']:+.4f}"
                said = f"{row['verdict']}: {row['note']}" if "kl" not in row else row["verdict"]
                print(f"| {name} | {row['name']} | {row['reader']} | {figures} | {said} |", flush=True)
            wrong += failed({"targets": found})
    print("", *refused, sep="\n")
    return 6 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
