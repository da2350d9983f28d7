"""Progress of long work on stderr: a line that rewrites itself on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Call it with (done, total, what); `say` prints a line of its own."""

    def __init__(self, title: str, quiet: bool = False, baseline: int = 0, budget: int | None = None) -> None:
        self.title, self.quiet, self.baseline, self.budget = title, quiet, baseline, budget
        self.live = sys.stderr.isatty()
        self.begun = self.shown = time.monotonic()
        self.open = False

    def __call__(self, done: int, total: int, what: str = "") -> None:
        now = time.monotonic()
        last = done >= total
        if self.quiet or (now - self.shown < (0.1 if self.live else 10) and not last):
            return
        self.shown = now
        left = (now - self.begun) / max(done, 1) * (total - done)
        text = f" {self.title}  {done}/{total}  {what}" + ("" if last else f"  {left:.0f} s left")
        if self.live:
            print("\r" + text[:119].ljust(119), end="\n" if last else "", file=sys.stderr, flush=True)
            self.open = not last
        else:
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """One whole line."""
        if self.quiet:
            return
        if self.open:
            print(file=sys.stderr)
            self.open = False
        print(f" {text}", file=sys.stderr, flush=True)

    def memory(self, e: dict[str, Any]) -> str:
        """What is taken now as the budget counts it: above the process before the model, or on the device."""
        taken = e["device"] if "device" in e else max(e["rss"] - self.baseline, 0)
        return f"{taken / 2**20:.0f}" + (f" of {self.budget / 2**20:.0f}" if self.budget is not None else "") + " MiB"

    def event(self, e: dict[str, Any]) -> None:
        """An event of a training run, as people want to see it."""
        if e["event"] == "step":
            loss = f"loss {e['loss']:.4f}" if "loss" in e else ""
            self(e["step"], e["total"], f"{loss}  lr {e['lr']:.2e}  memory {self.memory(e)}")
        elif e["event"] in ("phase", "save"):
            self.say(e.get("name") or f"saved at step {e['step']}")
