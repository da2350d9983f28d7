"""Where adapters lie when a recipe names no modules."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

import finebits as fb
from architectures import MORE, folder
from finebits.interop.planning import plan_model
from finebits.interop.roles import roles
from finebits.interop.selecting import Mistake, meta, targets

pytestmark = pytest.mark.filterwarnings("ignore")
SAME = (
    "llama",
    "gpt2",
    "bloom",
    "mistral",
    "mixtral",
    "gpt_neox",
    "falcon",
)  # it forgets keys of some others, and takes them twice of BERT
ODD = {  # what PEFT's table does not say
    "minicpm3": {
        "kv_a_proj_with_mqa": "keys",
        "kv_b_proj": "keys values",
        "o_proj": "attention_output",
        "down_proj": "feed_forward_output",
    },
    "mamba": {"in_proj": "", "x_proj": "", "dt_proj": "", "out_proj": "feed_forward_output"},
    "gemma2": {"q_proj": "queries", "k_proj": "keys", "v_proj": "values", "o_proj": "attention_output", "down_proj": "feed_forward_output"},
    "openai-gpt": {"c_attn": "keys queries values", "attn.c_proj": "attention_output", "mlp.c_proj": "feed_forward_output"},
    "modernbert-decoder": {"attn.Wo": "attention_output", "mlp.Wo": "feed_forward_output", "mlp.Wi": ""},
}


def seen(path, kind):
    shell = meta(folder(path, kind, MORE[kind]))
    names = [name for name, shape in targets(shell, "all-linear").items() if len(shape) == 2]
    return names, roles(shell, names)


@pytest.mark.parametrize("kind", SAME)
def test_ia3_lies_where_peft_puts_it(kind, tmp_path):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as THEIRS

    path = folder(tmp_path, kind, MORE[kind])
    plan = plan_model(str(path), None, fast=True, adapter=fb.IA3(), candidates=["nf4-b32"], max_length=16)
    in_blocks = [name for name in plan.modules if re.search(r"\.\d+\.", name) and ".experts." not in name]  # PEFT's reach none of those
    wanted = {name for name in in_blocks if any(name.endswith(f".{e}") for e in THEIRS[kind])}
    assert {name for name in in_blocks if plan.modules[name].adapter is not None} == wanted
    assert all(
        (spec.adapter.side == "input") == (not re.search("k|v|attn", name.rpartition(".")[2]))
        for name, spec in plan.modules.items()
        if spec.adapter
    )


@pytest.mark.parametrize("kind", ODD)
def test_a_role_is_what_a_matrix_does(kind, tmp_path):
    names, found = seen(tmp_path, kind)
    said = defaultdict(set)
    for name in names:
        for ending in ODD[kind]:
            if name.endswith(f".{ending}"):
                said[ending].add(" ".join(sorted(found.get(name, ()))))
    assert said == {ending: {does} for ending, does in ODD[kind].items()}


def test_places_of_bottlenecks_and_what_a_recipe_names(tmp_path):
    path = str(folder(tmp_path, "llama", {}))

    def adapted(adapter, **more):
        plan = plan_model(path, None, fast=True, adapter=adapter, candidates=["nf4-b32"], max_length=16, **more)
        assert all(spec.format is not None for spec in plan.modules.values())
        return {name.rpartition(".")[2] for name, spec in plan.modules.items() if spec.adapter is not None}, plan

    houlsby, plan = adapted(fb.Bottleneck())
    assert houlsby == {"o_proj", "down_proj"} and len(plan.modules) == 14 and "4 of 14 matrices" in plan.notices[0]
    assert adapted(fb.Bottleneck(after="feed_forward"))[0] == {"down_proj"}
    assert adapted(fb.Bottleneck(), layers_to_transform=[1])[0] == houlsby
    named, plan = adapted(fb.Bottleneck(), target_modules=["q_proj"])
    assert named == {"q_proj"} and len(plan.modules) == 2 and not plan.notices
    everywhere, plan = adapted(fb.IA3(), target_modules="all-linear")
    assert len(everywhere) == 7
    assert adapted(fb.LoRA(rank=4))[1].modules == adapted(fb.LoRA(rank=4), target_modules="all-linear")[1].modules


def test_a_model_without_the_place_is_refused(tmp_path):
    path = str(folder(tmp_path, "llama", {}))
    with pytest.raises(Mistake, match=r"IA3 lies over feed forward output and keys and values, and no planned matrix .* target_modules"):
        plan_model(path, None, fast=True, adapter=fb.IA3(), exclude_modules=["k_proj", "v_proj", "down_proj"], max_length=16)
