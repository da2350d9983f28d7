"""Exports inside llama.cpp: `python benchmarks/verify_llama.py RECIPE` of a job that was trained. KL from the trained model, top-1 agreement and
loss on held-out rows, for the base under its adapter (--lora) and for merged files; texts must be cut into the tokens that were trained,
and the chat template be the tokenizer's, byte for byte.

llama-cpp-python lives in an environment of its own (`make verify-llama` makes it); without one nothing is verified, and that is said. On a CPU
llama.cpp rounds what enters a product with a quantized weight to 8 bits, so that a file which holds the trained weights differs a little too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import replay

TARGETS = "gguf,gguf:f16,gguf:q8_0,gguf:q4_k_m"
ACTIVATIONS = 1e-2  # nats a token that inputs of 8 bits may cost
SCRIPT = Path(__file__).with_name("llama_logits.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--to", default=TARGETS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--python", type=Path, default=Path(".venv-llama/bin/python"))
    given = parser.parse_args()
    if not given.python.exists():
        print(
            f"skipped: there is no {given.python} with llama-cpp-python; make verify-llama makes it (a compiler and some minutes are needed)"
        )
        return 0
    job = replay.Replay(given.recipe, given.to.split(","), given.rows)

    def replayed(folder: Path) -> tuple[replay.Logs, dict[str, Any]]:
        base, adapter = folder / "base" / "model.gguf", folder / "adapter.gguf"
        model = base if base.exists() else folder / "model.gguf"
        return replay.ask(given.python, SCRIPT, [str(model), str(adapter) if base.exists() and adapter.exists() else "-"], job.asked)

    return 0 if job.table(replayed, ACTIVATIONS, "*.gguf") else 6


if __name__ == "__main__":
    sys.exit(main())
