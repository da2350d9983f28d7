"""What vLLM computes of a model folder: `python vllm_logits.py MODEL ADAPTER|- ROWS.json OUT`, in an environment with vllm.

Imports nothing of finebits. ROWS.json, OUT.npy and OUT.json are those of llama_logits.py; log-probabilities stand where logits stand there.
Dense weights are computed with in float32, so that what is seen is the file's doing. What vLLM multiplies codes with takes numbers of 16 bits
alone, and has scales in the same: bfloat16, for GPTQ float16, which is what they are held in; inputs stay as wide as that.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of those that vLLM has a place for


def computed_in(config: dict[str, Any]) -> str:
    """The dtype for a model of this config.json."""
    quantized = config.get("quantization_config")
    return "float32" if quantized is None else "float16" if quantized["quant_method"] == "gptq" else "bfloat16"


def main(model_path: str, adapter: str, rows: str, out: str) -> None:
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    asked = json.loads(Path(rows).read_text(encoding="utf-8"))
    settings: dict[str, object] = {}
    request = None
    if adapter != "-":
        config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        if config.get("peft_type", "LORA") != "LORA":
            sys.exit(f"vLLM does not support adapters of PEFT's method {config['peft_type']}")
        most = max([config["r"], *config.get("rank_pattern", {}).values()])
        if most > RANKS[-1]:
            sys.exit(f"vLLM does not support adapters of rank {most}, {RANKS[-1]} is its largest")
        settings = {"enable_lora": True, "max_lora_rank": next(r for r in RANKS if r >= most), "max_loras": 1}
        request = LoRARequest("adapter", 1, adapter)
    engine = vllm.LLM(
        model_path,
        dtype=computed_in(json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))),
        enforce_eager=True,
        max_model_len=max(map(len, asked["rows"])) + 1,
        max_num_seqs=1,
        max_logprobs=-1,
        **settings,
    )
    every = vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1)  # of what follows; for a whole prompt it would be gigabytes
    found, done, count = None, 0, sum(map(len, asked["from"]))
    for ids, places in zip(asked["rows"], asked["from"], strict=True):
        prompts = [{"prompt_token_ids": ids[: place + 1]} for place in places]
        for made in engine.generate(prompts, every, lora_request=request, use_tqdm=False):
            (seen,) = made.outputs[0].logprobs
            if found is None:
                found = np.lib.format.open_memmap(f"{out}.npy", mode="w+", dtype=np.float32, shape=(count, max(seen) + 1))
            found[done] = -np.inf
            found[done][list(seen)] = [one.logprob for one in seen.values()]
            done += 1
    assert found is not None
    found.flush()
    tokenizer = engine.get_tokenizer()
    cut = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]]
    said = {"by": f"vLLM {vllm.__version__}", "tokens": cut, "template": tokenizer.chat_template or ""}
    Path(f"{out}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
