"""Exports inside vLLM: `python benchmarks/verify_vllm.py RECIPE` of a job that was trained. KL from the trained model, top-1 agreement and loss
on held-out rows, for dense bases and those in codes, under their adapters and merged, in float32 on a CPU.

vllm lives in an environment of its own (`make verify-vllm` makes it); without one nothing is verified, and that is said.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import replay

TARGETS = "adapter,merged,compressed_tensors"
ARITHMETIC = 1e-3  # nats a token: products of codes are not summed in torch's order, some in 16 bits
LACKS = {"cpu_gemm_wna16": "vLLM multiplies codes of 4 bits on CPUs with AVX-512 alone"}
SCRIPT = Path(__file__).with_name("vllm_logits.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--to", default=TARGETS)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"))
    given = parser.parse_args()
    if not given.python.exists():
        print(f"skipped: there is no {given.python} with vllm; make verify-vllm makes it (some gigabytes)")
        return 0
    job = replay.Replay(given.recipe, given.to.split(","), given.rows)

    def replayed(folder: Path) -> tuple[replay.Logs, dict[str, Any]]:
        base = folder / "base"
        words = [str(base if base.exists() else folder), str(folder) if base.exists() else "-"]
        return replay.ask(given.python, SCRIPT, words, job.asked, LACKS)

    return 0 if job.table(replayed, ARITHMETIC, "*.safetensors") else 6


if __name__ == "__main__":
    sys.exit(main())
