"""A tuned model rounded once more: what its adapters add goes into the weights, and these are rounded with an eye on the tuned model's outputs.

Block by block, with two streams of states of the calibration rows: one through the tuned blocks, which is the goal, one through the blocks that
are rounded already. W′ = W₀ + D, the base and what the adapters add, is rounded by the quantizer to Ŵ under statistics of the second stream;
then refinements move scales and vectors of the block, or the weights in their codes (Block-AP), until it gives the states of the first. Those of
the whole model follow at the end, and move scales of all blocks until it gives what the tuned model gives out (E2E-QP).

What is left of D is told in the metric of the rounded model's inputs, ⟨A, B⟩ = tr A R Bᵀ with R = E x xᵀ:

    kept  = ⟨Ŵ − W₀, D⟩ / ⟨D, D⟩     1: all of what was learnt is in the codes; 0: rounding has taken it back, as where Ŵ = W₀
    noise = ⟨E, E⟩ / ⟨D, D⟩          E = Ŵ − W′: the energy of the rounding's own noise, in units of what the adapters add

The two are apart, since noise that is not along D blurs the model as rounding always does, and takes nothing of D away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits import registry
from finebits.build import Adapted, Progress, all_hosts, hosts, sign
from finebits.build import built as origin
from finebits.calibrate.blockwise import blocks_of, measure
from finebits.carrier import Following, Table, tables, tied
from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.plan.base import Plan, Spec, at_end
from finebits.qtensor import QTensor, dense
from finebits.quantizers.base import Quantizer
from finebits.quantizers.gptq import GPTQ
from finebits.refine._moving import decoded, moved
from finebits.refine.apiq import ApiQ
from finebits.refine.base import Matching, Refine
from finebits.stats.gram import Gram
from finebits.stream import Flow, Spill
from finebits.sweep import whole


@dataclass(frozen=True)
class Requantize:
    """To which format, by which quantizer, refined how.

    >>> Requantize.read(Requantize(fb.Int(4, 32)).to_json()) == Requantize(fb.Int(4, 32))
    True
    """

    format: Format
    quantizer: Quantizer = GPTQ(scales="search")
    refine: tuple[Refine, ...] = (ApiQ(epochs=2, scales=2e-3),)

    def __post_init__(self) -> None:
        for r in self.refine:
            if not r.moves & {"scales", "vectors"} or r.moves & {"clips", "words"}:
                raise Invalid(
                    f"{type(r).__name__} moves no scales of blocks, and nothing else is left to move where adapters are in the weights: "
                    "take {paper: apiq, scales: 0.001}, or none"
                )

    def to_json(self) -> dict[str, Any]:
        """As data."""
        return {
            "format": registry.to_json(self.format),
            "quantizer": registry.to_json(self.quantizer),
            "refine": [registry.to_json(r) for r in self.refine],
        }

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Requantize:
        """The inverse."""
        refine = tuple(registry.from_json("refine", r) for r in data["refine"])
        return cls(registry.from_json("formats", data["format"]), registry.from_json("quantizers", data["quantizer"]), refine)


class Kept(NamedTuple):
    """Of one matrix, in the metric of its inputs: the share of what the adapters add that is in the rounded weight, and the energy of the
    rounding's noise in units of it; None where adapters add nothing."""

    kept: float | None
    noise: float | None


def kept(start: Float[Tensor, "m n"], tuned: Float[Tensor, "m n"], rounded: Float[Tensor, "m n"], R: Float[Tensor, "n n"]) -> Kept:
    """W₀, W′, Ŵ and the Gram matrix of the inputs -> what is left.

    >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    >>> kept(zero, one, zero, one), kept(zero, one, one, one)  # taken back, and all there
    (Kept(kept=0.0, noise=1.0), Kept(kept=1.0, noise=0.0))
    """
    D, E = tuned - start, rounded - tuned
    added = float((D @ R * D).sum())
    if not added > 0:
        return Kept(None, None)
    ER = E @ R
    return Kept(1 + float((ER * D).sum()) / added, float((ER * E).sum()) / added)


def plan_after(plan: Plan, how: Requantize, blocks: Sequence[str] = ()) -> Plan:
    """The plan of the rounded model: matrices of these blocks (where none are named, all but the ends of the model) that were quantized or
    adapted have the new format, and no adapter lies over anything. What is dense and took an adapter in counts as trained itself, so that it
    is saved.

    >>> plan = fb.Plan({"up": fb.Spec(fb.NF(4), adapter=fb.LoRA()), "head": fb.Spec()}, over={"embed": fb.TrainableTokens((1,))})
    >>> after = plan_after(plan, Requantize(fb.Int(4, 32)))
    >>> after.modules["up"].format.bits, after.modules["up"].adapter, after.modules["head"].format, after.over
    (4, None, None, {})
    """
    inside = tuple(f"{name}." for name in blocks) or ("",)
    modules, whole = {}, [name for name, adapter in plan.over.items() if adapter.over in ("matrix", "table")]
    for name, spec in plan.modules.items():
        if spec.adapter is None and spec.format is None:
            modules[name] = Spec()
        elif name.startswith(inside) and at_end(plan.costs.get(name, {})) is None:
            modules[name] = Spec(how.format, how.quantizer)
        else:
            modules[name] = Spec(spec.format if spec.adapter is None else None, spec.quantizer)
            whole += [name] if spec.adapter is not None else []
    trained = (*plan.trained, *whole)
    return replace(
        plan, modules=modules, over={}, trained=trained, tied=False, continues={}, budget=None, stated="", memory={}, rows={}, solver={}
    )


def requantize(
    model: nn.Module,
    how: Requantize,
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Tensor],
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    keep: Callable[[Any], Tensor | None] = lambda batch: None,
    keep_final: Callable[[Any], Tensor | None] | None = None,
    progress: Progress = lambda done, total, name: None,
) -> dict[str, Kept]:
    """Round a tuned model in place, and tell by module what is kept of its adapters. Afterwards no adapter is left: matrices in blocks that were
    quantized or adapted have the new format, a table of embeddings or a head has its adapter in a dense weight, all else is as it was. A head
    that was tied to such a table and stayed behind has a weight of its own, which exports hold and `fb.save` does not.

    `run(model, batch)` gives the final hidden states and `head` makes outputs of them, which refinements of the whole model compare;
    `keep(batch)` tells which positions of the states of blocks are no padding, `keep_final` which of the final ones, where these are others. Two
    blocks of float32 weights and the statistics of one are in memory beside the model and the waiting states, and what a step of training
    takes where the whole model is refined; what is kept is told as it is before that. Raises ValueError for a model without a plan, for
    adapters that are in no weight, where the format does not fit a matrix, and where no batches come.

    >>> model = torch.nn.Sequential()
    >>> model.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(64, 64))])
    >>> tuned = fb.build(model, fb.Plan({"layers.0.0": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))}))
    >>> _ = torch.nn.init.normal_(tuned.layers[0][0].p["default"]["B"], std=0.1)
    >>> report = fb.requantize(tuned, fb.Requantize(fb.Int(4, 32)), [torch.randn(200, 64)], lambda model, x: model.layers[0](x))
    >>> tuned.layers[0][0].weight.bits_per_weight, tuned.layers[0][0].active, 0.9 < report["layers.0.0"].kept < 1.1
    (5.0, [], True)
    """
    before = origin(model)
    if before is None:
        raise Invalid("only a model made by finebits.build has adapters to round into its weights, and this one carries no plan")
    if not batches:
        raise Invalid("rounding a tuned model needs calibration rows, and none came: give some of those that it was trained on")
    _check(model)
    names = blocks_of(model, before.plan.modules)
    after = plan_after(before.plan, how, names)
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    for name, host in tables(model).items():
        _into_table(model, host, getattr(torch, after.levers.dtype))
    flow = Flow(model, names, batches, run)
    theirs, ours = flow.entered() if how.refine else Spill(), flow.entered()
    needs = {n: frozenset({Gram}) | how.quantizer.needs for n, s in after.modules.items() if s.format is not None}
    mask = lambda i: keep(batches[i])  # noqa: E731
    by_block, by_model = ([r for r in how.refine if r.scope == scope] for scope in ("block", "model"))
    total = len(needs) + sum(getattr(r, "epochs", 1) * len(batches) for r in by_model)
    report: dict[str, Kept] = {}
    of = dict(hosts(model))
    for name in names:
        block = model.get_submodule(name)
        inside = {n: of[n] for n in needs if n.startswith(f"{name}.")}
        with decoded(block):
            stats = measure(flow, name, ours, {n: needs[n] for n in inside}, mask)
            if how.refine:
                flow.walk(theirs, name)
        weights = {n: _round(n, host, how, stats[n]) for n, host in inside.items()}
        forward = lambda i, name=name: flow.through(name, i, ours[i])  # noqa: E731
        for r in by_block:
            with moved(block, r, originals={of[n]: tuned for n, (_, tuned) in weights.items()}) as found:
                r(Matching(forward, theirs.__getitem__, batches=len(batches), keep=mask, **found._asdict()))
        for n, (start, tuned) in weights.items():
            R = cast(Gram, stats[n][Gram]).value()
            report[n] = kept(start, tuned, dense(of[n].weight, torch.float32), R.to(tuned.device))
            progress(len(report), total, n)
        with decoded(block):
            flow.walk(ours, name)
    for host in of.values():
        if host.active:
            _unadapted(host, _tuned(host).to(getattr(torch, after.levers.dtype)))
    if by_model:
        flow.finish(theirs)
    last = mask if keep_final is None else lambda i: keep_final(batches[i])
    done = len(report)
    for r in by_model:
        step = lambda i, n, r=r, done=done: progress(done + i - 1, total, f"{type(r).__name__} over the whole model, step {i} of {n}")  # noqa: E731
        whole(flow, r, theirs, step, keep=last, head=head)
        done += getattr(r, "epochs", 1) * len(batches)
    if by_model:
        progress(total, total, "refined as a whole")
    sign(model, after)
    return report


def _check(model: nn.Module) -> None:
    """Raise Invalid where what an adapter does is in no weight of the model."""
    for name, host in all_hosts(model):
        for kind in (host.kinds[a] for a in host.active):
            if kind.form == "beside":
                raise Invalid(
                    f"{name}: {type(kind).__name__} depends on its input and cannot be rounded into a weight: keep it as an adapter"
                )
    for name, host in hosts(model):
        if host.bias is None and host.stack(torch.float32).bias is not None:
            kinds = ", ".join(type(host.kinds[a]).__name__ for a in host.active)
            raise Invalid(f"{name} has no bias in its model, and {kinds} adds one to its outputs: keep it as an adapter")


def _tuned(host: Adapted) -> Tensor:
    """W′ in float32."""
    with torch.no_grad():
        return dense(host.stack(torch.float32).weight, torch.float32).detach()


def _round(name: str, host: Adapted, how: Requantize, stats: Any) -> tuple[Tensor, Tensor]:
    """Put Ŵ in the place of the host's weight and its adapters; (W₀, W′)."""
    start, tuned, dtype = dense(host.weight.detach(), torch.float32), _tuned(host), host.weight.dtype
    try:
        q = cast(QTensor, how.quantizer(tuned, how.format, stats))
    except ValueError as e:
        raise Invalid(f"{name}: {e}") from e
    _unadapted(host, q.apply_parts(lambda part: part, dtype))
    return start, tuned


def _unadapted(host: Adapted, W: Tensor) -> None:
    """A host of W, and of the bias that its adapters make, without them."""
    bias = host.stack(torch.float32).bias
    if bias is not None and bias is not host.bias:
        host.bias = nn.Parameter(bias.detach().to(cast(Tensor, host.bias).dtype), requires_grad=False)
    for name in list(host.kinds):
        host.remove(name)
    host.weight = nn.Parameter(W, requires_grad=False)


def _into_table(model: nn.Module, host: Table, dtype: torch.dtype) -> None:
    """A table with its adapter in it, dense; heads that follow it stay tied, others keep the weight that they have."""
    W = nn.Parameter(host.made(dtype), requires_grad=False)
    for head in tied(model, host).values():
        if isinstance(head, Following):
            cast(Any, head).__class__ = nn.Linear
            del head.table
            head.weight = W
    host.off()
    host.weight = W
