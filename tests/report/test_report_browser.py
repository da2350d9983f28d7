"""The page in a real browser, where one is installed: it lays out, hovers, sorts and copies without an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from finebits.report.page import run_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a headless Chromium, and none is installed")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --enable-logging=stderr --dump-dom --window-size=1280,900 --virtual-time-budget=3000"
)
ASK = """
<script>
const found = {};
const cell = document.querySelector('[data-m="51"]'), box = cell.getBoundingClientRect();
cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true, clientX: box.x, clientY: box.y}));
found.tip = document.getElementById("tip").innerText;
found.menu = document.querySelectorAll("#tip tr").length;
found.chosen = document.querySelector("#tip tr.chosen td").textContent;
document.querySelector("h1").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
found.hidden = document.getElementById("tip").hidden;
found.panels = [...document.querySelectorAll(".panel")].map(p => [p.id, p.getBoundingClientRect().height]);
found.charts = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width);
found.wide = document.documentElement.scrollWidth;
found.cut = [...document.querySelectorAll("svg text")].filter(t => {
  const own = t.getBoundingClientRect(), all = t.ownerSVGElement.getBoundingClientRect();
  return own.left < all.left - 1 || own.right > all.right + 1 || own.bottom > all.bottom + 1;
}).map(t => t.textContent);
const table = document.querySelector('[data-name="evaluation"]');
found.csv = csv(table);
const head = [...table.tHead.rows[0].cells].find(c => c.textContent.trim() === "held-out loss");
const order = () => [...table.tBodies[0].rows].map(r => parseFloat(r.cells[3].dataset.v));
head.firstChild.click();
found.up = order();
head.firstChild.click();
found.down = order();
document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
document.getElementById("found").textContent = JSON.stringify(found);
</script></body>"""


def test_in_a_real_browser(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(run_page(run).replace("</body>", ASK))
    command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    answer = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert answer, done.stderr
    found = json.loads(unescape(answer[1]))
    assert "model.layers.7.self_attn.v_proj" not in found["tip"].splitlines()[1:] and found["tip"].startswith("model.layers.7.")
    assert found["menu"] == 7 and "-b" in found["chosen"] and found["hidden"]
    assert dict(found["panels"]).keys() == {"memory", "bits", "loss", "evaluation", "samples", "export", "data", "reproduce"}
    assert min(h for _, h in found["panels"]) > 100 and min(found["charts"]) > 300
    assert found["wide"] <= 1280 and found["cut"] == []
    assert found["up"] == sorted(found["up"]) and found["down"] == found["up"][::-1]
    heads, first = (line.split(",") for line in found["csv"].splitlines()[:2])
    assert heads[3:6] == ["loss", "loss low", "loss high"] and first[0] == '"full precision'
    assert len(heads) == 14 and float(first[4]) == pytest.approx(1.982)
