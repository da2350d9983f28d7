"""What llama.cpp computes of a GGUF file: `python llama_logits.py MODEL ADAPTER|- ROWS.json OUT.npz`, in an environment with llama-cpp-python.

ROWS.json holds {"rows": [[token, …], …], "from": [[position, …], …], "texts": [text, …]}; OUT.npz gets the logits at those positions one after
another, what every text is cut into, and the file's chat template.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

F32 = 0


def main(model_path: str, adapter: str, rows: str, out: str) -> None:
    asked = json.loads(Path(rows).read_text())
    longest = max(len(ids) for ids in asked["rows"])
    model = Llama(
        model_path,
        n_ctx=longest,
        n_batch=longest,
        logits_all=True,
        lora_path=None if adapter == "-" else adapter,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    found = []
    for ids, places in zip(asked["rows"], asked["from"], strict=True):
        model.reset()
        model.eval(ids)
        found.append(np.array(model.scores[places], dtype=np.float32))
    cut = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
    template = model.metadata.get("tokenizer.chat_template", "")
    np.savez(out, logits=np.concatenate(found), cut=json.dumps(cut), template=template)


if __name__ == "__main__":
    main(*sys.argv[1:])
