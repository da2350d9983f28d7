
const controls = document.getElementById("live"), refused = document.getElementById("refused");
const slider = controls.elements.budget, shown = controls.querySelector("output"), took = controls.querySelector(".took");
const begin = JSON.parse(controls.dataset.state);
let asking = false, again = false, waiting = 0;

function limits(state) {
  [slider.min, slider.max] = [state.low, state.high];
}

function say() {
  shown.textContent = bytes(Math.round(+slider.value));
}

function query() {
  const pulled = controls.elements.levers.checked;
  const levers = pulled === begin.pulled ? "asked" : pulled ? "all" : "none";
  return new URLSearchParams({ budget: Math.round(+slider.value), max_length: controls.elements.max_length.value, levers }).toString();
}

async function solve() {
  if (asking) { again = true; return; }
  asking = true;
  const wanted = query();
  const answer = await fetch(`/solve?${wanted}`).catch(() => null);
  if (answer === null) {
    refused.textContent = "The finebits process behind this page does not answer. Start finebits serve --studio again.";
  } else if (answer.ok) {
    draw(new DOMParser().parseFromString(await answer.text(), "text/html"));
    refused.textContent = "";
    controls.querySelector("a").href = `/plan.json?${wanted}`;
  } else {
    const said = await answer.json();
    refused.textContent = said.message;
    if (said.low) limits(said);
  }
  if (refused.textContent) refused.textContent += "\n\nBelow, faint: the last plan that fitted.";
  refused.hidden = !refused.textContent;
  document.body.classList.toggle("stale", !refused.hidden);
  asking = false;
  if (again) { again = false; solve(); }
}

function draw(page) {
  renew(page);
  took.textContent = `solved in ${page.querySelector(".took").dataset.ms} ms`;
  limits(JSON.parse(page.getElementById("live").dataset.state));
}

limits(begin);
slider.value = begin.budget;
say();
took.textContent = `solved in ${took.dataset.ms} ms`;
slider.addEventListener("input", () => { say(); clearTimeout(waiting); waiting = setTimeout(solve, 30); });
controls.addEventListener("change", event => event.target !== slider && solve());
controls.addEventListener("submit", event => event.preventDefault());
