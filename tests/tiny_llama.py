"""A tiny random Llama in a folder, plans over its linears, and batches: what the tests of saving, scoring and exporting share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import finebits as fb
from finebits.build import all_hosts, build

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def fresh(seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A LlamaForCausalLM of 2 layers with weights as large as a trained model's, so that a wrong one shows in the logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = sizes | more
    config = LlamaConfig(vocab_size=128, initializer_range=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():  # not the buffers: rotary frequencies stay float32, as from_pretrained leaves them
        p.data = p.data.to(dtype)
    return model


def folder(path: Path, **more: Any) -> Path:
    """The same, saved."""
    fresh(**more).save_pretrained(path)
    return path


def worded(path: Path, **more: Any) -> Path:
    """A folder with a tokenizer of the words w1 … w127, which pads with its end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder(path, **more)
    words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{i}": i for i in range(1, 128)}, "w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(path)
    return path


def geometry_of(
    config: Any, adapter: Any = None, dtype: str = "bfloat16", longest: int = 2048, attention: str = "sdpa", dropout: float = 0.0
) -> Any:
    """Shapes of the linears of a config's model, and its geometry, seen with rows of `longest` tokens."""
    from transformers import AutoModelForCausalLM

    from finebits.interop.observed import observed
    from finebits.interop.selecting import ends, targets
    from finebits.plan import memory

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.tie_weights()
    model.requires_grad_(False)
    shapes = targets(model, "all-linear")
    others = {k: p.numel() for k, p in model.named_parameters() if k.removesuffix(".weight") not in shapes}
    seen, _ = observed(model, shapes, adapter or fb.LoRA(), getattr(torch, dtype), longest, dropout)
    return shapes, memory.geometry(seen, config.vocab_size, others, shapes, *ends(model))


def llama_config(layers: int, hidden: int, inner: int, heads: int, kv: int, vocabulary: int, tied: bool = False) -> Any:
    from transformers import LlamaConfig

    sizes = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv)
    return LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)  # type: ignore[arg-type]


def names(layers: int = 2, linears: tuple[str, ...] = LINEARS) -> list[str]:
    return [f"model.layers.{i}.{linear}" for i in range(layers) for linear in linears]


def plan(adapter: Any = None, format: Any = "nf2", init: Any = None, dtype: str = "float32", **specs: Any) -> Any:
    """One spec for all linears; `specs` are per-module exceptions by the module's last part."""
    adapter = adapter or fb.LoRA(rank=4, alpha=8.0)
    format = fb.NF(2, block=32) if format == "nf2" else format
    spec = fb.Spec(format=format, adapter=adapter, init=init or fb.LoftQ(steps=1))
    return fb.Plan({n: specs.get(n.rpartition(".")[2], spec) for n in names()}, model="tiny/llama", levers=fb.Levers(dtype=dtype))


def tuned(plan: Any, model: Any = None, seed: int = 1) -> Any:
    """A model built from a plan, its adapters moved as if they had been trained."""
    model = build(model if model is not None else fresh(dtype=getattr(torch, plan.levers.dtype)), plan)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, host in all_hosts(model):
            for p in host.p.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn(p.shape, generator=gen))
    return model


def batches(rows: int = 6, size: int = 3, vocab: int = 128, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches; the first third of every row has no label."""
    gen = torch.Generator().manual_seed(seed)
    made = []
    for start in range(0, rows, size):
        lengths = [6 + (start + i) % 5 for i in range(min(size, rows - start))]
        t = max(lengths)
        ids = torch.randint(3, vocab, (len(lengths), t), generator=gen)
        mask = torch.tensor([[int(j < n) for j in range(t)] for n in lengths])
        labels = torch.where((mask == 1) & (torch.arange(t) >= 2), ids, -100)
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


def logits(model: Any, seed: int = 5) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits
