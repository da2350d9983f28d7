"""Steps of native jobs against the model's own forward."""

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.build import hosts
from finebits.evaluate import generate, stepped
from finebits.evaluate.generate import Sampling, Streamer, continued
from finebits.kernels.cpu import program

if program.body() is None:
    pytest.skip("the CPU kernels are not compiled, or were before they had this", allow_module_level=True)

PROMPTS = [[5, 9, 11], [7, 3, 8, 60, 4], [12]]


def said(model, *args, **more):
    """What is said by steps, and by the model's own forward."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_stepped", lambda *given, own=generate._stepped: taken.append(True) or own(*given))
        by_steps = continued(model, *args, **more)
        patch.setattr(generate, "steps_of", lambda *given: None)
        return by_steps, continued(model, *args, **more), bool(taken)


def other(kind, **more):
    """A model of another architecture of transformers, as small."""
    import transformers

    config = getattr(transformers, f"{kind}Config")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")(config(**sizes | {"initializer_range": 0.15, "pad_token_id": 0} | more)).eval()
    gen = torch.Generator().manual_seed(1)
    for p in made.parameters():  # norms and biases that are not ones and zeros
        if p.ndim == 1:
            p.data += 0.2 * torch.randn(p.shape, generator=gen)
    return made


SPECS = {
    "nf2": {},
    "nf4": {"format": fb.NF(4, block=32)},
    "int8 without an adapter": {"format": fb.Int(8)},
    "3 bits under E4M3": {"format": fb.NF(3, block=32, scale="e4m3")},
    "dense": {"format": None, "init": fb.Zeros()},
}


@pytest.mark.parametrize("spec", SPECS)
def test_every_token_is_that_of_the_models_forward(spec):
    model = tiny.tuned(tiny.plan(**SPECS[spec]))
    if "without" in spec:
        for _, host in hosts(model):
            host.active = []
    ours, theirs, stepping = said(model, PROMPTS, 12, [])
    assert stepping and ours == theirs


@pytest.mark.parametrize(
    "kind, more", [("Qwen2", {}), ("Qwen3", {"head_dim": 32}), ("Mistral", {"sliding_window": None}), ("SmolLM3", {}), ("Phi", {})]
)
def test_other_architectures_step_or_are_left_alone(kind, more):
    ours, theirs, stepping = said(other(kind, **more), PROMPTS[:2], 10, [])
    assert ours == theirs and stepping == (kind != "Phi")


@pytest.mark.parametrize(
    "kind, more", [("Gemma", {"head_dim": 16}), ("Granite", {"residual_multiplier": 0.5, "logits_scaling": 3.0}), ("Cohere", {})]
)
def test_what_computes_otherwise_is_found_out(kind, more):
    """Scaled embeddings or residuals, norms of another kind: their parts have the same names."""
    ours, theirs, _ = said(other(kind, **more), PROMPTS, 8, [])
    assert ours == theirs


@pytest.mark.parametrize("more", [{"sliding_window": 8}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}])
def test_windows_and_turns_that_move_are_left_alone(more):
    kind = "Mistral" if "sliding_window" in more else "Llama"
    ours, theirs, stepping = said(other(kind, **more), PROMPTS, 8, [])
    assert ours == theirs and not stepping


def test_16_bits_agree_within_their_rounding():
    model = tiny.tuned(tiny.plan(dtype="bfloat16", format=fb.NF(4, block=32)))
    steps = stepped.steps_of(model, 1, 12)
    with torch.no_grad():
        assert steps is not None and steps.begin([[5, 9, 11, 4]]) is not None
        ids = [5, 9, 11, 4]
        for token in (7, 60, 3):
            ids.append(token)
            wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            assert float((steps([token])[0] - wanted).abs().max()) < 0.2 * float(wanted.std())


def test_draws_stops_and_streams_are_the_same():
    model, heard = tiny.tuned(tiny.plan()), []
    how = Sampling(temperature=1.0, top_p=0.9, seed=3)
    ours, theirs, stepping = said(model, PROMPTS, 8, [], how, ["a", "b", "c"])
    assert stepping and ours == theirs
    end = ours[0].ids[3]
    ours, theirs, _ = said(model, PROMPTS, 8, [end], how, ["a", "b", "c"])
    assert ours == theirs and any(c.stopped for c in ours)
    streamer = Streamer(heard.append)
    made = continued(model, PROMPTS[:1], 5, [], streamer=streamer)
    assert heard == made[0].ids and streamer.speed


def test_an_adapter_that_is_switched_speaks_for_itself():
    model = tiny.tuned(tiny.plan())
    with_it = continued(model, PROMPTS[:1], 8, [])
    for _, host in hosts(model):
        host.active = []
    ours, theirs, _ = said(model, PROMPTS[:1], 8, [])
    assert ours == theirs != with_it


@pytest.mark.parametrize("adapter", [fb.DoRA(rank=3), fb.Bottleneck(reduction=8)])
def test_an_adapter_that_is_no_product_goes_by_the_models_forward(adapter):
    model = tiny.tuned(tiny.plan(down_proj=fb.Spec(fb.NF(4, block=32), adapter=adapter)))
    ours, theirs, stepping = said(model, PROMPTS[:1], 6, [])
    assert not stepping and ours == theirs


def test_a_hook_is_not_passed_over():
    model, seen = tiny.tuned(tiny.plan()), []
    model.model.layers[0].mlp.register_forward_hook(lambda *given: seen.append(1))
    continued(model, PROMPTS[:1], 4, [])
    assert len(seen) == 4


def test_a_model_that_disagrees_is_not_tried_again(monkeypatch):
    model = tiny.tuned(tiny.plan())
    wanted = continued(model, PROMPTS, 6, [])
    monkeypatch.setattr(stepped, "name_of", lambda act: "relu")
    assert continued(model, PROMPTS, 6, []) == wanted
    assert model in stepped._disagreed and stepped.steps_of(model, 1, 9) is None
