"""The unquantized model of a folder, of which the embeddings, the head and one block at a time are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finebits.arithmetic import compute_in
from finebits.calibrate.blockwise import blocks_of
from finebits.evaluate.heldout import Batch, Hidden, backbone, evaluating
from finebits.interop.checkpoint import Tensors, held_dtype
from finebits.interop.hf import fill, skeleton
from finebits.plan.base import Plan
from finebits.stream import Flow, Read, lazily, loaded


class Streamed:
    """`model` computes what the whole one would, to the bit: its blocks find their parameters in the checkpoint whenever they are called,
    which reads the model once a call. `hidden` reads it once for all batches.

    `instead(name, W)` may put another matrix, for a while, in the place of one of the checkpoint's.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        attention: str = "auto",
        place: Callable[[Any], Any] = lambda model: model,
        compute: torch.dtype | None = None,
    ) -> None:
        self.tensors, self.dtype = Tensors(folder), dtype
        self.instead: Callable[[str, Tensor], Tensor] = lambda name, W: W
        model = skeleton(folder, dtype, attention)
        self.blocks = blocks_of(model)
        inside = tuple(f"{name}." for name in self.blocks)
        fill(model, self.tensors, dtype, leave=frozenset(n for n, _ in model.named_parameters() if n.startswith(inside)))
        model = place(model)
        for p in model.parameters():
            p.requires_grad_(False)
        if compute is not None:
            compute_in(model, self.blocks, compute)
        self.device = next(p.device for p in model.parameters() if p.device.type != "meta")
        self.model = lazily(model, self.blocks, self.read)

    @classmethod
    def of(cls, plan: Plan, folder: Path) -> Streamed:
        """The model of a plan where the plan's would be: on its device, with embeddings in host memory where it leaves them there."""
        from finebits.interop.hf import placed

        dtype = getattr(torch, plan.levers.dtype)
        attention, wide = plan.levers.attn_implementation, plan.levers.compute
        return cls(folder, dtype, attention, lambda model: placed(model, plan), getattr(torch, wide) if wide else None)

    def read(self, name: str) -> Tensor:
        """A parameter of a block, in the dtype in which the model holds it, on its device."""
        return self.instead(name, self.tensors[name]).to(held_dtype(self.model, name, self.dtype)).to(self.device)

    def flow(self, batches: Sequence[Any], run: Callable[[Any, Any], Any]) -> Flow:
        """The way of these batches through the blocks."""
        return Flow(self.model, self.blocks, batches, run)

    def hidden(self, batches: Sequence[Batch], progress: Callable[[int, int, str], None] = lambda done, total, name: None) -> Hidden:
        """Final hidden states of these batches, for each of them when it is asked for."""
        return final(self.flow(batches, lambda model, batch: backbone(model)(batch)), self.read, progress)


def final(flow: Flow, read: Read, progress: Callable[[int, int, str], None] = lambda done, total, name: None) -> Hidden:
    """Take all batches through all blocks, each read when it is reached: what the model makes of them then, batch by batch."""
    with evaluating(flow.model):
        states = flow.entered(0)  # how many rows there are is no matter of memory
        for k, name in enumerate(flow.names):
            with loaded(flow.model.get_submodule(name), name, read):
                flow.walk(states, name)
            progress(k + 1, len(flow.names), name)
    places = {id(batch): i for i, batch in enumerate(flow.batches)}
    return lambda batch: flow.leave(places[id(batch)], states[places[id(batch)]])
