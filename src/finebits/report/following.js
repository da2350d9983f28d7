const going = document.getElementById("going"), said = word => going.querySelector(`.${word}`);
let shownVersion = "", drawing = false, newest = null;

const clock = seconds => {
  const s = Math.round(seconds);
  return s >= 3600 ? `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min` : s >= 60 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${s} s`;
};

function tell(state) {
  const running = state.status === "running", bar = said("steps");
  going.classList.toggle("ended", !running);
  said("status").textContent = state.status;
  said("phase").textContent = [state.run, running ? state.phase : ""].filter(Boolean).join(": ");
  bar.hidden = !state.total;
  if (state.total) [bar.max, bar.value] = [state.total, state.step];
  const told = {
    step: state.total ? `${state.step.toLocaleString("en")} of ${state.total.toLocaleString("en")}` : "–",
    loss: state.loss === null ? "–" : state.loss.toFixed(4),
    memory: state.memory === null || !running ? "–" : bytes(state.memory) + (state.budget ? ` of ${bytes(state.budget)}` : ""),
    left: running && state.left !== null ? clock(state.left) : "–",
  };
  for (const [word, text] of Object.entries(told)) said(word).textContent = text;
  document.title = `${state.total && running ? `${Math.floor(100 * state.step / state.total)} % ` : `${state.status} `}· ${document.querySelector("h1").textContent}`;
}

async function redraw() {
  if (drawing || document.hidden || !newest || newest.version === shownVersion) return;
  drawing = true;
  const answer = await fetch("/").catch(() => null);
  if (answer?.ok) {
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    shownVersion = JSON.parse(page.getElementById("going").dataset.state).version;
    renew(page);
  }
  drawing = false;
}

function hear(state) {
  newest = state;
  tell(state);
  if (state.status === "running") return;
  source.close();
  clearInterval(pulse);
  redraw();
}

const source = new EventSource("/events");
source.onmessage = event => hear(JSON.parse(event.data));
source.onerror = () => { said("status").textContent = "no connection: the process behind this page is gone, or starts again"; };
const pulse = setInterval(redraw, 3000);
document.addEventListener("visibilitychange", redraw);
newest = JSON.parse(going.dataset.state);
shownVersion = newest.version;
tell(newest);
