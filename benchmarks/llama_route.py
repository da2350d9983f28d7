"""llama-server's /completion over llama-cpp-python, as much of it as `finebits serve --backend llama.cpp --verify` asks: a program for machines
that have the library alone. It takes llama-server's words; requests run one at a time.

Imports nothing of finebits: it runs in the environment of llama-cpp-python.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import llama_cpp
import numpy as np

F32 = 0  # keys and values in full


class Model:
    """A GGUF file, and adapters that lie over it by number."""

    def __init__(self, path: str, loras: list[str], context: int) -> None:
        self.llama = llama_cpp.Llama(path, n_ctx=context, n_batch=512, logits_all=True, type_k=F32, type_v=F32, verbose=False)
        self.adapters = [llama_cpp.llama_adapter_lora_init(self.llama._model.model, lora.encode()) for lora in loras]
        if None in self.adapters:
            raise SystemExit(f"{loras[self.adapters.index(None)]} is no adapter over {path}")

    def likeliest(self, ids: list[int], scales: list[float], count: int) -> list[dict[str, Any]]:
        """The likeliest next tokens under adapters of these scales."""
        chosen = [(a, s) for a, s in zip(self.adapters, scales, strict=True) if s]
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * max(len(chosen), 1))(*(a for a, _ in chosen))
        if llama_cpp.llama_set_adapters_lora(
            self.llama._ctx.ctx, pointers, len(chosen), (ctypes.c_float * max(len(chosen), 1))(*(s for _, s in chosen))
        ):
            raise RuntimeError("llama.cpp did not set the adapters")
        self.llama.reset()
        self.llama.eval(ids)
        logits = self.llama.scores[len(ids) - 1].astype(np.float64)
        logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        return [{"id": int(i), "token": "", "logprob": float(logs[i])} for i in np.argsort(-logs)[:count]]


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word in ("--model", "--alias", "--host", "--lora"):
        parse.add_argument(word, default="")
    for word in ("--port", "--parallel", "--ctx-size"):
        parse.add_argument(word, type=int)
    parse.add_argument("--lora-init-without-apply", action="store_true")
    given = parse.parse_args()
    model = Model(given.model, given.lora.split(",") if given.lora else [], min(given.ctx_size, 2048))

    class Handler(BaseHTTPRequestHandler):
        def say(self, data: Any) -> None:
            body = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.say({"status": "ok"})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scales = [0.0] * len(model.adapters)
            for one in asked["lora"]:
                scales[one["id"]] = one["scale"]
            self.say({"completion_probabilities": [{"top_logprobs": model.likeliest(asked["prompt"], scales, asked["n_probs"])}]})

    HTTPServer((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
