// The overview and the page of a device: lines of the last day in the tiles, buttons that ask the API, and news as they come;
// while the gateway does not tell them, the whole anew every ten seconds.
"use strict";

const live = document.getElementById("live");
const message = document.getElementById("message");
const RENEW_MS = 10000;
const RENEW_LIVE_MS = 60000; // ages grow, and what was missed is found
const SOON_MS = 500; // several messages at once are one reason to look
const AT_MOST_MS = 2000; // and many, one after the other, are no reason to look all the time
const lines = new Map(); // "sensor variable" -> points, so that a renewed page does not ask again for a while
const LINES_MS = 300000;

function say(text) {
  message.textContent = text;
  message.hidden = !text;
}

async function points(sensor, variable) {
  const key = `${sensor} ${variable}`;
  const known = lines.get(key);
  if (known && Date.now() - known.at < LINES_MS) return known.points;
  const answer = await fetch(`/api/v1/sensors/${sensor}/history?interval=15m&variables=${encodeURIComponent(variable)}`);
  const found = answer.ok ? (await answer.json()).variables[0].points : [];
  lines.set(key, { at: Date.now(), points: found });
  return found;
}

async function draw(canvas) {
  const found = await points(canvas.dataset.sensor, canvas.dataset.variable);
  if (!canvas.isConnected || found.length < 2) return;
  new Chart(canvas, {
    type: "line",
    data: { datasets: [{ data: found.map((p) => ({ x: Date.parse(p.at), y: p.mean })), borderColor: color("--accent"), borderWidth: 1.5, pointRadius: 0 }] },
    options: { animation: false, responsive: true, maintainAspectRatio: false, events: [], plugins: { legend: { display: false } }, scales: { x: { type: "linear", display: false }, y: { display: false } } },
  });
}

// Only what is on the screen is drawn: a farm may have a thousand sensors.
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    draw(entry.target);
  }
});

function watch() {
  for (const canvas of live.querySelectorAll("canvas")) seen.observe(canvas);
}

async function renew() {
  try {
    const answer = await fetch(location.href);
    if (answer.redirected) return location.reload(); // the session has ended
    if (live.contains(document.activeElement) && document.activeElement.matches("input")) return; // somebody types
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const held = document.activeElement && live.contains(document.activeElement) ? document.activeElement.dataset : null;
    live.replaceChildren(...page.getElementById("live").childNodes);
    localTimes(live);
    watch();
    heard.ask();
    if (held && held.post) [...live.querySelectorAll("button")].find((b) => b.dataset.post === held.post && b.dataset.value === held.value && b.dataset.device === held.device)?.focus();
    say("");
  } catch {
    say(gettext("The server does not answer. What you see may be old."));
  }
}

function body(data) {
  if (!data.device) return undefined;
  const value = data.datatype === "number" ? Number(data.value) : data.datatype === "boolean" ? data.value === "yes" : data.value;
  return JSON.stringify({ deviceUuid: data.device, stateName: data.state, value });
}

live.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-post]");
  if (!button || (button.dataset.ask && !confirm(button.dataset.ask))) return;
  button.disabled = true;
  const headers = { "Content-Type": "application/json", "X-CSRFToken": document.querySelector("meta[name=csrf-token]").content };
  try {
    const answer = await fetch(button.dataset.post, { method: "POST", headers, body: body(button.dataset) });
    await renew();
    if (!answer.ok) say((await answer.json()).detail);
  } catch {
    say(gettext("The server does not answer. Nothing was done, as far as is known: look again before you try again."));
    button.disabled = false;
  }
});

document.querySelector("select#organization")?.addEventListener("change", (event) => event.target.form.requestSubmit());
// A number as the server writes it: four digits that count.
function asText(value) {
  if (typeof value === "boolean") return value ? gettext("yes") : gettext("no");
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);
}

function showReading({ variable, value, suspect }) {
  const tile = live.querySelector(`[data-live="${CSS.escape(variable)}"]`);
  const text = tile?.querySelector("[data-value]");
  if (!text) return soon();
  // What is not believed, or misses its target or does no longer, is for the server to say, which has time for that.
  if (suspect || tile.matches(".suspect, .missed") || outside(tile, value)) soon(RENEW_MS);
  if (suspect || tile.matches(".suspect")) return;
  text.textContent = asText(typeof value === "number" ? shown(value, tile) : value);
  tile.classList.remove("silent");
  if (!tile.matches(".missed")) tile.querySelector(".age").textContent = gettext("just now");
}

function outside({ dataset }, value) {
  return (dataset.low && value < Number(dataset.low)) || (dataset.high && value > Number(dataset.high));
}

let renewed = Date.now();
let due = Infinity;

function soon(wait = SOON_MS) {
  due = Math.min(due, Math.max(Date.now() + wait, renewed + AT_MOST_MS));
}

function again() {
  renewed = Date.now();
  due = Infinity;
  if (!document.hidden) renew();
}

watch();
const heard = listen({
  variables: () => [...live.querySelectorAll("[data-live]")].map((tile) => tile.dataset.live),
  onReading: showReading,
  onMessage: () => soon(),
});
document.addEventListener("visibilitychange", () => document.hidden || again());
setInterval(() => Date.now() < Math.min(due, renewed + (heard.isLive() ? RENEW_LIVE_MS : RENEW_MS)) || again(), 200);
