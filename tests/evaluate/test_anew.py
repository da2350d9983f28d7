"""What `finebits eval` measures anew: whom it compares, and what it refuses; answers to files; conversations."""

import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # chatty
import pytest

import chatty
import finebits as fb
from finebits.errors import Invalid
from finebits.evaluate.generate import Sampling
from finebits.files import Occupied
from finebits.report.text import measured_anew
from finebits.run.answering import How, answer, encoded, prompts
from finebits.run.evaluating import Asked, evaluate
from finebits.run.places import place_of
from finebits.run.talking import Talk


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model m, two adapters of it, a saved model, rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from finebits.interop.selecting import meta, targets

    place = tmp_path_factory.mktemp("anew")
    chatty.model(place / "m")
    chatty.written(place / "rows.jsonl", chatty.rows(24))
    for name in ("a", "b"):
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(place / "m"), config).save_pretrained(place / name)
    spec = fb.Spec(fb.NF(4, block=32), adapter=fb.LoRA(rank=2))
    plan = fb.Plan(dict.fromkeys(targets(meta(place / "m"), "all-linear"), spec), model=str(place / "m"))
    fb.save(fb.load_planned(plan)[0], place / "saved")
    (place / "judge.py").write_text("def length(rows, answers): return [min(len(a), 8) / 8 for a in answers]\n")
    return place


def entries(result):
    return {e["key"]: e for e in result["entries"]}


def test_a_base_its_adapters_and_the_same_by_stock_libraries(place):
    asked = Asked(place / "rows.jsonl", (str(place / "a"), str(place / "b")), (str(place / "a"),), out=place / "out.json")
    result, path = evaluate(str(place / "m"), asked)
    found = entries(result)
    assert list(found) == ["none", "a", "b", "also"] and found["none"]["kl"] == 0 and found["none"]["top1"] == 1
    assert found["a"]["loss"] == pytest.approx(found["also"]["loss"], abs=1e-5), "peft's own reading of the folder says the same"
    assert found["a"]["paired"]["against"] == "none" and len(found["a"]["paired"]["loss"]) == 3 and found["a"]["intervals"]["loss"]
    assert json.loads(path.read_text())["entries"] == result["entries"]
    (place / "theirs.json").write_text("{}")
    with pytest.raises(Occupied):
        evaluate(str(place / "m"), Asked(place / "rows.jsonl", limit=1, out=place / "theirs.json"))


def test_answers_another_text_and_a_judge(place):
    asked = Asked(place / "rows.jsonl", limit=3, forgetting="python", generate=True, match="number", judge=f"{place / 'judge.py'}:length")
    result, path = evaluate(str(place / "saved"), Asked(**vars(asked) | {"max_new_tokens": 4, "max_length": 64}))
    assert path is None and result["rows"] == 3 and "decides nothing" in result["verdict"]
    assert {e["key"]: e["intervals"]["loss"] for e in result["entries"]} == {"none": None, "tuned": None}
    assert result["forgetting"]["rows"] == 3 and len(result["forgetting"]["entries"]) == 2
    assert [(m["name"], m["measure"], m["rows"]) for m in result["measures"]] == [("rows", "number", 3), ("rows", "judge", 3)]
    shown = result["answers"][0]["rows"][0]
    assert shown["reference"] == "it is 0" and set(shown["answers"]) == {"none", "tuned"}
    assert result["measures"][1]["entries"][1]["paired"]["difference"][0] == 0, "an adapter that starts at zero says what its base says"


def test_of_a_pair_the_better_answer_is_scored_and_both_are_compared(place):
    """Of judged answers that are no pairs those that are wanted."""
    say = lambda i, k: {"prompt": f"say {i}", "completion": f"it is {k * i}"}  # noqa: E731
    chosen, pairs, judged = (place / f"{name}.jsonl" for name in ("chosen", "pairs", "judged"))
    chatty.written(chosen, [say(i, 7) for i in range(1, 6)])
    chatty.written(pairs, [{"prompt": f"say {i}", "chosen": f"it is {7 * i}", "rejected": f"it is {55 * i}"} for i in range(1, 6)])
    chatty.written(judged, [say(i, k) | {"label": k == 7} for k in (7, 55) for i in range(1, 6)])
    found = {}
    for file in (chosen, pairs, judged):
        found[file.stem] = evaluate(str(place / "m"), Asked(file, (str(place / "a"),), out=place / "p.json"))[0]
    for name in ("pairs", "judged"):
        assert found[name]["rows"] == 5 and found[name]["tokens"] == found["chosen"]["tokens"]
        for ours, theirs in zip(found[name]["entries"], found["chosen"]["entries"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5) and ours["kl"] == pytest.approx(theirs["kl"], abs=1e-5)
        assert any("5 answers that were wanted, of 10" in note for note in found[name]["notes"])
    tuned = entries(found["pairs"])["a"]["preference"]
    assert 0 <= tuned["accuracy"][0] <= 1 and tuned["margin"][0] != entries(found["pairs"])["none"]["preference"]["margin"][0]
    assert "preference" not in entries(found["judged"])["a"] and "Preferences on held-out rows" in measured_anew(found["pairs"])


@pytest.mark.parametrize(
    ("what", "asked", "said"),
    [
        ("m", {}, "name rows with --data"),
        ("m", {"data": "rows.jsonl", "judge": "json:loads"}, "add --generate"),
        ("m", {"data": "rows.jsonl", "against": "m", "limit": 2, "match": "near"}, "answers are matched by"),
        ("m", {"against": "saved", "suites": ()}, "--against compares two runs"),
        ("m", {"data": "rows.jsonl", "adapters": ("a", "a")}, "rename one"),
        ("m", {"forgetting": "absent.txt"}, "not there"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(place, monkeypatch, what, asked, said):
    monkeypatch.chdir(place)
    monkeypatch.setattr("finebits.run.contestants._speaking", None)
    data = Path(asked.pop("data")) if "data" in asked else None
    with pytest.raises(Invalid, match=said):
        evaluate(what, Asked(data, **asked))


def test_places_are_told_apart(place):
    kinds = {"m": "model", "a": "peft", "saved": "saved", "package:x": "model"}
    assert {name: place_of(str(place / name) if ":" not in name else name).kind for name in kinds} == kinds
    with pytest.raises(Invalid, match="adapter of its own"):
        place_of(str(place / "saved")).voices([str(place / "a")])


def test_answers_to_a_file_go_on_where_they_stopped(place, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "say 1"}\n"say 2"\n' + json.dumps(chatty.rows(3)[2]) + "\n")
    asked = prompts(tmp_path / "p.jsonl", system="be brief")
    assert [p.text for p in asked] == ["say 1", "say 2", "say 2"] and asked[2].reference == "it is 14"
    assert all(p.messages[0] == {"role": "system", "content": "be brief"} for p in asked)
    voices, how, out = place_of(str(place / "m")).voices([str(place / "a")]), How(6, Sampling(1.0, 0.9, 5), 2), tmp_path / "o.jsonl"
    assert answer(voices, asked, out, how, "m")["kept"] == 0
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    for stop, kept in ((len(lines[0]), 1), (len(lines[0]) + 20, 1), (len(whole), 3), (3, 0)):
        out.write_text(whole[:stop])
        assert answer(voices, asked, out, how, "m")["kept"] == kept and sorted(out.read_text().splitlines(keepends=True)) == sorted(lines)
    assert json.loads(lines[2])["reference"] == "it is 14"
    with pytest.raises(Occupied, match="other settings"):
        answer(voices, asked, out, How(7, how.sampling, 2), "m")
    out.write_text("mine\n")
    with pytest.raises(Occupied, match="no answer that finebits wrote"):
        answer(voices, asked, out, how, "m")
    for text, said in (
        ("{", "not JSON"),
        ("[]", "a prompt is"),
        ('{"x": 1}', "a prompt is"),
        ('{"messages": [1]}', "role and content"),
        ("", "no prompt"),
        ('"say 1"\n""', ":2: a prompt is"),
        ('{"prompt": "\\ud83d"}', ":1 holds .ud83d, half of a character"),
    ):
        (tmp_path / "q.jsonl").write_text(text)
        with pytest.raises(Invalid, match=said):
            prompts(tmp_path / "q.jsonl")


def test_an_instruction_is_asked_with_its_input(tmp_path):
    """As it is trained on: without its input it is another question."""
    row = {"instruction": "add", "input": "1, 2", "output": "3", "system": "be brief"}
    (tmp_path / "p.json").write_text(json.dumps([row, row | {"input": "", "system": ""}]))
    one, other = prompts(tmp_path / "p.json")
    assert [m["content"] for m in one.messages] == ["be brief", "add\n\n1, 2"] and one.reference == "3"
    assert [m["content"] for m in other.messages] == ["add"]


class Keyboard(io.StringIO):
    """An output in front of which somebody presses Ctrl-C after the first piece."""

    def write(self, text):
        if text.strip() and not self.getvalue().strip():
            super().write(text)
            raise KeyboardInterrupt
        return super().write(text)


def test_a_conversation(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    voices = place_of(str(place / "m")).voices([str(place / "a"), str(place / "b")])
    talk = Talk(voices, Sampling(), 5, out=io.StringIO())
    assert talk.said("say 1") and talk.said("say 2") and len(talk.turns) == 4
    first = talk.turns[1]["content"]
    assert talk.out.getvalue().startswith(first.splitlines()[0][:1]) and "tokens/s" in capsys.readouterr().err
    talk.said("/system be brief")
    talk.said("/side")
    talk.said("/adapter b")
    talk.said("say 3")
    assert talk.out.getvalue().index("[none]") < talk.out.getvalue().index("[b]") and voices.speaking == "b"
    talk.said("/save c.jsonl")
    row = json.loads(Path("c.jsonl").read_text())["messages"]
    assert [m["role"] for m in row] == ["system"] + ["user", "assistant"] * 3
    for wrong, said in (
        ("/save c.jsonl", "is there already"),
        ("/adapter x", "no adapter 'x'"),
        ("/nothing", "/help shows"),
        ("/save", "name a file"),
    ):
        assert talk.said(wrong) and said in capsys.readouterr().err
    talk.said("/reset")
    talk.said("/side")
    talk.said("/adapter a")
    talk.system = None
    talk.said("say 1")
    assert talk.turns[1]["content"] == first and not talk.said("/quit")
    stopped = Talk(voices, Sampling(), 50, out=Keyboard())
    assert stopped.said("say 1") and len(stopped.turns) == 2 and "(stopped)" in capsys.readouterr().err, "Ctrl-C ends the answer alone"


def test_a_model_without_a_template_takes_one_text_at_a_time():
    words = chatty.tokenizer(chat=None)
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert encoded(turns[:1], words) == list(words("ab")["input_ids"])
    with pytest.raises(Invalid, match="no chat template"):
        encoded(turns, words)
