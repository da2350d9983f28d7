"""The live page: solved again over HTTP, and dragged in a real browser where one is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import finebits as fb  # noqa: E402
from finebits.interop.planning import Settings, plan_model  # noqa: E402
from finebits.plan.base import Plan  # noqa: E402
from finebits.serve.studio import app, plan_at  # noqa: E402
from listening import Listening  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CONFIG = Path(__file__).parent.parent / "data" / "configs" / "llama-3.2-3b"


@pytest.fixture(scope="module")
def plan() -> Plan:
    given = Settings(
        formats=tuple(fb.NF(b, 64, "bf16") for b in (2, 3, 4)),
        device="cuda",
        dtype="bfloat16",
        left_out=("export",),
        max_length=1024,
        reserve=0.0,
        per_device_train_batch_size=4,
    )
    return plan_model(CONFIG, "6GiB", None, given, fast=True)


ASK = """
<script>
const found = {errors: []}, wait = ms => new Promise(done => setTimeout(done, ms));
addEventListener("error", e => found.errors.push(e.message));
const tile = i => document.querySelectorAll("#headline strong")[i].textContent;
const shades = () => [...document.querySelectorAll("g.cells")].map(g => [g.classList[1], g.querySelectorAll("rect").length]);
async function drag(value) {
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
  await wait(60);
  for (let i = 0; i < 200 && asking; i++) await wait(50);
}
(async () => {
  found.first = [tile(0), tile(2), shades()];
  await drag(4.4 * 2 ** 30);  // between 3 bits everywhere and 4
  found.second = [tile(0), tile(2), shades(), refused.hidden, took.textContent, document.querySelector("#live a").href];
  const cell = document.querySelector("[data-m]");
  cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true, clientX: 5, clientY: 5}));
  found.tip = document.getElementById("tip").innerText;
  await drag(slider.min);
  found.third = [refused.hidden, refused.textContent, document.body.classList.contains("stale")];
  controls.elements.levers.checked = true;
  controls.elements.levers.dispatchEvent(new Event("change", {bubbles: true}));
  await wait(60);
  for (let i = 0; i < 200 && asking; i++) await wait(50);
  await drag(+slider.min + 0.2 * (slider.max - slider.min));
  found.fourth = [refused.hidden, tile(2), document.querySelector("tr.sum") !== null];
  found.wide = document.documentElement.scrollWidth;
  document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script></body>"""


@pytest.fixture(scope="module")
def address(plan: Plan) -> Iterator[str]:
    """The application on a free port, and under /asked its page with a script that drags the slider."""
    from starlette.requests import Request
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    served = app(plan)
    page = next(r for r in served.routes if getattr(r, "path", "") == "/").endpoint  # type: ignore[attr-defined]

    def asked(request: Request) -> HTMLResponse:
        request.scope["path"] = "/"
        return HTMLResponse(page(request).body.decode().replace("</body>", ASK))

    served.routes.append(Route("/asked", asked))
    server = Listening(served)
    yield server.url
    server.end()


def get(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def test_it_solves_again(address: str, plan: Plan) -> None:
    code, page = get(f"{address}/")
    assert (
        code == 200
        and "6 GiB" in page
        and 'id="live"' in page
        and "connect-src 'self'" in page
        and "http:" not in page
        and "https:" not in page
    )
    code, text = get(f"{address}/plan.json?budget={4 * 2**30}&max_length=512&levers=all")
    smaller = Plan.from_json(json.loads(text))
    assert code == 200 and smaller.peak <= 4 * 2**30 and smaller.levers.max_length == 512
    assert smaller.model == plan.model and smaller.modules.keys() == plan.modules.keys()
    code, text = get(f"{address}/solve?budget=1000")
    refused = json.loads(text)
    assert code == 409 and "What could be given up" in refused["message"] and refused["smallest"] > 2**30


def test_it_answers_to_this_machine_and_to_numbers(address: str) -> None:
    assert get(f"{address}/", Host="evil.example")[0] == 400
    assert get(f"{address}/solve?budget=a")[0] == 400 and get(f"{address}/plan.json?max_length=<b>")[0] == 400
    assert get(f"{address}/../../etc/passwd")[0] == 404


def test_a_plan_that_cannot_be_solved_again_is_refused(tmp_path: Path, plan: Plan) -> None:
    plan.save(tmp_path / "plan.json")
    assert plan_at(tmp_path).hash == plan_at(tmp_path / "plan.json").hash == plan.hash
    with pytest.raises(ValueError, match="there is no plan at"):
        plan_at(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="plan again"):
        app(Plan.from_json(plan.to_json() | {"costs": {}}))


@pytest.mark.skipif(BROWSER is None, reason="needs a headless Chromium, and none is installed")
def test_dragged_in_a_real_browser(address: str, tmp_path: Path) -> None:
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
        "--disable-sync --enable-logging=stderr --dump-dom --window-size=1280,900 --virtual-time-budget=20000"
    )
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"{address}/asked"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert [line for line in lines if "409" not in line] == []  # a refusal is logged by the browser itself
    answer = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert answer, done.stderr
    found = json.loads(unescape(answer[1]))
    assert found["errors"] == [] and found["wide"] <= 1280
    assert found["first"][0] == "6 GiB" and found["second"][0] != "6 GiB"
    assert float(found["second"][1]) < float(found["first"][1]) and found["second"][2] != found["first"][2]
    assert found["second"][3] and re.fullmatch(r"solved in \d+ ms", found["second"][4]) and "/plan.json?budget=" in found["second"][5]
    assert "q_proj" in found["tip"] and "chosen" in found["tip"]
    assert found["third"][0] is False and "Does not fit" in found["third"][1] and found["third"][2]
    assert found["fourth"][0] and found["fourth"][2]
