// The form of a rule: rows that come and go, lists of values and devices, and the rule in words beside it while one types.
"use strict";

const form = document.getElementById("rule");
const offered = JSON.parse(document.getElementById("offered").textContent);
const flat = (source, { groups, kinds }) => groups.flatMap(([uuid, group, kind]) => kinds[kind].map(([name, unit, allowed]) => ({ key: `${source}|${uuid}|${name}`, group, name, unit, allowed })));
const states = flat("device", offered.states);
const devices = offered.devices.map(([key, name]) => ({ key, name }));
const lists = { sources: [...flat("sensor", offered.variables), ...states], states, devices, steps: [] };
const byKey = Object.fromEntries(Object.entries(lists).map(([name, own]) => [name, new Map(own.map((each) => [each.key, each]))]));
const touched = new Set();
const PREVIEW_MS = 350;
let waiting = 0;

// Of thousands of values the page holds one list, which every field copies.
const options = {};
function optionsOf(name) {
  if (options[name]) return options[name];
  const found = (options[name] = document.createDocumentFragment());
  found.append(new Option(gettext("choose …"), ""));
  let group = null;
  for (const each of lists[name]) {
    if (each.group && group?.label !== each.group) {
      group = document.createElement("optgroup");
      group.label = each.group;
      found.append(group);
    }
    (group ?? found).append(new Option(each.group ? `${each.group}: ${each.name}` : each.name, each.key));
  }
  return found;
}

// A list in the place of a text field.
function listed(input) {
  const select = document.createElement("select");
  for (const { name, value } of input.attributes) if (["id", "name", "data-list"].includes(name)) select.setAttribute(name, value);
  select.append(optionsOf(input.dataset.list).cloneNode(true));
  if (byKey[input.dataset.list].has(input.value)) select.value = input.value;
  if (input.dataset.list === "steps") select.dataset.wanted = input.value;
  else if (input.value && !byKey[input.dataset.list].has(input.value)) select.append(new Option(gettext("gone: choose another"), input.value, false, true));
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
    const parts = { device_command: ["target", "value", "value_from", "force"], notify: ["title", "message", "severity", "audience", "about"], raise_alarm: ["alarm", "severity", "message"], clear_alarm: ["alarm"] }[kind];
    for (const name of ["target", "value", "value_from", "force", "title", "message", "severity", "audience", "about", "alarm"]) show(row, name, parts.includes(name));
    row.querySelector("details").hidden = !parts.some((name) => ["value_from", "force", "audience", "about"].includes(name));
    allowed(row, kind === "device_command" ? byKey.states.get(field(row, "target").value) : null);
  }
}

function arrangeAll() {
  const scheduled = form.querySelector("[name=execution_type]:checked")?.value !== "event-triggered";
  form.querySelector("[data-times]").hidden = !scheduled;
  for (const row of form.querySelectorAll("[data-row]")) arrange(row);
  if (form.querySelector("[data-steps]")) return arrangeSteps();
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
}

// Steps: what each has to ask for, and where it may lead.
function shownSteps() {
  return [...form.querySelectorAll("[data-step]")].filter((each) => !each.hidden);
}

function arrangeSteps() {
  const names = shownSteps().map((step) => field(step, "name").value.trim()).filter(Boolean);
  for (const step of shownSteps()) {
    const kind = field(step, "kind").value;
    for (const panel of step.querySelectorAll("[data-panel]")) {
      panel.hidden = panel.dataset.panel !== kind;
      // What is not shown is not sent.
      for (const input of panel.querySelectorAll("input, select, textarea")) input.disabled = panel.hidden;
    }
    show(step, "on_false", kind === "filter");
    show(step, "on_failure", kind !== "filter");
    const transform = step.querySelector("[data-panel=transform]");
    const operands = offered.calculations[field(transform, "operation").value];
    for (const name of ["key", "value", "factor", "offset", "target"]) show(transform, name, operands.includes(name));
    for (const link of step.querySelectorAll("select[data-list=steps]")) arrangeLink(link, names, field(step, "name").value.trim());
    for (const group of step.querySelectorAll("[data-group]")) group.querySelector("[data-remove-group]").hidden = !group.parentElement.closest("[data-group]");
    field(step, "structure").value = JSON.stringify(structure(step.querySelector("[data-group]")));
  }
}

// A link stays with the name that it was given, also while that step is being renamed or is not there yet.
function arrangeLink(link, names, own) {
  const wanted = link.dataset.wanted ?? "";
  const there = names.filter((name) => name !== own);
  link.replaceChildren(new Option(gettext("nowhere: the rule ends"), ""), ...there.map((name) => new Option(name, name, false, name === wanted)));
  if (wanted && !there.includes(wanted)) link.append(new Option(wanted, wanted, false, true));
  link.value = wanted;
}

function structure(group) {
  const parts = [...group.querySelector("[data-parts]").children].map((part) =>
    part.matches("[data-group]") ? structure(part) : { row: Number(field(part, "source").name.match(/-row-(\d+)-/)[1]) });
  return { type: group.querySelector("[data-group-type]").value, expressions: parts };
}

function from(template, replacements) {
  const holder = document.createElement("div");
  holder.innerHTML = Object.entries(replacements).reduce((html, [place, value]) => html.replaceAll(place, value), template.innerHTML);
  for (const input of holder.querySelectorAll("input[data-list]")) listed(input);
  return holder.firstElementChild;
}

function freshRow(step) {
  const taken = [...step.querySelectorAll("[name$='-source']")].map((each) => Number(each.name.match(/-row-(\d+)-/)?.[1] ?? -1));
  return from(step.querySelector("[data-row-template]"), { __row__: Math.max(-1, ...taken) + 1 });
}

function addStep() {
  const count = form.querySelector("[name=steps-count]");
  const step = from(form.querySelector("[data-step-template]"), { __step__: count.value });
  count.value = Number(count.value) + 1;
  form.querySelector("[data-list-of-steps]").append(step);
  field(step, "name").value = interpolate(gettext("step %(number)s"), { number: count.value }, true);
  return field(step, "name");
}

function removeStep(step) {
  step.querySelector("[data-gone]").value = "yes";
  step.hidden = true;
}

// What the buttons of the steps do; gives what the person goes on with.
const STEP_BUTTONS = {
  "[data-add-step]": () => addStep(),
  "[data-remove-step]": (button) => removeStep(button.closest("[data-step]")),
  "[data-add-condition]": (button) => {
    const row = freshRow(button.closest("[data-step]"));
    button.closest("[data-group]").querySelector("[data-parts]").append(row);
    return field(row, "source");
  },
  "[data-add-group]": (button) => {
    const step = button.closest("[data-step]");
    const group = from(step.querySelector("[data-group-template]"), {});
    button.closest("[data-group]").querySelector("[data-parts]").append(group);
    const row = freshRow(step);
    group.querySelector("[data-parts]").append(row);
    return field(row, "source");
  },
  "[data-remove-group]": (button) => button.closest("[data-group]").remove(),
};

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
  if (row.closest("[data-parts]")) {
    row.remove();
    arrangeAll();
    return later();
  }
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
  if (event.target.dataset.list === "steps") event.target.dataset.wanted = event.target.value;
  arrangeAll();
  later();
});
form.addEventListener("click", (event) => {
  if (event.target.matches("[data-add]")) add(event.target.closest("section"));
  if (event.target.matches("[data-remove]")) remove(event.target.closest("[data-row]"));
  const selector = Object.keys(STEP_BUTTONS).find((each) => event.target.matches(each));
  if (!selector) return;
  const next = STEP_BUTTONS[selector](event.target);
  arrangeAll();
  next?.focus();
  later();
});

for (const input of form.querySelectorAll("input[data-list]")) listed(input);
for (const box of form.querySelectorAll("[name$=DELETE]:checked")) box.closest("[data-row]").hidden = true;
const zone = form.querySelector("[name=timezone]");
if (form.dataset.new && !zone.value) zone.value = ZONE ?? Intl.DateTimeFormat().resolvedOptions().timeZone;
arrangeAll();
preview();
