// Copy buttons, and the wait for the first thing that a new sensor or device says.
"use strict";

const waiting = document.getElementById("waiting");
const LOOK_MS = 2000;

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = gettext("Copied");
  } catch {
    // Without HTTPS a browser lets no page copy: marked, it is one key away.
    getSelection().selectAllChildren(source);
    button.textContent = gettext("Marked: press Ctrl-C");
  }
});

// What is known at first, and then something else: by its own clock a board may say that it was yesterday.
let before = null;

async function heard({ kind, uuid }) {
  const path = kind === "sensor" ? `readings?sensor=${uuid}&pageSize=5` : `device-states?device=${uuid}&pageSize=50`;
  const answer = await fetch(`/api/v1/${path}`);
  if (!answer.ok) return "";
  const rows = (await answer.json()).results;
  const said = kind === "sensor" ? rows.map((row) => `${row.name} ${row.value}`) : rows.filter((row) => row.reportedAt).map((row) => `${row.name} ${row.reportedValue}`);
  const now = JSON.stringify(rows.map((row) => [row.timestamp, row.reportedAt, row.value]));
  const isNew = before !== null && now !== before && said.length;
  before ??= now;
  return isNew ? interpolate(gettext("Received %(what)s"), { what: said.join(", ") }, true) : "";
}

async function look() {
  try {
    const found = await heard(waiting.dataset);
    if (found) {
      waiting.textContent = found;
      waiting.classList.add("done");
      return;
    }
  } catch {
    // The server is away for a moment: the next look finds it.
  }
  setTimeout(look, LOOK_MS);
}

if (waiting) look();
