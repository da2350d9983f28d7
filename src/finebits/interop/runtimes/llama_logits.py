"""What llama.cpp computes of a GGUF file: `python llama_logits.py MODEL ADAPTER|- ROWS.json OUT`, in an environment with llama-cpp-python.

Imports nothing of finebits. ROWS.json holds {"rows": [[token, …], …], "from": [[position, …], …], "texts": [text, …]}; OUT.npy gets the logits
(positions, vocabulary) in float32 at those positions one after another, and OUT.json what every text is cut into, the file's chat template, and
whose code it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

F32 = 0  # keys and values in full


def main(model_path: str, adapter: str, rows: str, out: str) -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    asked = json.loads(Path(rows).read_text(encoding="utf-8"))
    longest = max(len(ids) for ids in asked["rows"])
    model = llama_cpp.Llama(
        model_path,
        n_ctx=longest,
        n_batch=longest,
        logits_all=True,
        lora_path=None if adapter == "-" else adapter,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    count = sum(map(len, asked["from"]))
    found = np.lib.format.open_memmap(f"{out}.npy", mode="w+", dtype=np.float32, shape=(count, model.n_vocab()))
    done = 0
    for ids, places in zip(asked["rows"], asked["from"], strict=True):
        model.reset()
        model.eval(ids)
        found[done : done + len(places)] = model.scores[places]
        done += len(places)
    found.flush()
    cut = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
    said = {"by": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", "tokens": cut}
    Path(f"{out}.json").write_text(json.dumps(said | {"template": model.metadata.get("tokenizer.chat_template", "")}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
