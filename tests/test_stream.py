"""Block by block: the states, statistics and gradients of the whole model, with the parameters of one block in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import finebits as fb
import tiny_llama as tiny
from finebits.calibrate.blockwise import Shelf, blocks_of, forwards, gradients
from finebits.evaluate.heldout import backbone, head_of, teacher
from finebits.interop.streaming import Streamed
from finebits.stats.fisher_diag import FisherDiag
from finebits.stats.grad import Grad
from finebits.stats.gram import Gram
from finebits.stream import Flow, Spill
from finebits.tasks import causal_lm
from finebits.tasks.causal_lm import CausalLM
from finebits.tensorfile import Stored


def keep(batches: list[Any]) -> Any:
    return lambda i: batches[i]["attention_mask"].bool()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("m"), seed=4)


def read(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} was there and was read")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_those_of_the_whole_model_and_no_two_blocks_are_there_at_once(folder: Path, dtype: torch.dtype) -> None:
    whole = fresh(folder, dtype)
    batches = tiny.batches()
    streamed = Streamed(folder, dtype)
    there: list[set[str]] = []
    own = streamed.read
    streamed.read = lambda name: there.append(present(streamed.model)) or own(name)  # type: ignore[assignment, func-returns-value]
    hidden = streamed.hidden(batches)
    assert all(len(blocks) <= 1 for blocks in there) and len(there) == 18 and present(streamed.model) == set()
    for batch in batches:
        assert torch.equal(hidden(batch), backbone(whole)(batch))
    ids = batches[0]["input_ids"]
    assert torch.equal(streamed.model(input_ids=ids).logits, whole(input_ids=ids).logits), "a plain call reads what it needs"
    known, seen = teacher(whole, batches), teacher(streamed.model, batches, hidden, head_of(causal_lm.head(streamed.model)))
    assert all(torch.equal(known.batch(i), seen.batch(i)) for i in range(len(batches)))


def fresh(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def present(model: Any) -> set[str]:
    """Blocks that hold any parameter of their own."""
    return {n.split(".")[2] for n, p in model.named_parameters() if ".layers." in n and p.device.type != "meta"}


def test_statistics_are_those_of_collect(folder: Path) -> None:
    whole, streamed, batches = fresh(folder), Streamed(folder, torch.float32), tiny.batches(4, 1)
    wanted: dict[str, Any] = dict.fromkeys(tiny.names(), frozenset({Gram}))
    loss = lambda m, b: CausalLM().loss(m, b)  # noqa: E731
    known = fb.collect(whole, batches, loss, wanted, keep=lambda b: b["attention_mask"].bool())
    flow = streamed.flow(batches, loss)
    seen: dict[str, Any] = {}
    for found in forwards(flow, wanted, keep(batches), streamed.read):
        seen |= found
    assert seen.keys() == known.keys()
    assert all(torch.equal(seen[n][Gram].value(), known[n][Gram].value()) and seen[n][Gram].tokens == known[n][Gram].tokens for n in known)


def test_gradients_are_those_of_collect(folder: Path) -> None:
    whole, streamed, batches = fresh(folder), Streamed(folder, torch.float32), tiny.batches(4, 2)
    wanted: dict[str, Any] = dict.fromkeys(tiny.names(), frozenset({Grad, FisherDiag, Gram}))
    wanted = {n: w for n, w in wanted.items() if "layers.1.mlp" not in n} | {"model.layers.1.mlp.up_proj": frozenset({Gram})}
    wanted = {n: w if "layers.1" not in n else frozenset({Gram}) for n, w in wanted.items()}  # the last block asks for no gradient
    known = fb.collect(whole, batches, CausalLM().loss, wanted, keep=lambda b: b["attention_mask"].bool())
    shelf, order = Shelf(), []
    for found in gradients(streamed.flow(batches, CausalLM().loss), wanted, keep(batches), streamed.read):
        shelf.add(found)
        order += [next(iter(found)).split(".")[2]]
    assert order == ["1", "0"] and set(shelf) == set(known)
    for name, stats in known.items():
        for S, s in stats.items():
            assert shelf[name][S].tokens == s.tokens
            torch.testing.assert_close(shelf[name][S].value(), s.value(), rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in streamed.model.parameters())


def test_blocks_that_return_tuples_and_take_names() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Linear(4, 4)

        def forward(self, hidden_states: torch.Tensor, scale: float) -> tuple[torch.Tensor, None]:
            return self.w(hidden_states) * scale, None

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i, block in enumerate(self.blocks):
                x = block(hidden_states=x, scale=1.0 + i)[0]
            return x + 1

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 3, 4)
    flow = Flow(model, blocks_of(model), [x], lambda m, b: m(b))
    states = flow.entered()
    for name in flow.names:
        flow.walk(states, name)
    assert torch.equal(flow.leave(0, states[0]), model(x))
    assert all("forward" not in vars(b) for b in model.blocks)


def test_states_beyond_what_memory_holds_wait_in_a_file() -> None:
    spill, held = Spill(100), {k: torch.randn(k, 3) for k in range(1, 9)}
    for k, t in held.items():
        spill[k] = t
    assert 0 < len(spill.memory) < len(spill) == 8
    spill[2] = held[2] = torch.randn(2, 3).bfloat16()
    spill[8] = held[8] = torch.randn(9, 3)  # more than its place
    del spill[5], held[5]
    assert set(spill) == set(held) and all(torch.equal(spill[k], t) and spill[k].dtype == t.dtype for k, t in held.items())


def test_a_file_is_read_and_not_mapped(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.arange(4),
        "s": torch.tensor(2.0),
        "h": torch.randn(2, 2).bfloat16(),
        "none": torch.empty(0),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"said": "so"})
    found = Stored(tmp_path / "x.safetensors")
    assert list(found) == sorted(tensors) and found.metadata == {"said": "so"}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in load_file(tmp_path / "x.safetensors").items())
    whole = (tmp_path / "x.safetensors").read_bytes()
    for name, content in {"short": whole[:-3], "none": b"", "other": b"GGUF" + whole, "json": whole[:8] + b"x" * (len(whole) - 8)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="fetch it again"):
            Stored(tmp_path / name)


def test_a_checkpoint_without_a_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    fewer = tiny.folder(tmp_path / "m")
    held = load_file(fewer / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, fewer / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no tensor model.layers.1.mlp.up_proj.weight"):
        Streamed(fewer, torch.float32).hidden(tiny.batches())
