"""A checkpoint larger than memory is to be, merged with a LoRA: what the process takes beside itself.

    python benchmarks/big_merge.py [--gib 2] [--shards 4] [--limit-mib 700] [--kills 3]

A Llama of random bfloat16 weights of that many GiB is written in shards, and a random LoRA over all its linears; both go again. Another process
merges them by `finebits.merge` and tells its peak over what it held when finebits and its libraries were there. Two matrices of the result are
compared with base + s·B A. Then the merge is killed (SIGKILL) at `kills` points of its time and begun again: nothing half written may count, and
what is there in the end must be the same files. The exit code is 1 where any of this does not hold, or the peak is over the limit.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HIDDEN, INNER, WORDS, RANK, ALPHA = 2048, 5632, 32000, 16, 32
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CHILD = """
import json, resource, sys, time
import finebits as fb
import peft, transformers, finebits.interop.merging
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, start = peak(), time.time()
print("begins", flush=True)
fb.merge(*sys.argv[1:])
print(json.dumps({"before": before, "peak": peak(), "seconds": round(time.time() - start, 1)}))
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LINEARS.items()}
        found |= {f"model.layers.{i}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


def checkpoint(folder: Path, layers: int, shards: int) -> None:
    """The base, its tensors cut out of one run of random numbers."""
    from transformers import LlamaConfig

    from finebits.tensorfile import Entry, write

    folder.mkdir()
    LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    pool = (torch.randn(WORDS * HIDDEN + 10**6, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    names, where = shapes(layers), dict[str, str]()
    each = -(-len(names) // shards)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = list(names.items())[i * each : (i + 1) * each]
        where |= {name: file for name, _ in part}
        draw = lambda name, shape: pool[len(name) * 997 :][: math.prod(shape)].reshape(shape)  # noqa: E731
        write(folder / file, {n: Entry(torch.bfloat16, s, functools.partial(draw, n, s)) for n, s in part}, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def lora(folder: Path, base: Path, layers: int) -> None:
    """An adapter over all linears."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[n.rpartition(".")[2] for n in LINEARS],
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    ).save_pretrained(folder)
    gen, tensors = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for i in range(layers):
        for name, (m, n) in LINEARS.items():
            at = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, n, generator=gen) * 0.02
            tensors[f"{at}.lora_B.weight"] = torch.randn(m, RANK, generator=gen) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")


def wrong(place: Path, layers: int) -> list[str]:
    """Matrices of the result that are not base + s·B A."""
    from finebits.interop.checkpoint import Tensors
    from finebits.tensorfile import Stored

    base, merged, update = Tensors(place / "base"), Tensors(place / "merged"), Stored(place / "lora" / "adapter_model.safetensors")
    found = []
    for name in ("model.layers.0.self_attn.q_proj", f"model.layers.{layers - 1}.mlp.down_proj"):
        A, B = (update[f"base_model.model.{name}.lora_{end}.weight"] for end in "AB")
        right = (base[f"{name}.weight"].float() + ALPHA / RANK * B @ A).bfloat16()
        found += [] if torch.equal(merged[f"{name}.weight"], right) else [name]
    return found + [n for n in ("lm_head.weight", "model.norm.weight") if not torch.equal(base[n], merged[n])]


def killed(run: list[str], target: Path, seconds: float, kills: int) -> list[str]:
    """What does not hold of merges into `target` that are killed on their way; at last one is left to end."""
    from finebits import artefacts

    odd, command = list[str](), [*run[:-1], str(target)]
    for i in range(kills):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        child.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]  # it begins to merge
        time.sleep(seconds * (i + 1) / (kills + 1))
        child.kill()
        child.wait()
        if target.exists():
            artefacts.settle(target)
            odd += [f"half of it counted after kill {i + 1}"] if list(target.glob("*.safetensors")) and not artefacts.intact(target) else []
    subprocess.run(command, check=True, capture_output=True)
    return odd + ([] if artefacts.intact(target) else ["it is not whole in the end"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--limit-mib", type=int, default=700)
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args()
    per = 2 * sum(m * n for m, n in LINEARS.values())
    layers = max(1, round((given.gib * 2**30 - 4 * WORDS * HIDDEN) / per))
    from finebits.files import sha256

    with tempfile.TemporaryDirectory(prefix="finebits-merge-") as scratch:
        place = Path(scratch)
        checkpoint(place / "base", layers, given.shards)
        lora(place / "lora", place / "base", layers)
        run = [sys.executable, "-c", CHILD, str(place / "lora"), str(place / "base"), str(place / "merged")]
        told: dict[str, Any] = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        size = sum(f.stat().st_size for f in (place / "base").glob("*.safetensors")) / 2**30
        grown, odd = told["peak"] - told["before"], wrong(place, layers)
        odd += killed(run, place / "again", told["seconds"], given.kills)
        odd += [f.name for f in (place / "merged").glob("*.safetensors") if sha256(f) != sha256(place / "again" / f.name)]
    print(f"{size:.2f} GiB in {given.shards} shards, {layers} layers, LoRA of rank {RANK}")
    print(f"{told['before']} MiB before, peak {told['peak']} MiB: {grown} MiB more (limit {given.limit_mib}), {told['seconds']} s")
    print(f"killed {given.kills} times on its way and begun again: the same files, unless they are named")
    print(f"wrong: {', '.join(odd) or 'nothing'}")
    return int(grown > given.limit_mib or bool(odd))


if __name__ == "__main__":
    sys.exit(main())
