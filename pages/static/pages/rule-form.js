// The form of a rule: rows that come and go, lists of values and devices, and the rule in words beside it while one types.
"use strict";

const form = document.getElementById("rule");
const offered = JSON.parse(document.getElementById("offered").textContent);
const flat = (groups) => groups.flatMap(([beginning, group, own]) => own.map(([name, unit, allowed]) => ({ key: beginning + name, group, name, unit, allowed })));
const states = flat(offered.states);
const lists = { sources: [...flat(offered.variables), ...states], states };
const byKey = { sources: new Map(lists.sources.map((each) => [each.key, each])), states: new Map(states.map((each) => [each.key, each])) };
const touched = new Set();
const PREVIEW_MS = 350;
let waiting = 0;

// A list in the place of a text field: of thousands of values the page holds one copy.
function listed(input) {
  const select = document.createElement("select");
  for (const { name, value } of input.attributes) if (["id", "name", "data-list"].includes(name)) select.setAttribute(name, value);
  select.append(new Option(gettext("choose …"), ""));
  let group = null;
  for (const each of lists[input.dataset.list]) {
    if (!group || group.label !== each.group) {
      group = document.createElement("optgroup");
      group.label = each.group;
      select.append(group);
    }
    group.append(new Option(`${each.group}: ${each.name}`, each.key, false, each.key === input.value));
  }
  if (input.value && !byKey[input.dataset.list].has(input.value)) select.append(new Option(gettext("gone: choose another"), input.value, false, true));
  input.replaceWith(select);
  return select;
}

function field(row, name) {
  return row.querySelector(`[name$="-${name}"]`);
}

function show(row, name, shown) {
  const found = row.querySelector(`.field-${name}`);
  if (found) found.hidden = !shown;
}

// A value that has a few allowed ones is chosen, not typed.
function allowed(row, choice) {
  const input = field(row, "value");
  if (!input) return;
  const values = choice?.allowed ?? [];
  const known = input.dataset.allowed ?? "";
  const wanted = values.join("\n");
  if (known === wanted) return;
  const fresh = document.createElement(values.length ? "select" : "input");
  fresh.id = input.id;
  fresh.name = input.name;
  fresh.dataset.allowed = wanted;
  if (values.length) {
    for (const each of values) fresh.append(new Option(each, each, false, each === input.value));
  } else {
    fresh.value = input.value;
  }
  input.replaceWith(fresh);
}

function arrange(row) {
  const source = field(row, "source");
  if (source) {
    const choice = byKey.sources.get(source.value);
    const operands = offered.operands[field(row, "operator").value] ?? [];
    const single = operands.includes("value") && !["in", "notIn", "hasAll", "hasAny", "hasNone", "contains", "notContains", "startsWith", "endsWith", "matches"].includes(field(row, "operator").value);
    allowed(row, single ? choice : null);
    for (const name of ["value", "upper", "duration"]) show(row, name, operands.includes(name));
    show(row, "measure_of", field(row, "measure").value !== "");
    row.querySelector("[data-unit]").textContent = choice?.unit ?? "";
    row.querySelector("details").hidden = !operands.includes("value") || operands.includes("duration");
  } else {
    const kind = field(row, "kind").value;
    const parts = { device_command: ["target", "value", "force"], notify: ["title", "message", "severity", "audience"], raise_alarm: ["alarm", "severity", "message"], clear_alarm: ["alarm"] }[kind];
    for (const name of ["target", "value", "force", "title", "message", "severity", "audience", "alarm"]) show(row, name, parts.includes(name));
    allowed(row, kind === "device_command" ? byKey.states.get(field(row, "target").value) : null);
  }
}

function arrangeAll() {
  const scheduled = form.querySelector("[name=execution_type]:checked")?.value !== "event-triggered";
  form.querySelector("[data-times]").hidden = !scheduled;
  const conditions = [...form.querySelectorAll(".condition[data-row]")].filter((each) => !each.hidden);
  form.querySelector("[data-needed]").hidden = conditions.length < 2;
  const word = form.querySelector("[name=needed]").value === "any" ? gettext("and, together with the one above") : gettext("or, instead of the one above");
  conditions.forEach((row, number) => {
    const together = row.querySelector(".together");
    together.hidden = number === 0;
    if (number === 0) together.querySelector("input").checked = false;
    row.querySelector("[data-together]").textContent = word;
    row.classList.toggle("joined", together.querySelector("input").checked);
  });
  for (const row of form.querySelectorAll("[data-row]")) arrange(row);
}

function add(section) {
  const total = section.querySelector("[name$=TOTAL_FORMS]");
  const holder = document.createElement("div");
  holder.innerHTML = section.querySelector("template").innerHTML.replaceAll("__prefix__", total.value);
  const row = holder.firstElementChild;
  section.querySelector("[data-list-of-rows]").append(row);
  total.value = Number(total.value) + 1;
  for (const input of row.querySelectorAll("input[data-list]")) listed(input);
  arrangeAll();
  row.querySelector("select, input:not([type=checkbox])").focus();
}

function remove(row) {
  row.querySelector("[name$=DELETE]").checked = true;
  row.hidden = true;
  arrangeAll();
  later();
}

async function preview() {
  const headers = { "X-CSRFToken": document.querySelector("meta[name=csrf-token]").content };
  try {
    const answer = await fetch(form.dataset.preview, { method: "POST", headers, body: new FormData(form) });
    if (!answer.ok) return;
    const { html, errors } = await answer.json();
    document.getElementById("preview").innerHTML = html;
    for (const each of form.querySelectorAll("[data-error]")) each.textContent = form.dataset.posted || touched.has(each.dataset.error) ? (errors[each.dataset.error] ?? "") : "";
    for (const each of document.querySelectorAll("#preview time")) each.textContent = moment(new Date(each.dateTime), { weekday: "short", hour: "2-digit", minute: "2-digit" });
  } catch {
    // The server is away for a moment: the next change asks again, and saving says so.
  }
}

function later() {
  clearTimeout(waiting);
  waiting = setTimeout(preview, PREVIEW_MS);
}

form.addEventListener("input", (event) => {
  touched.add(event.target.name);
  arrangeAll();
  later();
});
form.addEventListener("click", (event) => {
  if (event.target.matches("[data-add]")) add(event.target.closest("section"));
  if (event.target.matches("[data-remove]")) remove(event.target.closest("[data-row]"));
});

for (const input of form.querySelectorAll("input[data-list]")) listed(input);
for (const box of form.querySelectorAll("[name$=DELETE]:checked")) box.closest("[data-row]").hidden = true;
const zone = form.querySelector("[name=timezone]");
if (form.dataset.new && !zone.value) zone.value = ZONE ?? Intl.DateTimeFormat().resolvedOptions().timeZone;
arrangeAll();
preview();
