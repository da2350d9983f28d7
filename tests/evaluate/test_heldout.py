import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finebits as fb
import tiny_llama as tiny
from finebits.evaluate import heldout
from finebits.evaluate.heldout import Scores, score, table, teacher
from finebits.tasks import causal_lm


def full(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float(), batch["labels"][:, 1:]


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_scores_are_those_of_the_full_logits(chunk):
    model, reference, batches = tiny.tuned(tiny.plan()), tiny.fresh(), tiny.batches()
    got = score(model, batches, teacher(reference, batches, dtype=torch.float32), chunk=chunk)
    nll, tokens, kl, agree = [], [], [], []
    for b in batches:
        (q, y), (p, _) = full(model, b), full(reference, b)
        keep = y != -100
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        nll += ((F.cross_entropy(q.transpose(1, 2), y, reduction="none")) * keep).sum(1).tolist()
        kl += ((log_p.exp() * (log_p - log_q)).sum(-1) * keep).sum(1).tolist()
        agree += ((p.argmax(-1) == q.argmax(-1)) & keep).sum(1).tolist()
        tokens += keep.sum(1).tolist()
    np.testing.assert_allclose(got.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(got.kl, kl, rtol=1e-4)
    assert got.tokens.tolist() == tokens and got.agree.tolist() == agree
    assert got.loss == pytest.approx(sum(nll) / sum(tokens))


def test_kl_to_oneself_is_zero():
    for dtype in (torch.bfloat16, torch.float32):
        model, batches = tiny.fresh(dtype=dtype), tiny.batches()
        got = score(model, batches, teacher(model, batches))
        assert got.kl.sum() / got.tokens.sum() < (1e-12 if dtype == torch.bfloat16 else 1e-3)  # float32 states are held in bf16
        assert dtype == torch.float32 or (got.agree == got.tokens).all()


def test_the_teacher_outlives_the_quantization_of_its_model():
    model, batches = tiny.fresh(tie_word_embeddings=False), tiny.batches()
    seen = teacher(model, batches)
    wanted = score(tiny.fresh(seed=4), batches, seen).kl
    plan = tiny.plan()
    head = fb.Spec(format=fb.NF(2, block=32))
    tiny.tuned(fb.Plan({**plan.modules, "lm_head": head}, levers=plan.levers), model)
    np.testing.assert_array_equal(score(tiny.fresh(seed=4), batches, seen).kl, wanted)


def test_a_quantized_head_is_scored():
    plan = tiny.plan()
    plan = fb.Plan({**plan.modules, "lm_head": fb.Spec(format=fb.Int(4), adapter=fb.LoRA(rank=2))}, levers=plan.levers)
    model, batches = tiny.tuned(plan, tiny.fresh(tie_word_embeddings=True)), tiny.batches()
    got = score(model, batches)
    q, y = full(model, batches[0])
    wanted = F.cross_entropy(q.transpose(1, 2), y, reduction="none", ignore_index=-100).sum(1)
    np.testing.assert_allclose(got.nll[:3], wanted, rtol=1e-5)


def test_states_in_a_file_score_the_same(tmp_path):
    model, batches = tiny.fresh(), tiny.batches()
    other = tiny.fresh(seed=1)
    held, filed = teacher(other, batches), teacher(other, batches, file=tmp_path / "t" / "states.safetensors")
    a, b = score(model, batches, held), score(model, batches, filed)
    np.testing.assert_array_equal(a.kl, b.kl)
    labelled = sum(int((x["labels"][:, 1:] != -100).sum()) for x in batches)
    assert sum(t.nbytes for t in held.states) == labelled * 64 * 2
    assert (tmp_path / "t" / "states.safetensors").stat().st_size < labelled * 64 * 2 + 300


def test_modes_are_put_back():
    model = tiny.fresh().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    score(model, tiny.batches())
    assert [m.training for m in model.modules()] == before


def test_no_full_logits_exist(monkeypatch):
    largest = 0
    linear = F.linear

    def watched(x, w, b=None):
        nonlocal largest
        out = linear(x, w, b)
        if w.shape[0] == 128:
            largest = max(largest, out.shape[0])
        return out

    model, batches = tiny.fresh(), tiny.batches()
    seen = teacher(model, batches)
    monkeypatch.setattr(
        heldout, "_parts", lambda model, hidden, head, batches: (heldout.backbone(model), heldout.head_of(causal_lm.head(model)))
    )
    monkeypatch.setattr(F, "linear", watched)
    score(model, batches, seen, chunk=4)
    assert largest == 4


def test_a_model_with_unknown_logits_is_refused():
    model = tiny.fresh()
    forward = model.forward
    model.forward = lambda *a, **k: _bent(forward(*a, **k))
    with pytest.raises(ValueError, match="between its last hidden state and its logits"):
        score(model, tiny.batches())
    assert score(model, tiny.batches(), hidden=heldout.backbone(model), head=lambda h: model.lm_head(h).float().sin()).tokens.sum() > 0


def _bent(out):
    out.logits = out.logits.sin()
    return out


def test_other_batches_than_the_teacher_saw():
    model = tiny.fresh()
    seen = teacher(model, tiny.batches(rows=6))
    with pytest.raises(ValueError, match="the teacher saw 2 batches and 3"):
        score(model, tiny.batches(rows=9), seen)
    with pytest.raises(ValueError, match="other batches"):
        score(model, tiny.batches(rows=5), seen)
    with pytest.raises(ValueError, match="no held-out batches"):
        score(model, [])
    with pytest.raises(ValueError, match="nothing can be scored"):
        score(model, [b | {"labels": torch.full_like(b["labels"], -100)} for b in tiny.batches()])


# The table ------------------------------------------------------------------------------------------------------------------------------


def made(shift=0.0, rows=40, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 30, rows).astype(float)
    nll = tokens * (2 + 0.3 * np.random.default_rng(seed + 1).standard_normal(rows))
    return Scores(nll + shift * tokens, tokens, 0.1 * tokens + shift * tokens, np.floor(0.8 * tokens))


KEYS = {"full": "start", "zeros": "tuned", "loftq": "tuned", "lora16": "tuned", "export": "export"}


def whole(**shifts):
    scores = {k: made(shifts.get(k, 0.0)) for k in KEYS}
    return table(scores, {k: k.upper() for k in KEYS}, KEYS, {"zeros": "full", "loftq": "zeros"})


def test_means_are_token_weighted_and_gaps_are_shares():
    t = whole(zeros=-0.3, loftq=-0.5, lora16=-1.0)
    entry = {e["key"]: e for e in t["entries"]}
    s = made()
    assert t["schema"] == "finebits.evaluation/1" and t["rows"] == 40 and t["tokens"] == int(s.tokens.sum())
    assert entry["full"]["loss"] == pytest.approx(s.nll.sum() / s.tokens.sum())
    assert entry["full"]["perplexity"] == pytest.approx(math.exp(entry["full"]["loss"]))
    assert entry["full"]["top1"] == pytest.approx(s.agree.sum() / s.tokens.sum())
    closed = [entry[k]["gap_closed"] for k in KEYS]
    assert closed[0] is None and closed[4] is None
    assert closed[1:4] == pytest.approx([0.3, 0.5, 1.0])


def test_pairing_removes_what_the_rows_share():
    entry = {e["key"]: e for e in whole(zeros=-0.3, loftq=-0.5)["entries"]}
    low, high = entry["zeros"]["intervals"]["loss"]
    assert high - low > 0.05  # rows differ
    assert entry["zeros"]["paired"]["against"] == "full"
    assert entry["loftq"]["paired"]["loss"] == pytest.approx([-0.2, -0.2, -0.2])  # and their difference does not
    assert entry["full"]["paired"] is None


def test_the_interval_covers():
    """95% intervals of 100 samples of 60 rows cover the mean about 95 times."""
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        s = Scores(10 * (2 + 0.3 * rng.standard_normal(60)), np.full(60, 10.0))
        low, high = table({"full": s}, {"full": ""}, {"full": "start"})["entries"][0]["intervals"]["loss"]
        hits += low <= 2 <= high
    assert 86 <= hits <= 100


def test_the_table_is_seeded_and_json():
    import json

    assert json.dumps(whole(), allow_nan=False) == json.dumps(whole(), allow_nan=False)
    s = Scores(np.array([1e4, 1e4]), np.array([1.0, 1.0]))
    e = table({"full": s}, {"full": ""}, {"full": "start"})["entries"][0]
    assert e["perplexity"] is None and e["kl"] is None and e["intervals"]["kl"] is None


def test_few_rows_have_no_intervals():
    few = {k: made(shift, rows=19) for k, shift in (("full", 0.0), ("zeros", -0.3))}
    entry = {e["key"]: e for e in table(few, KEYS, KEYS, {"zeros": "full"}, {"zeros": 3.1})["entries"]}
    assert entry["full"]["intervals"]["loss"] is None and entry["zeros"]["paired"]["loss"] == [pytest.approx(-0.3), None, None]
    assert entry["zeros"]["bits"] == 3.1 and entry["full"]["bits"] is None


def test_no_gap_where_sixteen_bit_training_did_not_improve():
    assert {e["gap_closed"] for e in whole(lora16=0.1)["entries"]} == {None}


def test_entries_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="loftq was not scored on the rows of full"):
        table({"full": made(), "loftq": made(rows=39)}, KEYS, KEYS)
    with pytest.raises(ValueError, match="compared with lora8, which was not scored"):
        table({"full": made(), "loftq": made()}, KEYS, KEYS, {"loftq": "lora8"})
