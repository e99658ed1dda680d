// What a rule would have done: the value that it reads, with a mark for each time.
"use strict";

const canvas = document.getElementById("chart");

function at(points, ms) {
  let best = null;
  for (const point of points) if (!best || Math.abs(point.x - ms) < Math.abs(best.x - ms)) best = point;
  return best ? best.y : 0;
}

async function draw() {
  const { sensor, variable, begin, end } = canvas.dataset;
  const query = new URLSearchParams({ from: new Date(begin).toISOString(), to: new Date(end).toISOString(), variables: variable });
  const answer = await fetch(`/api/v1/sensors/${sensor}/history?${query}`);
  if (!answer.ok) return;
  const points = (await answer.json()).variables[0].points.map((each) => ({ x: Date.parse(each.at), y: shown(each.mean, canvas) }));
  const marks = [...document.querySelectorAll(".done time")].map((each) => Date.parse(each.dateTime)).map((x) => ({ x, y: at(points, x) }));
  const labels = { color: color("--soft") };
  const grid = { color: color("--line") };
  const clock = (ms) => moment(ms, { weekday: "short", hour: "2-digit", minute: "2-digit" });
  new Chart(canvas, {
    type: "line",
    data: {
      datasets: [
        { data: marks, showLine: false, pointRadius: 5, pointStyle: "triangle", backgroundColor: color("--bad"), borderColor: color("--bad") },
        { data: points, borderColor: color("--accent"), borderWidth: 1.5, pointRadius: 0 },
      ],
    },
    options: {
      animation: false, responsive: true, locale: LOCALE, maintainAspectRatio: false,
      plugins: { legend: { display: false }, tooltip: { callbacks: { title: (items) => clock(items[0].parsed.x) } } },
      scales: { x: { type: "linear", min: Date.parse(begin), max: Date.parse(end), grid, ticks: { ...labels, maxRotation: 0, maxTicksLimit: 7, callback: clock } }, y: { grid, ticks: labels } },
    },
  });
}

if (canvas) draw();
