"""A Trainer whose model may be cut among processes (`finebits.interop.sharding`). The Trainer itself knows nothing of it: to it, accelerate's
processes have each a model that somebody has wrapped already."""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from finebits.interop import sharding


class Cutting(Trainer):
    """Cuts where `shards` says how. Abstract."""

    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    shards: sharding.Shards | None = None

    @abstractmethod
    def _parts(self) -> dict[str, Tensor]:
        """The tensors of all that is trained, by name."""

    def cut(self) -> str:
        """Before the optimizer is made, which is to hold what is left here. What is to be said of it; mostly nothing."""
        if self.shards is None or self.model_wrapped is not self.model:
            return ""
        self.model_wrapped = self.shards.cut(self.model, self.args.device.type)
        return sharding.uneven(self.model, self.args.world_size)

    @property
    def around(self) -> Any:
        """What is asked where no gradient is wanted: what stands around a model that is cut, else the model."""
        return self.model if self.shards is None else self.model_wrapped

    def let_go(self) -> None:
        """Of what a pass has gathered behind which none goes backward."""
        if self.shards is not None:
            sharding.reshard(self.model_wrapped)

    def whole(self) -> dict[str, Tensor]:
        """What is trained, whole; all processes ask together."""
        return sharding.whole(self._parts())

    def _wrap_model(self, model: Any, *given: Any, **named: Any) -> Any:
        return model if self.shards is not None else super()._wrap_model(model, *given, **named)

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(model) if self.shards is None else sharding.clip(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.shards is not None and grad_norm is None:
            grad_norm = sharding.clip(model.parameters(), math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As one process has them: a run goes on in as many as it likes."""
        if self.shards is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = sharding.whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.shards is None or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        sharding.restore(self.optimizer, torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
