"""Exports inside llama.cpp: `python benchmarks/verify_llama.py RECIPE` of a job that was trained. KL from the trained model, top-1 agreement and
loss on held-out rows, for the base under its adapter (--lora) and for merged files; texts must be cut into the tokens that were trained,
and the chat template be the tokenizer's, byte for byte.

llama-cpp-python lives in an environment of its own (`make verify-llama` makes it); without one nothing is verified, and that is said. On a CPU
llama.cpp rounds what enters a product with a quantized weight to 8 bits, so that a file which holds the trained weights differs a little too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finebits import job, runfolder
from finebits.export.base import target
from finebits.interop.hf import load_with
from finebits.interop.peft import KL
from finebits.recipe import Recipe
from finebits.run.part import Part
from finebits.run.stage import Stage, main_run
from finebits.runfolder import RunFolder

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
    recipe, to = Recipe.load(given.recipe), given.to.split(",")
    folder = RunFolder(recipe.output_dir)
    if missing := [name for name in to if not (folder.target(name) / "finebits.json").exists()]:
        job.export(recipe, missing, verify=False)
    part = Part(folder, Stage("export", runfolder.EXPORT))
    model = load_with(part.processor, folder.run(main_run(recipe)) / runfolder.MODEL)
    asked, labels, ours = trained(model, part.batches, given.rows, part.processor)
    print(f" {len(asked['rows'])} held-out rows, {len(labels)} tokens; loss of the trained model {loss_of(ours, labels):.4f}")
    print(f" {'':24} {'MiB':>8} {'KL vs trained':>14} {'top-1 agree':>12} {'loss':>8}   verdict")
    wrong = False
    for name in to:
        theirs, said = replayed(given.python, *files_of(folder.target(name)), asked)
        kl = float((np.exp(ours) * (ours - theirs)).sum(-1).mean())
        top1, most = float((ours.argmax(-1) == theirs.argmax(-1)).mean()), max(KL, target(name).rounds) + ACTIVATIONS
        found = [
            m
            for m, right in (
                ("tokens", cut(part.processor, asked) == said["cut"]),
                ("template", template(part.processor) == said["template"]),
            )
            if not right
        ]
        verdict = "ok" if math.isfinite(kl) and kl <= most and not found else f"fail ({', '.join(found) or f'KL above {most:g}'})"
        wrong |= verdict != "ok"
        size = sum(f.stat().st_size for f in folder.target(name).rglob("*.gguf")) / 2**20
        print(f" {name:24} {size:8.1f} {kl:14.5f} {top1:12.1%} {loss_of(theirs, labels):8.4f}   {verdict}", flush=True)
    return 6 if wrong else 0


def trained(model: Any, batches: Any, rows: int, tokenizer: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """(what is asked of llama.cpp, the tokens that should follow, their log-probabilities from the model as it was trained)."""
    asked: dict[str, Any] = {"rows": [], "from": []}
    labels, found = [], []
    with torch.no_grad():
        for batch in batches:
            logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for ids, mask, wanted, scores in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], logits, strict=True):
                n = int(mask.sum())  # rows are filled up on the right
                places = [i for i in range(n - 1) if int(wanted[i + 1]) != -100]
                if len(asked["rows"]) == rows or not places:
                    continue
                asked["rows"].append(ids[:n].tolist())
                asked["from"].append(places)
                labels += [int(wanted[i + 1]) for i in places]
                found.append(torch.log_softmax(scores[places].float(), -1).numpy())
    asked["texts"] = [tokenizer.decode(ids) for ids in asked["rows"]] + ["12 345\n\n  naïve … Straße\t你好 🙂's"]
    return asked, np.array(labels), np.concatenate(found)


def replayed(python: Path, model: Path, adapter: Path | None, asked: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """(log-probabilities of llama.cpp, what it says of texts and template)."""
    with tempfile.TemporaryDirectory(prefix="finebits-llama-") as scratch:
        rows, out = Path(scratch) / "rows.json", Path(scratch) / "out.npz"
        rows.write_text(json.dumps(asked))
        subprocess.run([python, SCRIPT, model, adapter or "-", rows, out], check=True)
        with np.load(out) as made:
            logits = torch.from_numpy(made["logits"])
            said = {"cut": json.loads(str(made["cut"])), "template": str(made["template"])}
    return torch.log_softmax(logits, -1).numpy(), said


def files_of(folder: Path) -> tuple[Path, Path | None]:
    base, adapter = folder / "base" / "model.gguf", folder / "adapter.gguf"
    return (base, adapter if adapter.exists() else None) if base.exists() else (folder / "model.gguf", None)


def cut(tokenizer: Any, asked: dict[str, Any]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]]


def template(tokenizer: Any) -> str:
    return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""


def loss_of(logs: np.ndarray, labels: np.ndarray) -> float:
    return float(-logs[np.arange(len(labels)), labels].mean())


if __name__ == "__main__":
    sys.exit(main())
