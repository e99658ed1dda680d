// The charts of a sensor: the mean with lowest and highest around it, for a span that one chooses.
"use strict";

const place = document.getElementById("charts");
const message = document.getElementById("message");
const charts = new Map();
const RENEW_MS = 60000;
const LIVE_MS = 10000;
let hours = Number(new URLSearchParams(location.search).get("hours")) || 24;

const LONG = { dateStyle: "medium", timeStyle: "short" };

function short(ms) {
  return moment(ms, hours <= 24 ? { hour: "2-digit", minute: "2-digit" } : { month: "short", day: "numeric" });
}

function canvasOf(name) {
  return document.querySelector(`[data-chart="${CSS.escape(name)}"]`);
}

// At whole hours and days of the person's own time.
function ticks(begin, end) {
  const steps = [10, 20, 60, 240, 480, 1440, 2880, 7200, 14400, 86400, 129600].map((minutes) => minutes * 60000);
  const most = place.clientWidth < 500 ? 4 : 9;
  const step = steps.find((each) => (end - begin) / each <= most) ?? steps.at(-1);
  const shift = behindUtc(begin);
  const found = [];
  for (let at = Math.ceil((begin - shift) / step) * step + shift; at <= end; at += step) found.push({ value: at });
  return found;
}

function line(points, key, more) {
  return { data: points.map((p) => ({ x: Date.parse(p.at), y: p[key] })), pointRadius: 0, borderWidth: 1, ...more };
}

// Alarms as bands, limits of rules as dashed lines, and what rules and people switched as ticks at the foot.
function drawing(name, marks) {
  return {
    id: "marks",
    beforeDatasetsDraw({ ctx, chartArea: { left, right, top, bottom }, scales: { x, y } }) {
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, right - left, bottom - top);
      ctx.clip();
      for (const alarm of marks.alarms) {
        ctx.fillStyle = color(alarm.severity === "critical" ? "--bad" : "--warn") + "30";
        const from = x.getPixelForValue(Date.parse(alarm.from));
        const to = alarm.to ? x.getPixelForValue(Date.parse(alarm.to)) : right;
        ctx.fillRect(from, top, Math.max(to - from, 2), bottom - top);
      }
      const canvas = canvasOf(name);
      if (canvas.dataset.low || canvas.dataset.high) {
        const high = canvas.dataset.high ? y.getPixelForValue(Number(canvas.dataset.high)) : top;
        const low = canvas.dataset.low ? y.getPixelForValue(Number(canvas.dataset.low)) : bottom;
        ctx.fillStyle = color("--accent") + "18";
        ctx.fillRect(left, high, right - left, low - high);
      }
      ctx.font = "12px system-ui, sans-serif";
      for (const each of marks.thresholds.filter((one) => one.variable === name)) {
        const value = shown(each.value, canvas);
        const at = y.getPixelForValue(value);
        ctx.strokeStyle = ctx.fillStyle = color("--warn");
        ctx.setLineDash([6, 4]);
        ctx.beginPath();
        ctx.moveTo(left, at);
        ctx.lineTo(right, at);
        ctx.stroke();
        ctx.fillText(`${each.rule} ${number(value)}`, left + 4, at - 4);
      }
      ctx.setLineDash([]);
      ctx.strokeStyle = color("--text");
      for (const change of marks.changes) {
        const at = x.getPixelForValue(Date.parse(change.at));
        ctx.beginPath();
        ctx.moveTo(at, bottom);
        ctx.lineTo(at, bottom - 10);
        ctx.stroke();
      }
      ctx.restore();
    },
  };
}

function tell(marks) {
  const entries = [
    ...marks.alarms.map((each) => ({ at: each.from, text: interpolate(each.to ? gettext("alarm %(type)s (%(severity)s)") : gettext("alarm %(type)s (%(severity)s), still open"), { ...each, severity: gettext(each.severity) }, true) })),
    ...marks.changes.map((each) => ({ at: each.at, text: interpolate(gettext("%(state)s to %(value)s, by %(actor)s"), each, true) })),
  ].sort((one, other) => Date.parse(other.at) - Date.parse(one.at));
  document.getElementById("happened").hidden = !entries.length;
  document.querySelector("#happened ul").replaceChildren(...entries.map(({ at, text }) => {
    const item = document.createElement("li");
    item.textContent = `${moment(Date.parse(at), LONG)}: ${text}`;
    return item;
  }));
}

function show(variable, begin, end, marks) {
  const { name } = variable;
  const canvas = canvasOf(name);
  const { unit } = canvas.dataset;
  const points = variable.points.map((p) => ({ ...p, ...Object.fromEntries(["minimum", "maximum", "mean", "last"].map((key) => [key, shown(p[key], canvas)])) }));
  const accent = color("--accent");
  const datasets = [
    line(points, "maximum", { borderColor: "transparent", backgroundColor: accent + "33", fill: 1 }),
    line(points, "minimum", { borderColor: "transparent" }),
    line(points, "mean", { borderColor: accent, borderWidth: 2 }),
  ];
  const labels = { color: color("--soft") };
  const grid = { color: color("--line") };
  charts.get(name)?.destroy();
  charts.set(name, new Chart(canvas, {
    type: "line",
    plugins: [drawing(name, marks)],
    data: { datasets },
    options: {
      animation: false, responsive: true, locale: LOCALE, maintainAspectRatio: false, interaction: { mode: "index", intersect: false },
      plugins: { legend: { display: false }, tooltip: { callbacks: { title: (items) => moment(items[0].parsed.x, LONG), label: (item) => `${[gettext("highest"), gettext("lowest"), gettext("mean")][item.datasetIndex]} ${number(item.parsed.y)} ${unit}` } } },
      scales: { x: { type: "linear", min: begin, max: end, grid, afterBuildTicks: (axis) => { axis.ticks = ticks(begin, end); }, ticks: { ...labels, maxRotation: 0, callback: (ms) => short(ms) } }, y: { grid, ticks: labels } },
    },
  }));
  const counted = points.filter((p) => p.inRange !== null && p.inRange !== undefined);
  const share = counted.reduce((sum, p) => sum + p.inRange, 0) / counted.reduce((sum, p) => sum + p.count, 0);
  const within = counted.length ? ` · ${interpolate(gettext("in range %(share)s % of the readings"), { share: number(share * 100) }, true)}` : "";
  const text = points.length
    ? interpolate(gettext("now %(now)s · lowest %(low)s · highest %(high)s"), {
        now: `${number(points.at(-1).last)} ${unit}`,
        low: number(Math.min(...points.map((p) => p.minimum))),
        high: number(Math.max(...points.map((p) => p.maximum))),
      }, true) + within
    : gettext("no readings in this time");
  document.querySelector(`[data-numbers="${CSS.escape(name)}"]`).textContent = text;
}

async function load() {
  const end = new Date();
  const begin = new Date(end - hours * 3600000);
  const span = `from=${begin.toISOString()}&to=${end.toISOString()}`;
  const url = `/api/v1/sensors/${place.dataset.sensor}/history?${span}`;
  for (const link of document.querySelectorAll("[data-csv]")) link.href = `${url}&variables=${encodeURIComponent(link.dataset.csv)}&format=csv`;
  for (const button of document.querySelectorAll("[data-hours]")) button.setAttribute("aria-pressed", String(Number(button.dataset.hours) === hours));
  try {
    const [answer, around] = await Promise.all([fetch(url), fetch(`${place.dataset.marks}?${span}`)]);
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.detail);
    const marks = around.ok ? await around.json() : { thresholds: [], changes: [], alarms: [] };
    tell(marks);
    for (const variable of found.variables) if (canvasOf(variable.name)) show(variable, +begin, +end, marks);
    message.hidden = true;
  } catch (error) {
    message.textContent = interpolate(gettext("The charts cannot be shown: %(why)s"), { why: error.message }, true);
    message.hidden = false;
  }
}

for (const button of document.querySelectorAll("[data-hours]")) {
  button.addEventListener("click", () => {
    hours = Number(button.dataset.hours);
    history.replaceState(null, "", `?hours=${hours}${location.hash}`);
    load();
  });
}
load();
setInterval(() => document.hidden || load(), RENEW_MS);

// A new reading is a reason to draw anew, but not while somebody is still looking at the last drawing.
let waiting = 0;

function soon() {
  waiting ||= setTimeout(() => { waiting = 0; document.hidden || load(); }, LIVE_MS);
}

listen({ variables: () => [...place.querySelectorAll("[data-live]")].map((each) => each.dataset.live), onReading: soon, onMessage: soon });
