"""Which words of accelerate start ranks, and which are refused at once; its configurations in recipes/ are what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from finebits.errors import Invalid
from finebits.interop.launching import check_installed, parsed, shards
from finebits.interop.sharding import Shards

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "recipes" / "accelerate").glob("*.yaml")))
def test_configurations_are_read_by_accelerate(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    path = ROOT / "recipes" / "accelerate" / name
    config: Any = load_config_from_file(str(path))
    assert (config.distributed_type == DistributedType.FSDP) == (shards(parsed(["--config_file", str(path)], "cuda")) is not None)
    assert config.num_processes % config.num_machines == 0 and config.mixed_precision == "no"
    assert (config.distributed_type == DistributedType.DEEPSPEED) == name.startswith("deepspeed")
    assert parsed(["--config_file", str(path)], "cuda").config_file == str(path)
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == 1  # more would split weights that are in codes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_procs", "2", "--nonsense"], "accelerate launch --help"),
        (["--use_fsdp", "--num_processes", "2"], "add --fsdp_version 2"),
        (["--use_fsdp", "--fsdp_version", "2", "--fsdp_offload_params", "true"], "^fsdp_offload_params"),
        (["--use_fsdp", "--fsdp_version", "2", "--fsdp_activation_checkpointing", "true"], "training.gradient_checkpointing"),
        (["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "NO_WRAP"], "block by block"),
        (["--use_fsdp", "--fsdp_version", "2", "--mixed_precision", "bf16"], "^mixed_precision is bf16"),
        (["--use_megatron_lm"], "^--use_megatron_lm splits"),
        (["--cpu", "--num_processes", "2"], "by MPI alone"),
        (["stray.py"], "stray.py is none"),
    ],
)
def test_other_words_are_refused_at_once(words: list[str], said: str) -> None:
    with pytest.raises(Invalid, match=said):
        parsed(words, "cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "this is version 1"),
        ("distributed_type: FSDP\nfsdp_config: {version: 2, reshard_after_forward: 2}", "^fsdp_reshard_after_forward is 2"),
        ('{"distributed_type": "MEGATRON_LM"}', "^distributed_type: MEGATRON_LM of"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}", "^zero_stage: 3 of"),
        ("- a list", "no configuration of accelerate"),
        (None, "there is no such file"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_configuration_that_shards_in_another_way_is_refused_at_once(
    text: str | None, said: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named or left by `accelerate config`, which accelerate reads unasked."""
    file = tmp_path / "own.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    if text is not None:
        file.write_text(text)
    words = ["--num_processes", "2", *(["--config_file", str(file)] if named else [])]
    if text is None and not named:
        assert parsed(words, "cpu").multi_gpu
        return
    with pytest.raises(Invalid, match=said):
        parsed(words, "cpu")


def test_stages_of_zero_that_keep_weights_whole_are_let_through(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}")
    assert parsed(["--config_file", str(file)], "cuda").config_file == str(file)
    with pytest.raises(Invalid, match="--zero_stage 3 splits"):
        parsed(["--use_deepspeed", "--zero_stage", "3"], "cuda")


def test_words_and_configurations_cut_a_model_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false}")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    for words in ([], ["--config_file", str(file)], ["--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "false"]):
        assert shards(parsed(["--num_processes", "2", *words], "cpu")) == Shards(reshard=False)
    assert shards(parsed(["--num_processes", "2", "--multi_gpu"], "cpu")) is None


@pytest.mark.parametrize("words", [["--use_deepspeed"], ["--config_file", str(ROOT / "recipes" / "accelerate" / "deepspeed_zero1.yaml")]])
def test_deepspeed_is_looked_for_before_anything_is_made(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Invalid, match="pip install deepspeed"):
        check_installed(parsed(words, "cuda"))
    check_installed(parsed(["--use_fsdp", "--fsdp_version", "2"], "cuda"))
