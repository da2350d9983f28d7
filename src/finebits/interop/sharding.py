"""A model whose blocks are cut among processes: each holds some rows of every weight of a block, and all of them while the block computes.

torch's `fully_shard` (FSDP2) cuts, gathers, and hands each process the gradients of its own rows, averaged; what is cut is a DTensor from
then on, also where it is in codes. Each block is a group of its own, and what is trained outside of the blocks is one more. Frozen
embeddings, norms and heads stay whole on every process: they are needed from the first layer to the loss, so that a part of them would lie
beside the whole. So does what cannot be cut: codes whose rows the processes do not share evenly, single numbers, and tensors that several
blocks hold together. Where that is trained, gradients are averaged as DistributedDataParallel does it.

The model itself stays what it was; around it stands a `Sharded`, as a DistributedDataParallel would. accelerate's own way to FSDP2
(`fsdp2_prepare_model`) is not taken: it cuts the head, whose weight the loss reads in chunks without a call of the module, knows no rows
that cannot be shared, and its checkpoints are of the whole model, where those here are of what is trained.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from finebits.calibrate.blockwise import blocks_of
from finebits.errors import Invalid
from finebits.qtensor import QTensor, nbytes
from finebits.tasks._categories import Sharded


@dataclass(frozen=True)
class Shards:
    """How a model is cut. With `reshard` the rows of a block go again after its forward pass, and are gathered once more for its backward
    pass; its blocks are of one of the classes `kinds`, where these are named."""

    reshard: bool = True
    kinds: tuple[str, ...] = ()

    def cut(self, model: nn.Module, device: str) -> Sharded:
        """Cut a model, which all processes of the default group have. Raises ValueError where it has no blocks, or others than were named,
        and where something is trained that cannot be moved by the rows."""
        blocks = [model.get_submodule(name) for name in blocks_of(model)]
        if self.kinds and (other := next((b for b in blocks if not {k.__name__ for k in type(b).__mro__} & set(self.kinds)), None)):
            raise Invalid(
                f"fsdp_transformer_layer_cls_to_wrap names {', '.join(self.kinds)}, and the blocks of this model are of the class "
                f"{type(other).__name__}: leave it out"
            )
        for name, p in model.named_parameters():
            if p.requires_grad and p.dtype != torch.float32:
                raise Invalid(f"{name} is trained in {p.dtype}, and FSDP moves rows of float32 weights alone: set model.dtype to float32")
        world = distributed.get_world_size()
        mesh, whole = init_device_mesh(device, (world,)), spared(model, blocks, world)
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard, ignored_params=whole)
        around = Sharded(model)
        fully_shard(around, mesh=mesh, ignored_params=whole)
        for p in whole:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_averaged)
        return around


@functools.cache
def taken() -> Shards | None:
    """How accelerate's launcher says that a model is to be cut; None where it says nothing of it. It is asked once, and taken out of the
    environment, where accelerate and transformers would cut it in their own way."""
    if os.environ.pop("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true"):
        return None
    held = {k.lower(): v for k, v in os.environ.items() if k.startswith("FSDP_")}
    return asked(held | {"mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION")})


YES = ("true", "1", "yes")


def asked(settings: Mapping[str, Any]) -> Shards:
    """How a model is cut by the settings of FSDP, by the names that accelerate has for them. Raises Invalid where that is not how it is cut
    here.

    >>> asked({"fsdp_version": 2, "fsdp_reshard_after_forward": False})
    Shards(reshard=False, kinds=())
    >>> asked({"fsdp_version": 1})
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: weights are cut by version 2 of FSDP, which can cut codes, and this is version 1: add --fsdp_version 2
    """
    said = {k: "" if v is None or str(v) == "None" else str(v) for k, v in settings.items()}
    get = lambda k: said.get(k, "")  # noqa: E731
    if (version := get("fsdp_version") or "1") != "2":
        raise Invalid(f"weights are cut by version 2 of FSDP, which can cut codes, and this is version {version}: add --fsdp_version 2")
    policy, again = get("fsdp_auto_wrap_policy"), get("fsdp_reshard_after_forward").lower() or "full_shard"
    if policy not in ("", "TRANSFORMER_BASED_WRAP"):
        raise Invalid(f"fsdp_auto_wrap_policy is {policy}, and a model is cut block by block here: leave it out")
    if again not in (*YES, "false", "0", "no", "full_shard"):
        raise Invalid(f"fsdp_reshard_after_forward is {again}, and it can be true or false")
    if get("fsdp_offload_params").lower() in YES:
        raise Invalid(
            "fsdp_offload_params keeps weights in host memory, which is not done here: leave it out, or plan with budget.device=cpu"
        )
    if get("fsdp_activation_checkpointing").lower() in YES:
        raise Invalid("fsdp_activation_checkpointing is training.gradient_checkpointing here, which a plan reckons with: leave it out")
    if (precision := get("mixed_precision").lower()) not in ("", "no", "false"):
        raise Invalid(f"mixed_precision is {precision}, and under FSDP a model computes in what model.dtype says: leave it out")
    if left := get("fsdp_ignored_modules"):
        raise Invalid(f"fsdp_ignored_modules is {left}, and what stays whole is not chosen: leave it out")
    kinds = get("fsdp_transformer_layer_cls_to_wrap") or get("fsdp_transformer_cls_to_wrap")
    return Shards(again in (*YES, "full_shard"), tuple(k.strip() for k in kinds.split(",") if k.strip()))


def spared(model: nn.Module, blocks: Sequence[nn.Module], world: int) -> set[nn.Parameter]:
    """The parameters that stay whole on every process.

    >>> model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "layers": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    >>> held = spared(model.requires_grad_(False), list(model["layers"]), 2)
    >>> [name for name, p in model.named_parameters() if p in held]
    ['head.weight', 'head.bias']
    """
    held: dict[nn.Parameter, int] = dict.fromkeys(model.parameters(), 0)
    for block in blocks:
        for p in block.parameters():
            held[p] += 1
    return {p for p, count in held.items() if count > 1 or not p.ndim or _uneven(p, world) or not (count or p.requires_grad)}


def _uneven(p: Tensor, world: int) -> bool:
    return isinstance(p, QTensor) and p.shape[0] % world != 0


def uneven(model: nn.Module, world: int) -> str:
    """What is to be said of weights in codes whose rows so many processes cannot share; nothing where there are none.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 9)), fb.Plan({"0": fb.Spec(fb.NF(4))}))
    >>> uneven(model, 2)
    '1 matrix in codes stays whole on every process, as 2 do not divide its rows: 0.weight'
    """
    names = [name for name, p in model.named_parameters() if _uneven(p, world)]
    if not names:
        return ""
    many, s = len(names) > 1, "" if len(names) > 1 else "s"
    return (
        f"{len(names)} {'matrices' if many else 'matrix'} in codes stay{s} whole on every process, as {world} do not divide "
        f"{'their' if many else 'its'} rows: {names[0]}{' and others' if many else ''}"
    )


def _averaged(p: Tensor) -> None:
    assert p.grad is not None
    distributed.all_reduce(p.grad)
    p.grad /= distributed.get_world_size()


def bytes_of(model: nn.Module) -> tuple[int, int]:
    """(bytes of what is cut that this process holds, bytes that every process holds).

    >>> bytes_of(torch.nn.Linear(2, 2, bias=False))
    (0, 16)
    """
    parts = [(isinstance(p, DTensor), nbytes(local(p))) for p in model.parameters()]
    return sum(n for cut, n in parts if cut), sum(n for cut, n in parts if not cut)


def local(t: Any) -> Any:
    """What this process holds of a tensor.

    >>> local(torch.ones(1))  # which is not cut
    tensor([1.])
    """
    return t.to_local() if isinstance(t, DTensor) else t


def whole(held: Any) -> Any:
    """The same with every tensor whole, in mappings and lists too; all processes ask together.

    >>> whole({"state": [torch.ones(1), 2]})
    {'state': [tensor([1.]), 2]}
    """
    if isinstance(held, DTensor):
        return held.full_tensor()
    if isinstance(held, Mapping):
        return {k: whole(v) for k, v in held.items()}
    return [whole(v) for v in held] if isinstance(held, list) else held


@torch.no_grad()
def write(t: Tensor, value: Tensor) -> None:
    """Make a tensor hold a whole value, of which this process may keep a part.

    >>> t = torch.zeros(2)
    >>> write(t, torch.ones(2))
    >>> t
    tensor([1., 1.])
    """
    local(t).copy_(local(_like(t, value)))


def _like(t: Tensor, value: Tensor) -> Tensor:
    """A whole value, cut as `t` is where it has the same shape."""
    if not isinstance(t, DTensor) or value.shape != t.shape:
        return value
    return distribute_tensor(value.to(t.device), t.device_mesh, t.placements, src_data_rank=None)


def laid(model: Any, trained: Mapping[str, Tensor]) -> Any:
    """A model that holds what was trained of another like it.

    >>> laid(torch.nn.Linear(1, 1), {"bias": torch.ones(1)}).bias.item()
    1.0
    """
    held = dict(model.named_parameters())
    for name, value in trained.items():
        write(held[name], value)
    return model


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that was saved whole."""
    optimizer.load_state_dict(state)
    for p, kept in optimizer.state.items():
        kept.update({k: _like(p, v) for k, v in kept.items() if torch.is_tensor(v)})


def reshard(around: nn.Module) -> None:
    """Let go of what was gathered: behind a forward pass that no backward pass follows."""
    for module in around.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """The norm of all gradients together, which are scaled to be no longer than `most`, as torch's clip_grad_norm_ does it.

    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> clip([p], math.inf), p.grad
    (tensor(5.), tensor([3., 4.]))
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = lambda cut: sum((local(g).float().square().sum() for g in grads if isinstance(g, DTensor) == cut), torch.zeros(()))  # noqa: E731
    total = squares(True)
    if any(isinstance(g, DTensor) for g in grads):
        total = total.to(local(grads[0]).device)
        distributed.all_reduce(total)
    norm = (total + squares(False)).sqrt()
    if most < math.inf:
        for g in grads:
            local(g).mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def seen(numbers: Sequence[Any]) -> Sequence[Any]:
    """Numbers to be looked at on this process: where tensors are cut, one that is finite if all of theirs are, on every process.

    >>> seen([1.0, torch.ones(1)])
    [1.0, tensor([1.])]
    """
    if not any(isinstance(t, DTensor) for t in numbers):
        return numbers
    held = [torch.as_tensor(local(t)).detach() for t in numbers]
    worst = functools.reduce(torch.maximum, [(~t.isfinite()).any().float() for t in held])
    distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
    return [1 / (1 - worst)]
