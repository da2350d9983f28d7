"""QA-LoRA: an update that is constant inside of blocks goes into their minima."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import finebits as fb
from finebits.adapters.base import Base
from finebits.export.base import CannotHold, check_plan
from finebits.layouts.gguf import from_gguf, to_gguf

M, N = 24, 96


def test_is_the_papers_forward_pass_and_its_gradients() -> None:
    gen = torch.Generator().manual_seed(0)
    q = fb.quantize(torch.randn(M, N, generator=gen), fb.Int(4, 32, False))
    X, G = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((10, N), (10, M)))
    adapter, found = fb.QALoRA(rank=3, alpha=6.0, block=32), []
    own = {"A": torch.randn(3, 3, generator=gen), "B": torch.randn(M, 3, generator=gen)}

    def plain(p: dict, x: torch.Tensor) -> torch.Tensor:
        pooled = F.avg_pool1d(x[:, None], 32)[:, 0] * 32
        return x @ q.dequantize().double().mT + 2.0 * pooled @ p["A"].double().mT @ p["B"].double().mT

    for forward in (lambda p, x: adapter.forward(p, x, Base(q)), plain):
        p, x = {k: v.clone().requires_grad_() for k, v in own.items()}, X.clone().requires_grad_()
        y = forward(p, x)
        y.backward(G)
        found.append([y.detach(), x.grad, p["A"].grad, p["B"].grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_what_is_kept_of_a_token_is_a_number_a_block() -> None:
    adapter, q, sizes = fb.QALoRA(rank=2), fb.quantize(torch.randn(M, N), fb.Int(4, 32, False)), list[int]()
    p = {k: v.requires_grad_() for k, v in adapter.params(Base(q), torch.Generator(), {}).items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        adapter.forward(p, torch.randn(7, N), Base(q))
    assert sorted(sizes) == sorted([7 * 3, 2 * 3, M * 2])


def test_codes_and_scales_stay_and_gguf_holds_it() -> None:
    adapter, gen = fb.QALoRA(rank=2, block=32), torch.Generator().manual_seed(0)
    q = fb.quantize(torch.randn(M, N, generator=gen), fb.Int(4, 32, False, "fp16"))
    p = {k: v + 0.1 for k, v in adapter.params(Base(q), gen, {}).items()}
    tuned = adapter.coded(p, q)
    assert all(torch.equal(tuned.parts[k], q.parts[k]) for k in ("codes", "scale")) and not torch.equal(
        tuned.parts["shift"], q.parts["shift"]
    )
    assert torch.equal(from_gguf(*to_gguf(tuned)).dequantize(), tuned.dequantize())


def test_layouts_of_whole_zero_points_are_refused_while_planning() -> None:
    plan = fb.Plan({"up_proj": fb.Spec(fb.Int(4, 32, False, "fp16"), adapter=fb.QALoRA())})
    check_plan(plan, ["gguf", "merged"])
    for to in ("compressed_tensors", "gptq"):
        with pytest.raises(CannotHold, match=f"{to} cannot hold this as it is: up_proj: .*can: gguf, merged, packed$"):
            check_plan(plan, [to])
    with pytest.raises(CannotHold, match="target peft cannot hold QALoRA over up_proj: .*targets that can: .*gguf"):
        check_plan(plan, ["peft"])
