"""What verify_llama.py and verify_vllm.py share: held-out rows under the model as it was trained, and the table of what another runtime makes
of its exports."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
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

Logs = np.ndarray  # (positions, vocabulary): log-probabilities


class NotHere(Exception):
    """This machine is none that the runtime computes this on, and why."""


class Replay:
    """The job of a recipe, trained and exported, and its held-out rows."""

    def __init__(self, recipe: Path, to: list[str], rows: int) -> None:
        self.recipe, self.to = Recipe.load(recipe), to
        self.folder = RunFolder(self.recipe.output_dir)
        if missing := [name for name in to if not (self.folder.target(name) / "finebits.json").exists()]:
            job.export(self.recipe, missing, verify=False)
        part = Part(self.folder, Stage("export", runfolder.EXPORT))
        self.tokenizer = part.processor
        model = load_with(part.processor, self.folder.run(main_run(self.recipe)) / runfolder.MODEL)
        self.asked, self.labels, self.ours = trained(model, part.batches, rows, part.processor)

    def table(self, replayed: Callable[[Path], tuple[Logs, dict[str, Any]]], costs: float, size: str) -> bool:
        """Print what `replayed` makes of every target's folder; whether all are right. A target may be its own rounding, and `costs` nats of
        the runtime's arithmetic, away; `size` is a pattern of the files that hold weights."""
        print(
            f" {len(self.asked['rows'])} held-out rows, {len(self.labels)} tokens; loss of the trained model {self.loss_of(self.ours):.4f}"
        )
        print(f" {'':24} {'MiB':>8} {'KL vs trained':>14} {'top-1 agree':>12} {'loss':>8}   verdict")
        right = True
        for name in self.to:
            held = sum(f.stat().st_size for f in self.folder.target(name).rglob(size)) / 2**20
            try:
                theirs, said = replayed(self.folder.target(name))
            except NotHere as e:
                print(f" {name:24} {held:8.1f} {'–':>14} {'–':>12} {'–':>8}   not run: {e}", flush=True)
                continue
            kl = float((np.exp(self.ours) * (self.ours - theirs)).sum(-1).mean())
            top1, most = float((self.ours.argmax(-1) == theirs.argmax(-1)).mean()), max(KL, target(name).rounds) + costs
            wrong = [what for what, own in (("tokens", self.cut()), ("template", self.template())) if said[what] != own]
            verdict = "ok" if math.isfinite(kl) and kl <= most and not wrong else f"fail ({', '.join(wrong) or f'KL above {most:g}'})"
            right &= verdict == "ok"
            print(f" {name:24} {held:8.1f} {kl:14.5f} {top1:12.1%} {self.loss_of(theirs):8.4f}   {verdict}", flush=True)
        return right

    def cut(self) -> list[list[int]]:
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.asked["texts"]]

    def template(self) -> str:
        return self.tokenizer.chat_template if isinstance(self.tokenizer.chat_template, str) else ""

    def loss_of(self, logs: Logs) -> float:
        return float(-logs[np.arange(len(self.labels)), self.labels].mean())


def trained(model: Any, batches: Any, rows: int, tokenizer: Any) -> tuple[dict[str, Any], np.ndarray, Logs]:
    """(what is asked of the runtime, the tokens that should follow, their log-probabilities from the model as it was trained)."""
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


def ask(
    python: Path, script: Path, words: list[str], asked: dict[str, Any], lacks: Mapping[str, str] = MappingProxyType({})
) -> tuple[Logs, dict[str, Any]]:
    """(log-probabilities of `script WORDS ROWS.json OUT.npz` in another environment, what it says of texts and template). Raises NotHere, with
    the words beside it, where a key of `lacks` is among what the script says as it fails."""
    with tempfile.TemporaryDirectory(prefix="finebits-replay-") as scratch:
        rows, out = Path(scratch) / "rows.json", Path(scratch) / "out.npz"
        rows.write_text(json.dumps(asked))
        done = subprocess.run([python, script, *words, rows, out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise next((NotHere(why) for sign, why in lacks.items() if sign in done.stderr), RuntimeError(done.stderr[-4000:]))
        with np.load(out) as made:
            logits = torch.from_numpy(made["logits"])
            said = {"tokens": json.loads(str(made["cut"])), "template": str(made["template"])}
    return torch.log_softmax(logits.float(), -1).numpy(), said
