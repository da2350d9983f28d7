"""A model's next tokens by one call of the native kernels each, over keys and values that stay where they are.

Of a block with RMSNorm, attention of rotated queries and keys, and a gated feed-forward sublayer, a step is a chain of jobs
(`finebits.kernels.cpu.program`), read off its modules: weights packed or dense, biases, low-rank adapters. Between them is
neither Python nor torch. States are float32 throughout.

No architecture is known by name, and nothing is believed: the last token of every prompt goes by the step as well, and unless
that gives the logits that the model gave, all goes by the model's own forward. So goes whatever else a model has (experts,
windows shorter than the text, adapters that are no product, hooks, another device), and all of it without compiled kernels.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finebits.anatomy import parts_of
from finebits.build import Adapted, all_hosts
from finebits.carrier import Carrier
from finebits.kernels.cpu import program
from finebits.kernels.cpu.binding import DTYPES
from finebits.lookup import Tied
from finebits.qtensor import QTensor

AWAY = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}  # of the spread of logits: how far another order of sums moves them
BLOCK = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone
NEAR = (torch.bfloat16, torch.float16)  # of weights: what is multiplied by them need not be exact float32


class Other(Exception):
    """The model is no such chain; `args` say why."""


_disagreed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def steps_of(model: Any, requests: int, capacity: int) -> Steps | None:
    """Steps of so many texts of up to `capacity` tokens each; None where the model is no such chain."""
    if program.body() is None or model in _disagreed:
        return None
    try:
        return Steps(model, requests, capacity)
    except Other:
        return None


class Steps:
    """One token of each of `requests` texts a call. Raises Other where a model is no such chain.

    `begin` first; then a call takes the newest token of every text and gives the logits after it (requests, words), which stay until the next.
    """

    def __init__(self, model: Any, requests: int, capacity: int) -> None:
        undisturbed(model)
        self.model, self.config, self.capacity = model, model.config.get_text_config(), capacity
        self.network: Any = model.base_model
        layers, final = getattr(self.network, "layers", None), getattr(self.network, "norm", None)
        if not isinstance(layers, nn.ModuleList) or final is None or not hasattr(self.network, "rotary_emb"):
            raise Other("its layers are called otherwise")
        self.embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(self.embed, nn.Embedding) or head is None or "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise Other("it is no table, blocks and a head")
        n = self.embed.embedding_dim
        self.chain, self.lengths = program.Program(), torch.zeros(requests, dtype=torch.long)
        self.table = torch.arange(requests)[:, None].contiguous()
        self.stores: list[Tensor] = []
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self.x, self.logits = self._buffer("x", n), self._buffer("logits", head.weight.shape[0])
        self.turns = self._turns()
        for layer in layers:
            self._block(layer)
        normed = self._norm(final, self.x)
        self._matrix(head, normed, self.logits)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """The model's own logits after every prompt (requests, words), taken a prompt at a time, and its keys and values. None where the
        step does not give the same after the last token of each."""
        kept = []
        for row, prompt in enumerate(prompts):
            out = self.model(input_ids=torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
            kept.append(out.logits[0, -1].float())
            for store, layer in zip(self.stores, out.past_key_values.layers, strict=True):
                for i, t in enumerate((layer.keys, layer.values)):
                    store[row, i, : len(prompt) - 1] = t[0, :, :-1].transpose(0, 1)
            self.lengths[row] = len(prompt) - 1
            dtype = out.logits.dtype
        wanted = torch.stack(kept)
        off = (self([p[-1] for p in prompts]) - wanted).abs().max()
        if not float(off) <= AWAY[dtype] * float(wanted.std()):
            _disagreed.add(self.model)
            return None
        return wanted

    def __call__(self, ids: Sequence[int]) -> Tensor:
        self.x.copy_(self.embed(torch.tensor(ids)))
        self.lengths += 1
        self.chain.run()
        return self.logits

    # how it is read ---------------------------------------------------------------------------------------------------------------------------

    def _buffer(self, name: str, width: int) -> Tensor:
        """One for all blocks."""
        return self._buffers.setdefault((name, width), torch.zeros(len(self.lengths), width))

    def _turns(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position (capacity, turned)."""
        kind = (getattr(self.config, "rope_parameters", None) or {}).get("rope_type")
        if kind not in ROTARY:
            raise Other(f"its positions are turned by {kind}")
        cos, sin = self.network.rotary_emb(torch.zeros(1, 1, 1), torch.arange(self.capacity)[None])
        return cos[0].float().contiguous(), sin[0].float().contiguous()

    def _block(self, layer: Any) -> None:
        if set(dict(layer.named_children())) != BLOCK:
            raise Other(f"a {type(layer).__name__} has other parts")
        out = self._attention(layer.self_attn, self._norm(layer.input_layernorm, self.x))
        self.chain.add(out, self.x)
        out = self._feed_forward(layer.mlp, self._norm(layer.post_attention_layernorm, self.x))
        self.chain.add(out, self.x)

    def _attention(self, attention: Any, x: Tensor) -> Tensor:
        own = dict(attention.named_children())
        norms = {k for k in ("q_norm", "k_norm") if k in own}
        if ATTENTION - own.keys() or any(any(True for _ in own[k].parameters()) for k in own.keys() - ATTENTION - norms):
            raise Other(f"a {type(attention).__name__} has other parts")
        window = getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None))
        if getattr(self.config, "attention_chunk_size", None) or window is not None and window < self.capacity:
            raise Other("its tokens do not see all before them")
        width, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
        if not isinstance(width, int) or not isinstance(scale, float):
            raise Other(f"a {type(attention).__name__} does not say the size of its heads")
        q, k, v = (self._buffer(name[0], own[name].weight.shape[0]) for name in ("q_proj", "k_proj", "v_proj"))
        heads, kv = q.shape[1] // width, k.shape[1] // width
        if k.shape != v.shape or heads % max(kv, 1):
            raise Other("its keys and values differ in shape")
        for name, y in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            self._matrix(own[name], x, y)
        for name, y, count in (("q_norm", q, heads), ("k_norm", k, kv)):
            if name in norms:
                weight, eps = weight_of(own[name])
                if weight.numel() not in (width, width * count):
                    raise Other("what is normed in its heads is no head")
                self.chain.norm(y, y, weight, eps)
            if getattr(attention, "use_rope", True):
                self.chain.rotate(y, count, *self.turns, self.lengths)
        self.stores.append(torch.empty(len(x), 2, self.capacity, kv, width))
        out = self._buffer("o", q.shape[1])
        self.chain.attend(q, k, v, out, self.stores[-1], self.table, self.lengths, heads, scale)
        return self._multiplied(own["o_proj"], out)

    def _feed_forward(self, mlp: Any, x: Tensor) -> Tensor:
        parts = parts_of(mlp)
        if parts is None or isinstance(mlp, Carrier):
            raise Other(f"a {type(mlp).__name__} is no feed-forward sublayer that is known")
        inner = parts.shape[0]
        up, y = self._buffer("up", 2 * inner if parts.halves else inner), self._buffer("inner", inner)
        self._matrix(getattr(mlp, parts.up), x, up)
        g, u = (up, None) if not parts.halves else (up[:, :inner], up[:, inner:])
        if parts.gate is not None:
            g, u = self._buffer("gate", inner), up
            self._matrix(getattr(mlp, parts.gate), x, g)
        self.chain.gate(g, u, y, name_of(parts.act))
        return self._multiplied(getattr(mlp, parts.down), y)

    def _norm(self, module: Any, x: Tensor) -> Tensor:
        y = self._buffer("normed", x.shape[1])
        self.chain.norm(x, y, *weight_of(module))
        return y

    def _multiplied(self, module: Any, x: Tensor) -> Tensor:
        y = self._buffer("out", module.weight.shape[0])
        self._matrix(module, x, y)
        return y

    def _matrix(self, module: Any, x: Tensor, y: Tensor) -> None:
        """y = x Wᵀ + b, with what lies over it."""
        if not isinstance(module, Adapted) and type(module) not in (nn.Linear, Tied):
            raise Other(f"a {type(module).__name__} is no matrix")
        W, bias = module.weight, module.bias
        if isinstance(W, QTensor):
            table = W.table()
            if table is None:
                raise Other(f"the kernels have no form of {W.format}")
            self.chain.product(x, table, y, W.dtype in NEAR)
        elif W.dtype in DTYPES:
            self.chain.dense(x, W.detach().contiguous(), y)
        else:
            raise Other(f"a matrix of {W.dtype}")
        if isinstance(module, Adapted):
            bias = module.stack(torch.float32).bias
            for name in module.active:
                if module.kinds[name].form != "product":
                    raise Other(f"a {type(module.kinds[name]).__name__} is no product")
                L, R = cast(Any, module.kinds[name]).lowrank(module.tensors(name, torch.float32))
                self.chain.low_rank(x, y, L.detach(), R.detach().contiguous())
        if bias is not None:
            self.chain.add(bias.detach().float().contiguous(), y)


def undisturbed(model: Any) -> None:
    """Raise Other where a forward is not what its class says, or not computed by the CPU."""
    for module in model.modules():
        if "forward" in vars(module) or hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks:
            raise Other(f"something looks on at a {type(module).__name__}")
    if any(p.device.type != "cpu" for p in model.parameters()) or getattr(model.config, "is_encoder_decoder", False):
        raise Other("it is no decoder on the CPU")
    if any(isinstance(host, Carrier) and host.place != "table" for _, host in all_hosts(model)):
        raise Other("an adapter lies over what is no matrix")


def weight_of(norm: Any) -> tuple[Tensor, float]:
    """The weight of an RMSNorm, which some hold less one, and its ε. Raises Other where it is none."""
    held, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(held, Tensor) or held.ndim != 1 or eps is None or getattr(norm, "bias", None) is not None:
        raise Other(f"a {type(norm).__name__} is no RMSNorm")
    with torch.no_grad():
        got = norm(torch.ones(1, len(held), dtype=held.dtype))[0].float() * math.sqrt(1 + eps)
    weight = held.detach().float().contiguous()
    for found in (weight, 1 + weight):
        if torch.allclose(got, found, rtol=2e-2, atol=1e-3):
            return found, float(eps)
    raise Other(f"a {type(norm).__name__} is no RMSNorm")


ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def name_of(act: Any) -> str:
    """Which of the kernels' activations a function is. Raises Other where it is none.

    >>> name_of(torch.nn.functional.silu)
    'silu'
    """
    x = torch.linspace(-4, 4, 65)
    with torch.no_grad():
        y = act(x.clone())
    found = next((name for name, own in ACTS.items() if torch.allclose(y, own(x), atol=1e-5)), None)
    if found is None:
        raise Other("its activation is another")
    return found
