"""Adapters as objects: several over one base, switched without touching a tensor; merged, compared and made smaller as folders of PEFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
import tiny_llama as tiny
from finebits.interop.adapter_folders import combine, compress, diff, lora_folder, write_folder
from finebits.merging.base import Factors, inner, norm
from finebits.merging.cat import Cat
from finebits.merging.linear import Linear
from finebits.merging.svd import SVD
from finebits.merging.ties import TIES
from finebits.qtensor import QTensor

BYS = {"cat": Cat(), "linear": Linear(), "svd": SVD(rank=3), "ties": TIES(density=0.5)}


def trained(path: Path, seed: int, r: int = 3, tables: bool = False, **more: Any) -> Path:
    """A LoRA of peft's over the tiny Llama, as if it had been trained."""
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 5, "task_type": "CAUSAL_LM"} | more
    model = get_peft_model(tiny.fresh(), LoraConfig(r=r, **settings))
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=gen))
    model.save_pretrained(path, save_embedding_layers=tables)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("pair")
    return trained(place / "a", 1), trained(place / "b", 2, use_rslora=True)


def peft(*folders: Path) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny.fresh(), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(i))
    return model.eval()


def updates(adapter: Any) -> dict[str, torch.Tensor]:
    return {name: f.s * f.B @ f.A for name, f in adapter.updates.items()}


@pytest.mark.parametrize("by", BYS)
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5]])
def test_what_peft_makes_of_several(by: str, weights: list[float], pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = combine([lora_folder(f) for f in pair], BYS[by], weights)
    write_folder(made, tmp_path / "ours")
    theirs, more = peft(*pair), {"svd": {"svd_rank": 3}, "ties": {"density": 0.5}}.get(by, {})
    theirs.add_weighted_adapter(["0", "1"], weights, "both", combination_type=by, **more)
    theirs.set_adapter("both")
    assert torch.allclose(tiny.logits(peft(tmp_path / "ours")), tiny.logits(theirs), atol=2e-4)


def test_concatenation_is_exact_and_ranks_add(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Of other ranks, over other modules, and over a table of embeddings."""
    third = trained(tmp_path / "c", 3, r=2, tables=True, target_modules=["q_proj", "down_proj", "embed_tokens"])
    each = [lora_folder(f) for f in (*pair, third)]
    made = combine(each, Cat(), [1.0, 2.0, -0.5])
    write_folder(made, tmp_path / "out")
    again = lora_folder(tmp_path / "out")
    assert {f.rank for n, f in again.updates.items() if n.endswith("q_proj")} == {8} and again.tables == {"model.embed_tokens"}
    sums: dict[str, torch.Tensor] = {}
    for a, w in zip(each, (1.0, 2.0, -0.5), strict=True):
        for name, d in updates(a).items():
            sums[name] = sums.get(name, 0) + w * d
    for name, d in updates(again).items():
        assert torch.allclose(d, sums[name], atol=1e-5)
    assert torch.isfinite(tiny.logits(peft(tmp_path / "out"))).all()


def test_the_best_of_lower_rank_without_the_matrix(pair: tuple[Path, Path]) -> None:
    both = combine([lora_folder(f) for f in pair], Cat())
    small = compress(both, rank=2)
    for name, d in updates(both).items():
        U, S, Vh = torch.linalg.svd(d)
        assert torch.allclose(updates(small.adapter)[name], U[:, :2] * S[:2] @ Vh[:2], atol=1e-4)
        assert math.isclose(small.errors[name], float(S[2:].norm() / S.norm()), rel_tol=1e-4)
    whole = {n: d - updates(small.adapter)[n] for n, d in updates(both).items()}
    dense = math.sqrt(sum(float(d.square().sum()) for d in whole.values()) / sum(float(d.square().sum()) for d in updates(both).values()))
    assert math.isclose(small.error, dense, rel_tol=1e-3)
    enough = compress(both, energy=0.9)
    assert all(error**2 <= 0.1 for error in enough.errors.values())
    for name, rank in enough.ranks.items():  # and one less would not do
        S = torch.linalg.svdvals(updates(both)[name])
        assert rank == 1 or float(S[: rank - 1].square().sum() / S.square().sum()) < 0.9


def test_nothing_of_the_size_of_the_weight_is_made() -> None:
    m = n = 1 << 20  # dense, 4 TiB
    f = Factors(torch.ones(m, 1), torch.ones(1, n), 2.0)
    small = SVD()([f, f], [1.0, 1.0], torch.Generator())
    assert small.rank == 1 and math.isclose(norm(small), 4.0 * m, rel_tol=1e-5) and math.isclose(inner(f, small), 8.0 * m * n, rel_tol=1e-5)


def test_how_far_apart_two_are(pair: tuple[Path, Path]) -> None:
    a, b = (lora_folder(f) for f in pair)
    told = diff(a, b)
    x, y = (torch.cat([d.flatten() for _, d in sorted(updates(f).items())]) for f in (a, b))
    wanted = {"first": x.norm(), "second": y.norm(), "difference": (x - y).norm(), "cosine": x @ y / x.norm() / y.norm()}
    assert all(math.isclose(told["all"][k], float(v), rel_tol=1e-3, abs_tol=1e-5) for k, v in wanted.items())
    assert told["settings"] == {"use_rslora": [False, True]} and not told["only_first"] and len(told["modules"]) == 4
    assert diff(a, a)["all"]["difference"] < 1e-3


def pointers(model: nn.Module) -> dict[str, int]:
    return {
        f"{n}.{k}": t.data_ptr() for n, p in model.named_parameters() for k, t in (p.parts if isinstance(p, QTensor) else {"": p}).items()
    }


def test_switching_touches_no_tensor(pair: tuple[Path, Path]) -> None:
    model = tiny.fresh()
    bare, adapters = tiny.logits(model), fb.AdapterSet(model)
    for name, folder in zip("ab", pair, strict=True):
        adapters.load(name, folder)
    assert torch.equal(tiny.logits(model), bare)
    held, theirs = pointers(model), peft(*pair)
    for name, other in (("a", "0"), ("b", "1"), ("a", "0")):
        adapters.switch(name)
        theirs.set_adapter(other)
        assert torch.allclose(tiny.logits(model), tiny.logits(theirs), atol=1e-4) and pointers(model) == held
    with adapters.disable():
        assert torch.equal(tiny.logits(model), bare) and pointers(model) == held
    assert adapters.speaking == {"a": 1.0}
    adapters.remove("a")
    adapters.remove("b")
    assert torch.equal(tiny.logits(model), bare) and not [n for n, _ in model.named_parameters() if ".p." in n]


def test_several_at_once_are_their_weighted_sum(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Over a packed base that transformers loaded."""
    from transformers import AutoModelForCausalLM

    tiny.folder(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=fb.FinebitsConfig("nf4-b32"))
    adapters = fb.AdapterSet(model)
    write_folder(combine([lora_folder(f) for f in pair], Cat(), [0.7, 0.3]), tmp_path / "sum")
    for name, folder in (("a", pair[0]), ("b", pair[1]), ("sum", tmp_path / "sum")):
        adapters.load(name, folder)
    held = pointers(model)
    adapters.weigh({"a": 0.7, "b": 0.3})
    mixed = tiny.logits(model)
    assert pointers(model) == held
    adapters.switch("sum")
    assert torch.allclose(tiny.logits(model), mixed, atol=1e-4)
    adapters.switch("a")  # as it was trained, not as it was weighed
    assert torch.allclose(tiny.logits(model), tiny.logits(fb.load_peft(pair[0], fb.build(tiny.fresh(), nf4()))), atol=1e-4)


def nf4() -> fb.Plan:
    return fb.Plan({name: fb.Spec(fb.NF(4, 32)) for name in tiny.names()})


def test_a_saved_adapter_over_the_base_that_it_was_trained_over(tmp_path: Path) -> None:
    plan = tiny.plan(fb.LoRA(rank=2), fb.NF(4, 32), fb.Zeros())
    model = tiny.tuned(plan)
    fb.save(model, tmp_path / "saved")
    base = fb.build(tiny.fresh(), nf4())
    adapters = fb.AdapterSet(base)
    adapters.load("mine", tmp_path / "saved")
    adapters.switch("mine")
    assert torch.equal(tiny.logits(base), tiny.logits(model))
    with pytest.raises(ValueError, match="was trained over another model.layers.0.self_attn.q_proj than the model's"):
        fb.AdapterSet(tiny.fresh()).load("mine", tmp_path / "saved")


def test_what_is_refused_in_a_sentence(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapters = fb.AdapterSet(tiny.fresh())
    adapters.load("a", pair[0])
    with pytest.raises(ValueError, match="there is no adapter 'b'; loaded are a"):
        adapters.switch("b")
    with pytest.raises(ValueError, match="weight of a is -1"):
        adapters.weigh({"a": -1})
    with pytest.raises(ValueError, match="cannot be called 'a'"):
        adapters.load("a", pair[1])
    with pytest.raises(ValueError, match="has an adapter already"):
        fb.AdapterSet(tiny.tuned(tiny.plan()))
    other = trained(tmp_path / "other", 3, r=2)
    with pytest.raises(ValueError, match="model.layers.0.*ranks are 2 and 3, and factors are added entry by entry: merge by cat or svd"):
        combine([lora_folder(pair[0]), lora_folder(other)], Linear())
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        combine([lora_folder(f) for f in pair], Cat(), [1.0])
    with pytest.raises(ValueError, match="by a rank of at least 1 or by an energy"):
        compress(lora_folder(pair[0]))
    write_folder(lora_folder(pair[0]), tmp_path / "out")
    with pytest.raises(ValueError, match="holds a model that finebits did not write there"):
        write_folder(lora_folder(pair[1]), pair[1])
    dora = trained(tmp_path / "dora", 3, use_dora=True)
    with pytest.raises(ValueError, match="is a LORA adapter|factors of LoRA are merged"):
        lora_folder(dora)


def test_the_verb(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finebits.cli import main

    a, b, out = (str(p) for p in (*pair, tmp_path / "out"))
    assert main(["adapters", "combine", a, b, "--by", "cat", "--weights", "0.7,0.3", "--out", out]) == 0
    assert "4 modules, rank 6" in capsys.readouterr().out
    assert main(["adapters", "compress", out, "--rank", "2", "--out", str(tmp_path / "small")]) == 0
    assert "rank 2 to 2, relative error 0." in capsys.readouterr().out
    assert main(["adapters", "diff", a, str(tmp_path / "small")]) == 0
    assert "all: difference" in capsys.readouterr().out
    assert main(["adapters", "combine", a, b, "--by", "ties", "--out", b]) == 2  # which finebits did not write
    assert main(["adapters", "combine", a, b, "--by", "cat", "--density", "0.5", "--out", str(tmp_path / "no")]) in (1, 2)
    assert {f.name for f in (tmp_path / "small").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "finebits.json"}
