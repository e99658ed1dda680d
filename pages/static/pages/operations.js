// The operations page: the queue by lane, and all of it anew every ten seconds.
"use strict";

const RENEW_MS = 10000;
const COLORS = { critical: "--bad", normal: "--accent", low: "--soft" };
const OF_PROTOCOLS = { socketio: "--accent", mqtt: "--warn", coap: "--soft", "to nobody": "--bad" };

function draw() {
  const samples = JSON.parse(document.getElementById("samples").textContent);
  drawLines("queue", COLORS, (lane) => samples.map((each) => ({ x: each.at * 1000, y: each.depth[lane] ?? 0 })));
  const counted = (each, name) => (name === "to nobody" ? each.undelivered : (each.delivered[name] ?? 0));
  drawLines("delivered", OF_PROTOCOLS, (name) => perMinute(samples, (each) => counted(each, name)));
}

// Of a count that grows: by how much in a minute; one that began anew, with an emptied Redis, is no step back.
function perMinute(samples, count) {
  return samples.slice(1).map((each, number) => {
    const before = samples[number];
    return { x: each.at * 1000, y: Math.max(0, count(each) - count(before)) * 60 / Math.max(1, each.at - before.at) };
  });
}

function drawLines(id, colors, points) {
  const canvas = document.getElementById(id);
  if (!canvas) return;
  const labels = { color: color("--soft") };
  const grid = { color: color("--line") };
  const clock = (ms) => moment(ms, { hour: "2-digit", minute: "2-digit" });
  new Chart(canvas, {
    type: "line",
    data: { datasets: Object.entries(colors).map(([label, name]) => ({ label, data: points(label), borderColor: color(name), borderWidth: 1.5, pointRadius: 0 })) },
    options: {
      animation: false, responsive: true, locale: LOCALE, maintainAspectRatio: false, interaction: { mode: "index", intersect: false },
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
    for (const id of ["queue", "delivered"]) Chart.getChart(id)?.destroy();
    document.getElementById("live").replaceChildren(...page.getElementById("live").childNodes);
    localTimes(document.getElementById("live"));
    draw();
    message.hidden = true;
  } catch {
    message.textContent = "The server does not answer. What you see may be old.";
    message.hidden = false;
  }
}

draw();
setInterval(() => document.hidden || renew(), RENEW_MS);
