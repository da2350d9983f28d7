"""Convolutions are products with the windows of their inputs: every adapter lies over them as over a linear, and PEFT has the same ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import finebits as fb
from finebits import registry
from finebits.build import hosts
from finebits.export._peft import to_peft
from finebits.export.base import CannotHold, check_plan
from finebits.interop.linears import cuts, linearized
from finebits.interop.selecting import targets
from finebits.interop.tally import Tally
from finebits.linears import as_stored
from finebits.qtensor import dense
from finebits.tensorfile import Entry, size, write

CONVOLUTIONS = [
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), (1, 2)),
    nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect", bias=False),
    nn.Conv2d(3, 5, 1, 2),
    nn.Conv1d(4, 6, 3, 2, 1, bias=False),
    nn.Conv1d(4, 6, 5, padding="same", dilation=2),
]


def resnet():
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(num_channels=2, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic")
    return ResNetModel(config).eval(), {"pixel_values": torch.randn(2, 2, 32, 32)}


def whisper():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    sizes = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=12)
    return WhisperEncoder(WhisperConfig(num_mel_bins=6, **sizes)).eval(), {"input_features": torch.randn(2, 6, 24)}


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_conv_pos_embeddings=4)
    heard = dict(conv_dim=(6, 8), conv_stride=(3, 2), conv_kernel=(5, 3), num_conv_pos_embedding_groups=2, feat_extract_norm="layer")
    return Wav2Vec2Model(Wav2Vec2Config(vocab_size=8, **sizes, **heard)).eval(), {"input_values": torch.randn(2, 80)}


MODELS = {"resnet": resnet, "wav2vec2": wav2vec2, "whisper": whisper}


def output(model, x):
    return model(**x).last_hidden_state


def over_all(model, adapter, format=None, init=None):
    """The model with such an adapter over all of its convolutions, its tensors away from their start."""
    names = [n for n, m in linearized(model).named_modules() if getattr(m, "window", None)]
    spec = fb.Spec(format, adapter=adapter, **({} if init is None else {"init": init}))
    model = fb.build(model, fb.Plan(dict.fromkeys(names, spec)))
    moved(model)
    return model, names


def moved(model):
    gen = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=gen)


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_a_convolution_is_a_product_with_the_windows_of_its_input(conv):
    """Forward and gradients, of batches and single inputs, where activations are kept and where they are computed again."""
    x = torch.randn(2, conv.in_channels, *(9, 11)[: len(conv.kernel_size)], generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = conv(x)
    g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    model = linearized(nn.Sequential(conv)).requires_grad_(True)
    leaves = [x, model[0].weight]
    theirs = torch.autograd.grad(wanted, [x, conv.weight], g)
    for forward in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        y = forward(x)
        torch.testing.assert_close(y, wanted)
        dx, dW = torch.autograd.grad(y, leaves, g)
        torch.testing.assert_close(dx, theirs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(as_stored(model[0], dW), theirs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0](x[0]), conv(x[0]))


def test_what_is_kept_of_windows_is_their_input():
    """Nine times the input at stride 1, were it the windows."""
    linear = linearized(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)))[0]
    host = fb.Adapted.over(linear)
    host.add("default", fb.LoRA(rank=2), torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 16, 16, requires_grad=True)
    with Tally() as tally:
        tally.known(x, *host.parameters())
        y = host(x)
    assert tally.most >= 9 * x.nbytes and tally.now == y.nbytes + 2 * 16 * 16 * 4  # what it gave, and x Aᵀ
    y.sum().backward()
    assert host.p["default"]["B"].grad is not None and "keeping" not in vars(linear)


def test_an_error_inside_leaves_nothing_behind():
    linear = linearized(nn.Sequential(nn.Conv2d(4, 4, 3)))[0].requires_grad_(True)
    with pytest.raises(RuntimeError):
        linear(torch.randn(1, 5, 8, 8))
    linear.weight.data = linear.weight.data[:, :7]
    with pytest.raises(RuntimeError):
        linear(torch.randn(1, 4, 8, 8))
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


ADAPTERS = [n for n in registry.names("adapters") if getattr(registry.load("adapters", n), "over", None) == "matrix" or n == "lora"]


@pytest.mark.parametrize("paper", ADAPTERS)
def test_every_adapter_over_windows_is_the_convolution_of_its_merged_weight(paper):
    kind = registry.load("adapters", paper)()
    if kind.itself or kind.form in ("beside", "codes"):
        pytest.skip("no weight beside the base")
    host = fb.Adapted.over(linearized(nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1)))[0])
    try:
        host.add("default", kind, torch.Generator().manual_seed(0))
    except ValueError as e:
        pytest.skip(str(e))
    moved(host)
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        W = as_stored(host, host.stack().weight)
        torch.testing.assert_close(host(x), F.conv2d(x, W, host.stack().bias, 2, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["resnet", "wav2vec2"])  # Whisper reads the strides of its layers, which PEFT's have not
@pytest.mark.parametrize("adapter", [fb.LoRA(rank=2, alpha=5.0), fb.DoRA(rank=2), fb.HiRA(rank=2)], ids=lambda a: type(a).__name__)
def test_peft_computes_the_same_and_back(kind, adapter, tmp_path):
    """Over dense bases in PEFT's own form, read by stock PEFT and by us again."""
    model, names = over_all(MODELS[kind]()[0], adapter)
    plain, x = MODELS[kind]()
    with torch.no_grad():
        wanted = output(model, x)
        assert (wanted - output(plain, x)).abs().max() > 1e-3
        config, tensors = to_peft(model, "base", own=True)
        config.save_pretrained(tmp_path)
        entries = {k: Entry.of(t) for k, t in tensors.items()}
        write(tmp_path / "adapter_model.safetensors", entries, {"format": "pt"})
        stock = PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(output(stock, x), wanted, rtol=1e-4, atol=1e-4)
        again = fb.load_peft(tmp_path, MODELS[kind]()[0])
        assert {n for n, host in hosts(again) if host.active} == set(names)
        torch.testing.assert_close(output(again, x), wanted, rtol=1e-4, atol=1e-4)
    assert size(entries, {"format": "pt"}) == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["resnet", "whisper"])
def test_a_quantized_base_and_what_stock_peft_trained(kind, tmp_path):
    """LoftQ's start over codes is portable; what PEFT has made is read over a base in codes."""
    model, names = over_all(MODELS[kind]()[0], fb.LoRA(rank=2), fb.NF(4, 16), fb.LoftQ())
    plain, x = MODELS[kind]()
    with torch.no_grad():
        for name, host in hosts(model):
            plain.get_submodule(name).weight.copy_(as_stored(host, host.stack().weight))
        torch.testing.assert_close(output(model, x), output(plain, x), rtol=1e-4, atol=1e-4)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=sorted(names), init_lora_weights=False)
    theirs = get_peft_model(MODELS[kind]()[0], config).eval()
    theirs.save_pretrained(tmp_path)
    base = fb.build(linearized(MODELS[kind]()[0]), fb.Plan(dict.fromkeys(names, fb.Spec(fb.Int(8, 16)))))
    ours = fb.load_peft(tmp_path, base)
    with torch.no_grad():
        for name, host in hosts(ours):
            own = theirs.base_model.model.get_submodule(name)
            torch.testing.assert_close(as_stored(host, host.stack().weight - dense(host.weight)), own.get_delta_weight("default"))


def test_what_peft_has_not_is_said(tmp_path):
    for conv, has in (
        (nn.Conv2d(2, 4, 3, dilation=2), r"dilation \(2, 2\)"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), "circular"),
    ):
        model, _ = over_all(nn.Sequential(conv), fb.LoRA(rank=2))
        for own in (True, False):
            with pytest.raises(fb.errors.Invalid, match=f"0 is a convolution with .*{has}.*: export target merged"):
                to_peft(model, "base", own=own)
    model, _ = over_all(nn.Sequential(nn.Conv2d(2, 4, 3)), fb.VeRA(rank=2))
    with pytest.raises(fb.errors.Invalid, match="PEFT's VERA lies over none: export target adapter"):
        to_peft(model, "base", own=True)
    assert to_peft(model, "base")[1]["base_model.model.0.lora_A.weight"].shape[1:] == (2, 3, 3)
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    assert not cuts(grouped) and linearized(nn.Sequential(grouped))[0] is grouped


def test_what_cannot_be_is_said_while_planning():
    spec = fb.Spec(None, adapter=fb.LoRA(rank=2))
    cost = {"shape": [4, 18], "stored": [4, 2, 3, 3]}
    plan = fb.Plan({"conv": spec}, costs={"conv": cost | {"windows": "dilation (2, 2)"}})
    check_plan(plan, ["merged"])
    with pytest.raises(CannotHold, match=r"no dilation \(2, 2\), as conv has: targets that can: merged"):
        check_plan(plan, ["adapter"])
    check_plan(fb.Plan({"conv": spec}, costs={"conv": cost}), ["adapter", "peft"])
    with pytest.raises(CannotHold, match="conv is a convolution, and PEFT's VERA lies over none; targets that can: adapter, merged"):
        check_plan(fb.Plan({"conv": fb.Spec(None, adapter=fb.VeRA(rank=2))}, costs={"conv": cost}), ["peft"])
    model = nn.ModuleDict({"a": nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=4)}), "b": nn.ModuleDict({"conv": nn.Linear(4, 4)})})
    with pytest.raises(fb.errors.Invalid, match="names conv, and a.conv is none: its class is Conv2d, whose channels are in 4 groups"):
        targets(model, ["conv"])
