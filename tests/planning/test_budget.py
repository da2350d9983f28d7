"""A budget as it is stated, the phases that it holds for, and what the rest of it could buy: on priced menus, without a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_solve import AROUND, FORMATS, unsolved

import finebits as fb
from finebits.plan.base import Infeasible, Plan
from finebits.plan.budget import FORMS, Bits, Share, read
from finebits.plan.footprint import Footprint
from finebits.plan.levers import PULLS
from finebits.plan.solve import again, solve, with_budget
from finebits.report.page import plan_page

SMALL: dict[str, Any] = dict(per_device_train_batch_size=1, gradient_checkpointing=True, loss_chunk=32, max_length=64)


def around(plan: Plan, **changed: Any) -> Plan:
    """The same problem with other things around it."""
    return replace(plan, sizes=replace(Footprint.of(plan), **changed).to_json())


def test_what_is_read() -> None:
    assert read("400MiB") == 400 * 2**20 and read(10**9) == 10**9 and read(None) is None
    assert read("3.1 bits") == read("3.1bit") == Bits(3.1)
    assert read("80% of nf4") == Share(0.8, fb.NF(4)) and read("62.5 % of int8-b128-bf16") == Share(0.625, fb.Int(8, 128, scale="bf16"))
    assert read("50% of bf16") == read("50% of 16 bits") == Share(0.5, None)
    for wrong in ("80%", "3.1 bits a weight", "lots", "-3 bits", True):
        with pytest.raises(ValueError) as caught:
            read(wrong)
        assert FORMS in str(caught.value) and repr(wrong) in str(caught.value)
    for wrong, said in (
        (8, "write 8GiB, 8MiB or"),
        ("3.1", "'3.1 bits'"),
        ("0 bits", "above 0"),
        ("80% of nf5x", "'80% of nf5x' names a format"),
    ):
        with pytest.raises(ValueError, match=said):
            read(wrong)


def test_bits_give_the_same_plan_on_every_machine_and_their_bytes() -> None:
    one = solve(around(with_budget(unsolved(None), "3.1 bits"), reserve=0.05))
    weights = 10 * 1536 * 512
    assert 3.0 < 8 * one.memory["linear weights"] / weights <= 3.1
    exact = solve(unsolved(one.need - 1)).solver["loss"]
    assert one.solver["loss"] <= exact  # no smaller budget in bytes holds what these bits do
    assert one.budget is not None and one.need <= 0.95 * one.budget <= one.need + 1
    for levers in (dict(dtype="float32", device="cpu"), dict(per_device_train_batch_size=2), dict(max_length=64)):
        other = solve(around(with_budget(unsolved(None, **levers), "3.1 bits"), reserve=0.05, pulls=PULLS))
        assert other.modules == one.modules and other.budget != one.budget
        assert all(getattr(other.levers, k) == v for k, v in levers.items())
    assert again(Plan.from_json(one.to_json())).to_json() == one.to_json()
    assert f"{one.stated} a linear weight" in one.summary() and "3.1 bits a linear weight" in plan_page(one)
    assert again(one, budget=one.budget + 10**7).stated == ""
    with pytest.raises(Infeasible, match=r"has 2.25 bits a linear weight, the budget is 2 bits"):
        solve(with_budget(unsolved(None), "2 bits"))


def test_a_share_is_of_what_the_other_choice_would_take() -> None:
    """An independent plan: the menu with that format alone."""
    all_4 = unsolved(None, **SMALL)
    all_4 = solve(replace(all_4, costs={k: c | {"menu": c["menu"][-1:]} for k, c in all_4.costs.items()}))
    for reserve in (0.0, 0.05):
        same = solve(around(with_budget(unsolved(None, **SMALL), "100% of nf4-b64-bf16"), reserve=reserve))
        assert {s.format for s in same.modules.values()} == {FORMATS[2]} and same.need == all_4.need == same.solver["share_of"]
        less = solve(around(with_budget(unsolved(None, **SMALL), "99% of nf4-b64-bf16"), reserve=reserve))
        assert less.need <= 0.99 * all_4.need < less.need + 300_000 and less.solver["loss"] > same.solver["loss"]
        assert f"99% of nf4-b64-bf16 ({same.solver['share_of'] / 2**20:.1f} MiB)" in less.summary()
    dense = solve(with_budget(unsolved(None, **SMALL), "100% of bf16"))
    assert dense.budget == all_4.need - all_4.memory["linear weights"] + 2 * 10 * 1536 * 512
    wide = solve(unsolved(None))  # what levers leave is a share of what it would be without them
    assert solve(with_budget(unsolved(None, PULLS), "80% of nf4-b64-bf16")).need <= 0.8 * wide.need


def test_no_phase_breaks_the_budget_and_one_that_would_is_named() -> None:
    free = solve(unsolved(None, **SMALL))
    assert max(free.rows, key=lambda k: free.rows[k]) == "verify" and free.need == free.rows["verify"] > free.peak
    tight = solve(unsolved(free.need - 10**6, **SMALL))
    assert tight.need <= free.need - 10**6 < tight.need + 300_000 and tight.peak < free.peak
    least = solve(with_budget(unsolved(None, **SMALL), "2.25 bits"))
    between = (max(v for k, v in least.phases.items() if k != "verify") + least.need) // 2
    with pytest.raises(Infeasible, match="for verifying the export, the smallest plan .* needs") as caught:
        solve(unsolved(between, **SMALL))
    (way,) = [line for line in str(caught.value).splitlines() if line.strip().startswith("export.verify=false")]
    assert " fits " in way and caught.value.smallest == least.need + 1
    assert solve(unsolved(caught.value.smallest, **SMALL)).need <= caught.value.smallest
    without = solve(around(unsolved(between, **SMALL), left_out=("verify",)))
    assert "verify" not in without.rows and without.need <= between


def test_a_16_bit_run_to_compare_with_counts() -> None:
    own = solve(unsolved(None, **SMALL))
    both = solve(
        around(unsolved(None, **SMALL), compared=("zeros", "lora16"), left_out=("full", "verify", "export", "load", "save", "eval"))
    )
    assert both.rows == {"lora16": own.peak - own.memory["linear weights"] + 2 * 10 * 1536 * 512}
    with pytest.raises(Infeasible, match="16-bit LoRA.*\n(.*\n)*.*evaluation.compare without lora16 .* fits"):
        solve(
            around(unsolved(own.peak + 10**5, **SMALL), compared=("lora16",), left_out=("full", "verify", "export", "load", "save", "eval"))
        )


def test_where_ranks_are_chosen_no_phase_breaks_the_budget_either() -> None:
    plan = unsolved(None, **SMALL)
    for name, c in plan.costs.items():
        menu = [line | {"rank": r, "loss": line["loss"] / r} for line in c["menu"] for r in (4, 16, 64)]
        plan.costs[name] = c | {"menu": menu}
    adapters = {"adapters": {str(r): fb.registry.to_json(fb.LoRA(rank=r)) for r in (4, 16, 64)}}
    plan = replace(plan, sizes=replace(AROUND, varied=True).to_json() | adapters)
    free = solve(plan)
    assert free.need > free.peak
    for cut in (10**6, 6 * 10**6):
        made = solve(replace(plan, budget=free.need - cut))
        assert made.need <= free.need - cut and made.solver["loss"] > free.solver["loss"]


def test_what_the_rest_could_buy_is_planned() -> None:
    free = solve(unsolved(None))
    assert solve(unsolved(free.need + free.need // 20)).solver["buys"] == []
    roomy = solve(unsolved(3 * free.need))
    found = {b["change"].split("=")[0]: b for b in roomy.solver["buys"]}
    assert found["int8-b128-bf16 among quantization.candidates"]["bits"] == pytest.approx(8.125)
    assert found["10 matrices in 16 bits"]["peak"] == free.need - free.memory["linear weights"] + 2 * 10 * 1536 * 512
    line, length = found["training.per_device_train_batch_size"], found["data.max_length"]
    size = int(line["change"].split("=")[1].split()[0])
    assert line["peak"] == again(roomy, per_device_train_batch_size=size, gradient_accumulation_steps=1).need <= 3 * free.need
    longer = int(length["change"].split("=")[1])
    assert length["peak"] == again(roomy, max_length=longer).need
    assert "adapter.rank" in found and all(b["peak"] <= 3 * free.need for b in found.values())
    assert "The rest could buy, each alone" in roomy.summary() and "What the rest could buy" in plan_page(roomy)
