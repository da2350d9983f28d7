import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.build import hosts
from finebits.evaluate.exact import float32
from finebits.evaluate.generate import dense_weights, fixed, greedy


def bits(model):
    return {k: t.reshape(-1).view(torch.uint8).clone() for k, t in model.state_dict().items()}


@pytest.mark.parametrize("context", [dense_weights, fixed, float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_is_put_back(context, dtype):
    model = tiny.tuned(tiny.plan(fb.Gated(rank=3), dtype=dtype, k_proj=fb.Spec(format=fb.Int(4)))).train()
    before, out = bits(model), tiny.logits(model)
    held = {n: (h.weight, list(h.__dict__)) for n, h in hosts(model)}
    with pytest.raises(KeyError), context(model):
        tiny.logits(model)
        raise KeyError
    after = bits(model)
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(out, tiny.logits(model))
    assert all(h.weight is held[n][0] and list(h.__dict__) == held[n][1] for n, h in hosts(model))


def test_dense_weights_compute_the_same():
    model = tiny.tuned(tiny.plan(q_proj=fb.Spec(format=fb.Int(4)), v_proj=fb.Spec(adapter=fb.LoRA(rank=3))))
    out = tiny.logits(model)
    with dense_weights(model):
        torch.testing.assert_close(tiny.logits(model), out, atol=1e-4, rtol=1e-4)
        assert "forward" in vars(next(hosts(model))[1])


def test_float32_is_the_same_weights_in_wider_arithmetic():
    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    wide = tiny.fresh(dtype=torch.bfloat16).float()
    for name, host in hosts(model):
        p = host.p["default"]
        W = host.weight.dequantize(torch.bfloat16).float() + host.kinds["default"].s * p["B"] @ p["A"]
        wide.get_submodule(name).weight.data = W.detach()
    with float32(model):
        out = tiny.logits(model)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, tiny.logits(wide), atol=1e-4, rtol=1e-4)


def test_greedy_is_the_argmax_chain_and_stops():
    model = tiny.tuned(tiny.plan())
    prompts = [[5, 9, 11], [7, 3, 8, 60, 4]]
    ids = list(prompts[0])
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    made = greedy(model, prompts, 6, stop=[])
    assert all(greedy(model, prompts, 6, stop=[], room=room) == made for room in (0, 40_000)), "packed weights answer alike"
    with dense_weights(model, room=40_000):
        assert 0 < sum("forward" in vars(h) for _, h in hosts(model)) < len(list(hosts(model))), "what has room is dense"
    assert made[0] == ids[3:] and len(made[1]) == 6
    end = ids[5]
    assert greedy(model, prompts[:1], 6, stop=[end])[0] == ids[3 : ids.index(end, 3)]
    assert all("forward" not in vars(h) for _, h in hosts(model))


def test_a_host_whose_adapter_has_no_dense_form_stays_as_it_is():
    model = tiny.tuned(tiny.plan(down_proj=fb.Spec(fb.NF(4, block=32), adapter=fb.Bottleneck(reduction=8))))
    with dense_weights(model):
        assert {n.rpartition(".")[2] for n, h in hosts(model) if "forward" not in vars(h)} == {"down_proj"}
    assert len(greedy(model, [[5, 9, 11]], 4, stop=[])[0]) == 4
