"""The routes over a real socket: answers, streams, keys, bad adapters, load, and the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_folders import alone, factors, lora, merged

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

import tiny_llama as tiny  # noqa: E402
from finebits.errors import Invalid  # noqa: E402
from finebits.run.serving import served  # noqa: E402
from finebits.serve.engine import Limits  # noqa: E402
from finebits.serve.schema import Chat, Completion, asked  # noqa: E402
from finebits.serve.tenants import Tenants, inside  # noqa: E402
from finebits.serve.text import Written  # noqa: E402
from finebits.tensorfile import Entry, Stored, write  # noqa: E402
from listening import Listening  # noqa: E402

ALICE, BOB, ROOT = "sk-of-alice", "sk-of-bob", "sk-of-the-operator"
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
SEEDS = {"formal": (4, 1), "brief": (8, 2), "poems": (16, 3)}


class Server(Listening):
    """An application that is asked."""

    def open(self, path: str, body: Any = None, key: str | None = ALICE, **headers: str) -> Any:
        return super().open(path, body, key, **headers)

    def ask(self, path: str, body: Any = None, key: str | None = ALICE, **headers: str) -> tuple[int, Any]:
        return super().ask(path, body, key, **headers)

    def complete(self, model: str, key: str | None = ALICE, **more: Any) -> tuple[int, Any]:
        return self.ask("/v1/completions", {"model": model, "prompt": "w5 w7 w9", "temperature": 0, "max_tokens": 6} | more, key)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    tiny.worded(place / "llama", max_position_embeddings=256)
    config = json.loads((place / "llama" / "tokenizer_config.json").read_text())
    (place / "llama" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    for name, (rank, seed) in SEEDS.items():
        lora(place / "adapters" / name, rank, seed)
    (place / "keys.yaml").write_text(f'{ALICE}: [formal, brief, bad]\n{BOB}: [poems]\n{ROOT}: ["*"]\n')
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    server = Server(served(str(place / "llama"), place / "adapters", place / "keys.yaml", Limits(4 << 20), max_rank=32))
    yield server
    server.end()


def words(ids: list[int]) -> str:
    ids = ids[: ids.index(0)] if 0 in ids else ids
    return " ".join(f"w{i}" for i in ids)


def expected(name: str, prompt: list[int], tokens: int) -> str:
    model = merged(factors(*SEEDS[name]) if name in SEEDS else None, max_position_embeddings=256)
    return words([i for i in alone(model, prompt, tokens)])


def test_completions_of_the_model_and_of_its_adapters(server: Server) -> None:
    for name, key in (("llama", BOB), ("formal", ALICE), ("brief", ALICE), ("poems", BOB), ("poems", ROOT)):
        code, answer = server.complete(name, key)
        assert code == 200 and answer["choices"][0]["text"] == expected(name, [5, 7, 9], 6) and answer["model"] == name
        assert answer["object"] == "text_completion" and answer["usage"]["prompt_tokens"] == 3
    code, answer = server.complete("formal", prompt=[5, 7, 9], logprobs=2, stop=["w1"])
    told = answer["choices"][0]["logprobs"]
    assert code == 200 and len(told["tokens"]) == len(told["token_logprobs"]) == answer["usage"]["completion_tokens"]
    assert all(max(top.values()) == lp for top, lp in zip(told["top_logprobs"], told["token_logprobs"], strict=True))


def test_chats_whole_and_streamed(server: Server) -> None:
    body = {"model": "brief", "messages": [{"role": "user", "content": [{"type": "text", "text": "w5 w7 w9"}]}], "temperature": 0.0}
    body |= {"max_completion_tokens": 6, "logprobs": True, "top_logprobs": 1}
    code, whole = server.ask("/v1/chat/completions", body)
    choice = whole["choices"][0]
    assert code == 200 and choice["message"] == {"role": "assistant", "content": expected("brief", [5, 7, 9], 6), "refusal": None}
    assert len(choice["logprobs"]["content"]) == whole["usage"]["completion_tokens"]
    with server.open("/v1/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len({p["id"] for p in parts}) == 1 and {p["object"] for p in parts} == {"chat.completion.chunk"}
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""} and parts[-1]["usage"] == whole["usage"]
    choices = [p["choices"][0] for p in parts[:-1]]
    assert "".join(c["delta"].get("content", "") for c in choices) == choice["message"]["content"]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [choice["finish_reason"]]
    assert sum((c["logprobs"]["content"] for c in choices if c["logprobs"]), []) == choice["logprobs"]["content"]


def test_stops_seeds_and_ends(server: Server) -> None:
    text = server.complete("llama", max_tokens=20, prompt="w9 w9")[1]["choices"][0]["text"].split()
    stop = next(i for i in range(1, len(text)) if f"{text[i]} " not in " ".join(text[:i]) + " ")
    _, answer = server.complete("llama", max_tokens=20, prompt="w9 w9", stop=[text[stop], "never"])
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["text"].split() == text[:stop]
    drawn = [server.complete("formal", temperature=1.5, seed=seed)[1]["choices"][0]["text"] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_nobody_sees_what_is_another_s(server: Server, place: Path) -> None:
    names = lambda key: {m["id"] for m in server.ask("/v1/models", key=key)[1]["data"]}  # noqa: E731
    assert names(ALICE) == {"llama", "formal", "brief"} and names(BOB) == {"llama", "poems"} and names(ROOT) == {"llama", *SEEDS}
    for model in ("poems", "nowhere"):  # the one exists and the other does not: both are answered alike
        code, answer = server.complete(model)
        assert code == 404 and answer["error"]["code"] == "model_not_found"
        assert answer["error"]["message"] == f"the model {model!r} does not exist, or you have no access to it"
    unseen = server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "poems"})
    assert unseen == server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "nowhere"}) and unseen[0] == 400
    assert server.ask("/v1/unload_lora_adapter", {"lora_name": "poems"})[0] == 404
    for key in (None, "sk-of-mallory"):
        code, answer = server.complete("llama", key)
        assert code == 401 and answer["error"]["code"] == "invalid_api_key"
    assert server.ask("/metrics", key=None)[0] == 401 and "poems" not in server.ask("/metrics")[1]
    assert server.ask("/health", key=None) == (200, {"status": "ok"})
    # two tenants call theirs alike
    assert server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "formal"})[0] == 200
    assert server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": str(place / "adapters" / "poems")}, BOB)[0] == 200
    for key, name in ((ALICE, "formal"), (BOB, "poems")):
        assert server.complete("mine", key)[1]["choices"][0]["text"] == expected(name, [5, 7, 9], 6)
    code, answer = server.ask("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "formal"})
    assert code == 400 and "already" in answer["error"]["message"]
    assert server.ask("/v1/unload_lora_adapter", {"lora_name": "mine"})[0] == 200 and server.complete("mine")[0] == 404
    assert server.complete("mine", BOB)[0] == 200 and server.ask("/v1/unload_lora_adapter", {"lora_name": "mine"}, BOB)[0] == 200


def spoil(folder: Path, **changed: Any) -> None:
    tensors = dict(Stored(folder / "adapter_model.safetensors").items())
    tensors |= {k: changed["tensor"](tensors[k]) for k in list(tensors)[:1]}
    write(folder / "adapter_model.safetensors", {k: Entry.of(t) for k, t in tensors.items()}, {"format": "pt"})


BAD = {
    "nan": "NaN or Inf",
    "shape": "settings and model ask for",
    "rank": "takes ranks up to 32",
    "base": "another model",
    "pickle": "pickle",
    "kind": "DoRA",
    "out": "no folder among the adapters",
    "up": "no folder among the adapters",
    "link": "no folder among the adapters",
    "file": "a link to somewhere else",
    "setting": "r is 'x'",
    "nothing": "no PEFT adapter",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_one_sentence_and_others_go_on(server: Server, place: Path, tmp_path: Path, kind: str) -> None:
    folder, path = place / "adapters" / "bad" / kind, f"bad/{kind}"
    folder.parent.mkdir(exist_ok=True)
    settings = lambda **more: (folder / "adapter_config.json").write_text(  # noqa: E731
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | more)
    )
    if kind in ("link", "out"):
        lora(tmp_path / "elsewhere", 4, 1)
        path = str(tmp_path / "elsewhere") if kind == "out" else path
        if kind == "link":
            os.symlink(tmp_path / "elsewhere", folder)
    elif kind == "nothing":
        folder.mkdir()
    else:
        lora(folder, 64 if kind == "rank" else 4, 5)
    if kind == "nan":
        spoil(folder, tensor=lambda t: t * torch.nan)
    elif kind == "shape":
        spoil(folder, tensor=lambda t: t[:, :-1].contiguous())
    elif kind == "base":
        tiny.folder(tmp_path / "another", seed=9)
        settings(base_model_name_or_path=str(tmp_path / "another"))
    elif kind == "pickle":
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    elif kind == "kind":
        settings(use_dora=True)
        held = dict(Stored(folder / "adapter_model.safetensors").items())
        held |= {k.replace("lora_B.weight", "lora_magnitude_vector"): t.norm(dim=1) for k, t in held.items() if "lora_B" in k}
        write(folder / "adapter_model.safetensors", {k: Entry.of(t) for k, t in held.items()}, {"format": "pt"})
    elif kind == "up":
        path = f"bad/../../{place.name}/adapters/../keys.yaml"
    elif kind == "file":
        (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
        os.symlink(tmp_path / "weights", folder / "adapter_model.safetensors")
    elif kind == "setting":
        settings(r="x")
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(server.complete, "formal", max_tokens=40)
        code, answer = server.ask("/v1/load_lora_adapter", {"lora_name": "worse", "lora_path": path})
        assert other.result()[0] == 200
    message = answer["error"]["message"]
    assert (
        code == 400 and BAD[kind].lower() in message.lower() and "\n" not in message and answer["error"]["type"] == "invalid_request_error"
    )
    assert server.complete("worse")[0] == 404


def test_what_turns_bad_after_it_was_registered(server: Server, place: Path) -> None:
    lora(place / "adapters" / "bad" / "later", 4, 5)
    assert server.ask("/v1/load_lora_adapter", {"lora_name": "later", "lora_path": "bad/later"})[0] == 200
    spoil(place / "adapters" / "bad" / "later", tensor=lambda t: t * 2)
    for stream in (False, True, False):
        code, answer = server.complete("later", stream=stream)
        assert code == 400 and "changed after it was registered" in answer["error"]["message"]
    assert server.complete("formal")[0] == 200 and server.ask("/v1/unload_lora_adapter", {"lora_name": "later"})[0] == 200


def test_a_request_with_something_wrong_is_told_what(server: Server) -> None:
    wrong = [
        ({"temperature": 3}, "temperature"),
        ({"n": 2}, "n:"),
        ({"tools": []}, "tools: this server knows no such field"),
        ({"stop": ["a"] * 5}, "up to 4 texts"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [5, 1000]}, "token 1000"),
        ({"prompt": []}, "prompt is empty"),
        ({"logprobs": 9}, "logprobs"),
        ({"seed": 2**70}, "64 bits"),
    ]
    for more, said in wrong:
        code, answer = server.complete("formal", **more)
        assert code == 400 and said in answer["error"]["message"], (more, answer)
    code, answer = server.complete("formal", prompt=[5] * 250, max_tokens=20)
    assert code == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert server.ask("/v1/completions", b"{")[0] == 400 and server.ask("/v1/completions", b"[]")[0] == 400
    assert server.ask("/v1/nothing")[0] == 404 and server.ask("/v1/completions")[0] == 405


def test_clients_that_go_away_leave_nothing_behind(server: Server) -> None:
    for _ in range(4):
        answer = server.open("/v1/completions", {"model": "formal", "prompt": "w3", "max_tokens": 250, "stream": True, "stop": ["never"]})
        answer.read(10)
        answer.close()
    value = lambda name: next(line for line in server.ask("/metrics")[1].splitlines() if line.startswith(name))  # noqa: E731
    end = time.monotonic() + 120
    while value("finebits_requests_running") != "finebits_requests_running 0" and time.monotonic() < end:
        time.sleep(0.05)
    assert value('finebits_pages{of="cache"}').endswith(" 0")


def test_more_than_the_queue_takes_is_refused_early(place: Path) -> None:
    server = Server(served(str(place / "llama"), limits=Limits(4 << 20, max_queue=3, max_batch=1)))
    try:
        body = {"model": "llama", "prompt": "w5 w7", "max_tokens": 100, "stop": ["never"]}
        with ThreadPoolExecutor(24) as clients:
            codes = list(clients.map(lambda i: server.ask("/v1/completions", body | {"seed": i}, None)[0], range(24)))
        assert set(codes) == {200, 429} and codes.count(200) >= 4
        text = server.ask("/metrics", key=None)[1]
        assert f'finebits_requests_total{{route="/v1/completions",status="200"}} {codes.count(200)}' in text
        assert server.ask("/health", key=None, Host="evil.example")[0] == 400  # without keys, to this machine alone
    finally:
        server.end()


def test_the_end_waits_for_what_is_in(place: Path) -> None:
    server = Server(served(str(place / "llama"), limits=Limits(4 << 20)))
    body = {"model": "llama", "prompt": "w5 w7", "max_tokens": 200, "temperature": 0, "stream": True}
    answer = server.open("/v1/completions", body, None)
    first = answer.readline()
    server.end()
    assert not server.thread.is_alive() and first.startswith(b"data: {") and answer.read().endswith(b"data: [DONE]\n\n")


def test_the_openai_client(place: Path, server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0)
    turns: Any = [{"role": "user", "content": "w5 w7 w9"}]
    assert {m.id for m in client.models.list()} >= {"llama", "formal", "brief"}
    chat = client.chat.completions.create(model="formal", messages=turns, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2)
    assert (
        chat.choices[0].message.content == expected("formal", [5, 7, 9], 6) and len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    )
    parts = client.chat.completions.create(model="formal", messages=turns, max_tokens=6, temperature=0, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == chat.choices[0].message.content
    text = client.completions.create(model="brief", prompt="w5 w7 w9", max_tokens=6, temperature=0, seed=1, stop=["never"])
    assert text.choices[0].text == expected("brief", [5, 7, 9], 6)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="poems", prompt="w5")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="brief", prompt="w5", temperature=5)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-of-mallory").models.list()


def test_text_is_certain_before_it_goes_out() -> None:
    decode = lambda ids: bytes(ids).decode("utf-8", "replace")  # noqa: E731
    written, text = Written(decode, ["END", "ENT"]), "häß E ENx €…EN"
    out = [written.add(b) for b in text.encode()]
    assert not any("\ufffd" in piece for piece in out) and "".join(out) == text[:-2] and written.rest() == "EN"
    written = Written(decode, ["END"])
    assert "".join(written.add(b) for b in b"so END") == "so " and written.ended and written.rest() == ""


def test_keys_and_paths(tmp_path: Path) -> None:
    for text in ("", "[a]", "short: [a]", f"{ALICE}: a", "a: ["):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(Invalid, match="keys"):
            Tenants.read(tmp_path / "keys")
    hashed = Tenants({"sha256:" + "2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90": ["a"]})  # of "alice"
    assert hashed.of("alice") is not None and hashed.of("2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90") is None
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    assert inside(tmp_path / "root", "a/b") == (tmp_path / "root" / "a" / "b", "a")
    for path in ("..", ".", "a/../..", "/etc", "a\0", "~", "b"):
        with pytest.raises(Invalid, match="no folder among"):
            inside(tmp_path / "root", path)


def test_fields_that_nobody_knows_are_refused() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert asked(Chat, body).most(100) == 100 and asked(Chat, body).most(10000) == 512
    with pytest.raises(Invalid, match="top_logprobs"):
        _ = asked(Chat, body | {"top_logprobs": 2}).told
    with pytest.raises(Invalid, match="messages.0.role"):
        asked(Chat, body | {"messages": [{"role": "tool", "content": "x"}]})
    assert asked(Completion, {"model": "m", "prompt": "x"}).sampling(1, None, frozenset()).temperature == 1.0
