// The operations page: the queue by lane, all of it anew every ten seconds, and a question before a button does something.
"use strict";

const RENEW_MS = 10000;
const COLORS = { critical: "--bad", normal: "--accent", low: "--soft" };

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function draw() {
  const canvas = document.getElementById("queue");
  if (!canvas) return;
  const samples = JSON.parse(document.getElementById("samples").textContent);
  const lanes = Object.keys(COLORS);
  const labels = { color: color("--soft") };
  const grid = { color: color("--line") };
  const clock = (ms) => new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" }).format(ms);
  new Chart(canvas, {
    type: "line",
    data: { datasets: lanes.map((lane) => ({ label: lane, data: samples.map((each) => ({ x: each.at * 1000, y: each.depth[lane] ?? 0 })), borderColor: color(COLORS[lane]), borderWidth: 1.5, pointRadius: 0 })) },
    options: {
      animation: false, responsive: true, maintainAspectRatio: false, interaction: { mode: "index", intersect: false },
      plugins: { legend: { labels: { ...labels, usePointStyle: true, pointStyle: "line" } }, tooltip: { callbacks: { title: (items) => clock(items[0].parsed.x) } } },
      scales: { x: { type: "linear", min: Date.now() - 3600000, max: Date.now(), grid, ticks: { ...labels, maxRotation: 0, maxTicksLimit: 7, callback: clock } }, y: { beginAtZero: true, suggestedMax: 10, grid, ticks: { ...labels, precision: 0 } } },
    },
  });
}

async function renew() {
  const message = document.getElementById("message");
  try {
    const answer = await fetch(location.href);
    if (answer.redirected || !answer.ok) return location.reload();
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    Chart.getChart("queue")?.destroy();
    document.getElementById("live").replaceChildren(...page.getElementById("live").childNodes);
    localTimes(document.getElementById("live"));
    draw();
    message.hidden = true;
  } catch {
    message.textContent = "The server does not answer. What you see may be old.";
    message.hidden = false;
  }
}

document.addEventListener("submit", (event) => {
  if (event.target.dataset.confirm && !confirm(event.target.dataset.confirm)) event.preventDefault();
});
draw();
setInterval(() => document.hidden || renew(), RENEW_MS);
