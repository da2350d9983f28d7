"""Files that are damaged or lie, through every reader that a user's folder reaches: each gives one sentence of ours, in little memory, and runs
nothing."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.artefacts import RECORD, record
from finebits.interop.checkpoint import Layout, Stored, Tensors
from finebits.interop.coded import coded
from finebits.interop.gguf_file import GGUFFile
from finebits.interop.hf import folder_of, load, processor_of
from finebits.interop.peft_folder import read as read_adapter
from finebits.recipe import Recipe
from finebits.recipe.source import RecipeError
from finebits.runfolder import RunFolder
from gguf_files import GGUFS, gguf_bytes

pytestmark = pytest.mark.filterwarnings("ignore")
ROOM = 2**29  # bytes of address space beyond what there is: what a file lies about is not allocated
MODEL, ADAPTER, SAVED = "model/model.safetensors", "lora/adapter_model.safetensors", "saved/adapter.safetensors"
Change = Callable[[bytes], bytes]


class Payload:
    """What runs as soon as it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/finebits-was-here",))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter over it, a saved model, a plan, a run's record and a GGUF file, none of them damaged."""
    import peft

    place = tmp_path_factory.mktemp("whole")
    base = tiny.worded(place / "model", hidden_size=16, intermediate_size=16)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.fresh(hidden_size=16, intermediate_size=16), config).save_pretrained(place / "lora")
    specs = {n: fb.Spec(fb.NF(4, 16), adapter=fb.LoRA(rank=2)) for n in tiny.names(1)}
    plan = fb.Plan(specs, model=str(base), levers=fb.Levers(dtype="float32"), memory={"adapters": 1})
    fb.save(fb.load_planned(plan)[0], place / "saved")
    plan.save(place / "plan.json")
    (place / "run").mkdir()
    (place / "run" / "run.json").write_text(json.dumps({"schema": "finebits.run/1", "settings": {}, "data": "", "plan": "", "parts": {}}))
    (place / "recipe.yaml").write_text(f"model: {{model_name_or_path: {base}}}\ndata: {{datasets: [{{path: rows.jsonl}}]}}\n")
    (place / "a.gguf").write_bytes(gguf_bytes())
    return place


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if Path("/proc/self/statm").exists() else 0
    if now:
        resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(read: Callable[[], Any]) -> str:
    """The sentence. A foreign exception, and none at all, fail the test."""
    with pytest.raises(fb.FinebitsError) as e:
        read()
    said = str(e.value)
    assert said and e.value.code in (1, 2, 3) and len(said) < 20_000
    assert isinstance(e.value, RecipeError) or "\n" not in said, said  # which has one for each mistake, with its line
    assert not Path("/tmp/finebits-was-here").exists()
    return said


def model(place: Path) -> None:
    tensors = Tensors(folder_of(place / "model"))
    for name in tensors:
        tensors[name]
    processor_of(place / "model")


def adapter(place: Path) -> None:
    held = read_adapter(place / "lora", tiny.fresh(hidden_size=16, intermediate_size=16))
    for key in held.others:
        held.others[key]


def saved(place: Path) -> None:
    (place / "saved" / RECORD).unlink()
    record(place / "saved", "finebits.saved/1")  # so that the hashes are those of the damaged files
    load(place / "saved")


READERS: dict[str, Callable[[Path], Any]] = {MODEL: model, ADAPTER: adapter, SAVED: saved, "saved/base.safetensors": saved}


# Tensors -------------------------------------------------------------------------------------------------------------------------------


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """The same file with another header, as what `change` makes of it or gives, whole or as text."""

    def apply(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + length])
        out = change(head)
        text = out if isinstance(out, bytes) else json.dumps(head if out is None else out).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return apply


def first(**more: Any) -> Change:
    """One line of the header says something else."""

    def change(head: dict[str, Any]) -> None:
        name = next(k for k in head if k != "__metadata__")
        head[name] |= {k: v(head[name][k]) if callable(v) else v for k, v in more.items()}

    return header(change)


def over(head: dict[str, Any]) -> None:
    """One tensor lies over another of the same length."""
    names = [k for k in head if k != "__metadata__"]
    one, other = next((a, b) for a in names for b in names if a != b and head[a]["shape"] == head[b]["shape"])
    head[one]["data_offsets"] = head[other]["data_offsets"]


def twice(head: dict[str, Any]) -> bytes:
    name = next(k for k in head if k != "__metadata__")
    return json.dumps(head).encode()[:-1] + f", {json.dumps(name)}: {json.dumps(head[name])}}}".encode()


TENSORS: dict[str, Change] = {
    "empty": lambda b: b"",
    **{f"cut at {n}": lambda b, n=n: b[:n] for n in (1, 7, 8, 9, 100)},
    "cut in the middle": lambda b: b[: len(b) // 2],
    "a byte short": lambda b: b[:-1],
    **{f"a header of {n}": lambda b, n=n: n.to_bytes(8, "little") + b[8:] for n in (0, 1, 10**7, 10**12, 2**63, 2**64 - 1)},
    "a pickle": lambda b: pickle.dumps(Payload()),
    "a zip": lambda b: b"PK\x03\x04" + b[4:],
    "zeros": lambda b: bytes(len(b)),
    "no JSON": header(lambda h: b"{" * 20),
    "no text": header(lambda h: b"\xff\xfe" + bytes(30)),
    "a list": header(lambda h: [h]),
    "a number": header(lambda h: 5),
    "deep": header(lambda h: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a key twice": header(twice),
    "NaN": header(lambda h: h.update({"a": float("nan")})),
    "metadata a number": header(lambda h: h.update({"__metadata__": 5})),
    "metadata of numbers": header(lambda h: h.update({"__metadata__": {"format": 5}})),
    "a line a list": header(lambda h: h.update({"a": [1]})),
    "a line empty": header(lambda h: h.update({"a": {}})),
    "an unknown type": first(dtype="F7"),
    "a type that is a list": first(dtype=["F32"]),
    "a wider type": first(dtype="F64"),
    "a negative side": first(shape=lambda s: [-n for n in s]),
    "sides that overflow": first(shape=[2**62, 2**62, 4]),
    "a fraction of a side": first(shape=[0.5]),
    "a side in words": first(shape=["two"]),
    "sides that are a number": first(shape=7),
    "sides too many": first(shape=[1] * 200),
    "negative places": first(data_offsets=lambda o: [o[0] - 10**6, o[1] - 10**6]),
    "places turned": first(data_offsets=lambda o: [o[1], o[0]]),
    "places behind the end": first(data_offsets=lambda o: [o[0] + 10**9, o[1] + 10**9]),
    "places of true": first(data_offsets=[False, True]),
    "one place": first(data_offsets=[0]),
    "places in words": first(data_offsets=["a", "b"]),
    "a fraction of a place": first(data_offsets=lambda o: [float(o[0]), float(o[1])]),
    "one over another": header(over),
}


def damaged(whole: Path, place: Path, file: str, change: Change) -> Path:
    shutil.copytree(whole, place, dirs_exist_ok=True)
    plan = place / "saved" / "plan.json"
    if plan.exists():  # the saved model's own base has moved along
        plan.write_text(plan.read_text().replace(str(whole / "model"), str(place / "model")))
        (place / "saved" / RECORD).unlink()
        record(place / "saved", "finebits.saved/1")
    (place / file).write_bytes(change((place / file).read_bytes()))
    return place


@pytest.mark.parametrize("how", TENSORS)
@pytest.mark.parametrize("file", READERS)
def test_tensors(file: str, how: str, whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, file, TENSORS[how])
    refused(lambda: READERS[file](place))


def bnb(**more: Any) -> dict[str, torch.Tensor]:
    state = {"shape": [4, 64], "blocksize": 64, "dtype": "float32", "quant_type": "nf4"} | more
    text = json.dumps({k: v for k, v in state.items() if v is not None}).encode()
    return {
        "a.weight": torch.zeros(128, 1, dtype=torch.uint8),
        "a.weight.absmax": torch.ones(4),
        "a.weight.quant_map": torch.ones(16),
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }


def gptq(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    i = torch.int32
    held = {"qweight": torch.zeros(8, 8, dtype=i), "qzeros": torch.zeros(1, 1, dtype=i), "scales": torch.ones(1, 8).half()}
    return {f"a.{k}": t for k, t in (held | more).items()}


GPTQ, AWQ = {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4}
PACKED = {
    "a.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
    "a.weight_scale": torch.ones(4, 1),
    "a.weight_shape": torch.tensor([4, 64]),
}
CODED: dict[str, tuple[dict[str, torch.Tensor], Any]] = {
    **{
        f"bitsandbytes, {more}": (bnb(**more), None)
        for more in (
            {"shape": None},
            {"shape": "x"},
            {"shape": [2**40, 2**40]},
            {"shape": [-4, 64]},
            {"shape": [4, 128]},
            {"blocksize": 0},
            {"blocksize": "x"},
            {"blocksize": None},
        )
    },
    "bitsandbytes, no JSON": (bnb() | {"a.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}, None),
    "bitsandbytes, a short table": (bnb() | {"a.weight.quant_map": torch.ones(0)}, None),
    "bitsandbytes, few scales": (bnb() | {"a.weight.absmax": torch.ones(1)}, None),
    "words in one row": (gptq(qweight=torch.zeros(8, dtype=torch.int32)), GPTQ),
    "scales in one row": (gptq(scales=torch.ones(8)), GPTQ),
    "zero points missing": (gptq(qzeros=torch.zeros(0, 0, dtype=torch.int32)), GPTQ),
    "groups that are none": (gptq(g_idx=torch.full((64,), 2**30, dtype=torch.int32)), GPTQ),
    "bits in words": (gptq(), GPTQ | {"bits": "x"}),
    "exceptions in words": (gptq(), GPTQ | {"dynamic": "x"}),
    "an expression that is none": (gptq(), GPTQ | {"dynamic": {"(": {"bits": 4}}}),
    "AWQ in one row": (gptq(qweight=torch.zeros(8, dtype=torch.int32)), AWQ),
    "AWQ with other zeros": (gptq(qweight=torch.zeros(64, 1, dtype=torch.int32), qzeros=torch.zeros(3, 3, dtype=torch.int32)), AWQ),
    "packed, shape of three": (PACKED | {"a.weight_shape": torch.tensor([4, 64, 1])}, None),
    "packed, huge": (PACKED | {"a.weight_shape": torch.tensor([2**40, 64])}, None),
    "packed, no scales": (PACKED | {"a.weight_scale": torch.ones(0, 0)}, None),
    "MXFP4 in one row": ({"a_blocks": torch.zeros(16, dtype=torch.uint8), "a_scales": torch.zeros(1, dtype=torch.uint8)}, None),
}


@pytest.mark.parametrize("how", CODED)
def test_codes(how: str, tmp_path: Path) -> None:
    tensors, config = CODED[how]

    def read() -> None:
        shapes = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
        found = coded(shapes, {} if config is None else {"quantization_config": config}, lambda name: tensors[name])
        stored = {k: Stored(tensors, t.dtype, tuple(t.shape)) for k, t in tensors.items()}  # type: ignore[arg-type]
        for name in found:
            layout = Layout(None, None, stored, found)
            layout.parts = lambda codes, at=None: {role: tensors[k] for role, k in codes.parts.items()}  # type: ignore[method-assign]
            layout.read(name)

    refused(read)


# JSON ----------------------------------------------------------------------------------------------------------------------------------

JUNK: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "a text": b'"x"',
    "open": b"{",
    "more behind": b"{} {}",
    "bytes": bytes(range(256)),
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a key twice": b'{"a": 1, "a": 2}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "not a number": b'{"a": NaN}',
}


def manifest(place: Path) -> None:
    load(place / "saved")


OBJECTS: dict[str, Callable[[Path], Any]] = {
    "model/config.json": model,
    "lora/adapter_config.json": adapter,
    "saved/finebits.json": manifest,
    "plan.json": lambda p: fb.Plan.load(p / "plan.json"),
    "run/run.json": lambda p: RunFolder(p / "run").record(),
}


@pytest.mark.parametrize("how", JUNK)
@pytest.mark.parametrize("file", OBJECTS)
def test_objects(file: str, how: str, whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, file, lambda _: JUNK[how])
    refused(lambda: OBJECTS[file](place))


CONFIGS: list[dict[str, Any]] = [
    *({"hidden_size": v} for v in ("x", -1, 0, 10**18, None, [16], 1e30, 32)),
    *({"num_hidden_layers": v} for v in (10**9, -1, "2", 3, None, 1e12)),
    *({"num_attention_heads": v} for v in (0, -4, "4", 10**9)),
    *({"vocab_size": v} for v in (-5, 2**62, "a", 5)),
    *({"model_type": v} for v in (["llama"], "", "no_such_model", 5, "../../x")),
    *({"rope_parameters": v} for v in ("x", 5, {"rope_type": "no_such"})),
    {"hidden_act": "os.system"},
    {"num_labels": 10**9},
    {"dtype": "os"},
    *({"quantization_config": {"quant_method": v}} for v in ("torchao", ["gptq"], 5)),
    {"quantization_config": {"quant_method": "gptq", "bits": "x"}},
    {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
    *({"transformers_weights": v} for v in ("../x.safetensors", "/etc/passwd", 5, "missing.safetensors", "a\0b")),
]


@pytest.mark.parametrize("more", CONFIGS, ids=str)
def test_configs(more: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, "model/config.json", lambda b: json.dumps(json.loads(b) | more).encode())
    (place / "model" / "code.py").write_text("import os; os.system('touch /tmp/finebits-was-here')")
    refused(lambda: model(place))


NAMES = ["../x", "/etc/passwd", "a/../../x", 5, None, ["a"], {"a": 1}, "", "missing.safetensors", "a\0b", "."]


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_indices(name: Any, whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, MODEL, lambda b: b)
    (place / "model/model.safetensors").rename(place / "x")
    index = {"weight_map": dict.fromkeys(json.loads((place / "x").read_bytes()[8:].split(b"}}")[0] + b"}}"), name)}
    (place / "model/model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: model(place))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": "x"}, {"weight_map": 5}, []], ids=str)
def test_what_is_no_index(index: Any, whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, MODEL, lambda b: b)
    (place / "model/model.safetensors").rename(place / "x")
    (place / "model/model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: model(place))


ADAPTERS: list[dict[str, Any]] = [
    *({"r": v} for v in (0, -1, "8", 10**12, True, None, [2], 1.5)),
    *({"lora_alpha": v} for v in ("x", [1], True)),
    *({"peft_type": v} for v in (None, 5, ["LORA"], "NO_SUCH")),
    *({"rank_pattern": v} for v in ([1], {"(": 2}, {"(a+)+$": 2}, {"q_proj": "x"}, {"q_proj": 10**12}, {"nothing": 2}, "x")),
    *({"alpha_pattern": v} for v in ({"q_proj": None}, {"a{99999999999}": 1}, 5)),
    *({"target_modules": v} for v in (5, [5], {"a": 1}, "(", ["nothing"], "x" * 1000)),
    *({"modules_to_save": v} for v in ("x", 5, ["lm_head"])),
    *({"lora_dropout": v} for v in (-1, 5, "x")),
    *({"use_rslora": v} for v in (1, "no")),
    *({"trainable_token_indices": v} for v in ([-1], "x", {"embed": [5]})),
    *({"layers_to_transform": v} for v in ("x", [5], [0.5])),
    {"bias": 5},
]


@pytest.mark.parametrize("more", ADAPTERS, ids=lambda more: str(more)[:60])
def test_adapters(more: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, "lora/adapter_config.json", lambda b: json.dumps(json.loads(b) | more).encode())
    refused(lambda: adapter(place))


PLANS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another schema": lambda p: p.update(schema="finebits.plan/99"),
    "no modules": lambda p: p.pop("modules"),
    "modules a list": lambda p: p.update(modules=[1]),
    "a module a number": lambda p: p["modules"].update(a=5),
    "levers a list": lambda p: p.update(levers=[1]),
    "an unknown lever": lambda p: p["levers"].update(no_such=1),
    "an unknown key": lambda p: p.update(no_such=1),
    "model a number": lambda p: p.update(model=5),
    "seed in words": lambda p: p.update(seed="x"),
    "budget in words": lambda p: p.update(budget="lots"),
    "memory in words": lambda p: p.update(memory={"a": "b"}),
    "memory a list": lambda p: p.update(memory=[1]),
    "costs a list": lambda p: p.update(costs=[1]),
    "over in words": lambda p: p.update(over="x"),
    **{
        f"{slot} {value}": lambda p, slot=slot, value=value: next(iter(p["modules"].values())).update({slot: value})
        for slot in ("format", "adapter", "init", "quantizer")
        for value in (5, [], {"paper": "no_such"}, {"paper": ["nf"]}, {"paper": "../x"}, "os", {"paper": "base"})
    },
    **{
        f"bits {value}": lambda p, value=value: next(iter(p["modules"].values()))["format"].update(bits=value)
        for value in ("x", -1, 0, 99, None, 1.5, True)
    },
    **{
        f"rank {value}": lambda p, value=value: next(iter(p["modules"].values()))["adapter"].update(rank=value)
        for value in ("x", -1, 0, None, 2**60, [2])
    },
}


@pytest.mark.parametrize("how", PLANS)
def test_plans(how: str, whole: Path, tmp_path: Path) -> None:
    data = json.loads((whole / "plan.json").read_text())
    PLANS[how](data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    refused(lambda: fb.Plan.load(tmp_path / "plan.json"))


RUNS = [
    {"schema": "finebits.run/9"},
    {"parts": []},
    {"parts": {"full": 5}},
    {"parts": {"full": {"made_by": 5}}},
    {"parts": {"full": {"made_by": "x"}}},
    {"settings": 5},
    {"plan": []},
]


@pytest.mark.parametrize("more", RUNS, ids=str)
def test_runs(more: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, "run/run.json", lambda b: json.dumps(json.loads(b) | more).encode())
    refused(lambda: RunFolder(place / "run").record())


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES = {
    "code": b"model: !!python/object/apply:os.system ['touch /tmp/finebits-was-here']",
    "a tag": b"model: !mine {a: 1}",
    "a bomb": BOMB.encode(),
    "a circle": b"model: &a {model_name_or_path: *a}",
    "deep": b"model: " + b"[" * 5000,
    "deep maps": b"{a: " * 3000,
    "bytes": bytes(range(256)),
    "a list": b"- 1",
    "a number": b"5",
    "a tab": b"model:\n\tx: 1",
    "a key twice": b"model: {model_name_or_path: a}\nmodel: {model_name_or_path: b}",
    "an unknown key": b"modle: {}",
    "not a number": b"model: {model_name_or_path: a}\ntraining: {learning_rate: .nan}",
    "a key that is a list": b"? [1, 2]\n: 3",
    "two documents": b"model: {}\n---\nmodel: {}",
}


@pytest.mark.parametrize("how", RECIPES)
def test_recipes(how: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(RECIPES[how])
    refused(lambda: Recipe.load(tmp_path / "recipe.yaml"))


WORDS = {
    "tokenizer.json": [b"", b"{}", b"[]", b"[" * 100_000, b'{"model": 5}', b'{"model": {"type": "BPE", "vocab": "x"}}', bytes(100)],
    "tokenizer_config.json": [b"[]", b"{", b"[" * 100_000, bytes(range(256))],
    "generation_config.json": [b"[]", b"{", b'{"eos_token_id": "x"}', b'{"eos_token_id": 10000000}', b'{"pad_token_id": [0.5]}'],
}


@pytest.mark.parametrize("file,at", [(file, i) for file, all_ in WORDS.items() for i in range(len(all_))])
def test_tokenizers(file: str, at: int, whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, MODEL, lambda b: b)
    (place / "model" / file).write_bytes(WORDS[file][at])
    refused(lambda: model(place))


# Pickles -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"])
def test_pickles_in_the_place_of_a_model(name: str, whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, MODEL, lambda b: b)
    (place / MODEL).unlink()
    (place / "model" / name).write_bytes(pickle.dumps(Payload()))
    assert f"{name} is a pickle" in refused(lambda: model(place))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_in_the_place_of_an_adapter(name: str, whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, ADAPTER, lambda b: b)
    (place / ADAPTER).unlink()
    torch.save({"a": torch.ones(2)}, place / "lora" / name)
    assert "is a pickle" in refused(lambda: adapter(place))


@pytest.mark.parametrize("how", GGUFS)
def test_ggufs(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(GGUFS[how])
    said = refused(lambda: folder_of(tmp_path / "a.gguf"))
    assert "GGUF" in said
    assert not (tmp_path / "cache").exists()


def test_what_is_not_damaged_is_read(whole: Path, tmp_path: Path) -> None:
    place = damaged(whole, tmp_path, MODEL, lambda b: b)
    for read in dict.fromkeys([*READERS.values(), *OBJECTS.values()]):
        read(place)
    assert list(GGUFFile(place / "a.gguf")) == ["a", "b"]
    counts = len(TENSORS) * len(READERS), len(JUNK) * len(OBJECTS), *map(len, (CONFIGS, NAMES, ADAPTERS, PLANS, RUNS, RECIPES, GGUFS))
    assert sum(counts) > 300
