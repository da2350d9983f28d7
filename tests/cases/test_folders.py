"""Other people's files, and runs that are stopped. Each kind has been met elsewhere; the reports are named where they are tried."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import finebits as fb
import tiny_llama as tiny
from finebits.interop.peft import export

SRC = str(Path(fb.__file__).parents[1])
RECIPE = """
model: {model_name_or_path: m, dtype: float32}
budget: {memory: 900MiB}
data: {datasets: [{path: d.jsonl}], held_out: {path: d.jsonl}, max_length: 32}
quantization: {candidates: [nf4-b32-bf16], objective: weight}
adapter: {rank: 4, init: zeros}
training: {max_steps: 2000, save_steps: 1000, per_device_train_batch_size: 2}
evaluation: {samples: 0, full_precision: false, compare: []}
export: {to: []}
output_dir: run
"""


def test_saving_and_exporting_keep_what_others_wrote(tmp_path: Path) -> None:
    """rafaelpadilla/Object-Detection-Metrics#83, scilus/scilpy#55: a results folder is emptied before it is written to."""
    model = tiny.tuned(tiny.plan())
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    (tmp_path / "thesis.txt").write_text("three years")
    for write in (lambda p: fb.save(model, p), lambda p: export(model, p, "adapter", base_name="tiny/llama")):
        place = tmp_path / str(len(os.listdir(tmp_path)))
        place.symlink_to(tmp_path / f"far{place.name}", target_is_directory=True)
        for _ in range(2):
            write(place)
            (place / "notes.txt").write_text("mine")
        assert (place / "notes.txt").read_text() == "mine" and place.is_symlink()
    fb.save(model, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years" and (tmp_path / ".git" / "HEAD").read_text() == "ref"


def wait(until: Callable[[], bool], seconds: int = 500) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.1)


def children(of: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(of)], capture_output=True, text=True).stdout
    return [int(n) for n in found.split()]


def test_a_run_is_stopped_refused_resumed_and_orphaned(tmp_path: Path) -> None:
    """vllm-project/vllm#34816: workers outlive a killed parent. meta-llama/llama-cookbook#380: a datasets.py in the current folder is imported.
    dssg/aequitas#166: a second run in a folder."""
    tiny.worded(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) + "\n" for i in range(1, 9)))
    (tmp_path / "r.yaml").write_text(RECIPE)
    for name in ("datasets", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    events, run = tmp_path / "run" / "runs" / "zeros" / "events.jsonl", tmp_path / "run"

    def begin(*more: str) -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": SRC, "FINEBITS_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-P", "-m", "finebits", "train", "r.yaml", *more], cwd=tmp_path, env=env)

    def steps() -> list[int]:
        told = [json.loads(line) for line in events.read_text().splitlines() if line.endswith("}")] if events.exists() else []
        return [e["step"] for e in told if e["event"] == "step"]

    job = begin()
    wait(lambda: len(steps()) >= 3 or job.poll() is not None)
    workers = children(job.pid)
    job.send_signal(signal.SIGTERM)
    assert job.wait(200) == 130 and workers and not any(Path(f"/proc/{w}").exists() for w in workers)
    last = steps()[-1]
    assert (run / "runs" / "zeros" / "checkpoints" / f"checkpoint-{last}" / "finebits.json").exists(), "it has saved"
    before = (run / "run.json").read_bytes()
    assert begin("training.learning_rate=0.1").wait() == 2 and (run / "run.json").read_bytes() == before

    job = begin("--resume")
    wait(lambda: steps()[-1] >= last + 3 or job.poll() is not None)
    assert last + 1 in steps(), "it goes on after the last checkpoint"
    workers = children(job.pid)
    job.kill()
    job.wait()
    wait(lambda: not any(Path(f"/proc/{w}").exists() for w in workers), 200)
