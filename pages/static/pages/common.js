// What every page needs: texts in the language of the page, times, numbers and units as the person who looks wants
// them, and a question before what cannot be taken back.
"use strict";

// Where the catalogue of translations did not come, the page speaks English.
globalThis.gettext ??= (text) => text;
globalThis.ngettext ??= (one, many, count) => (count === 1 ? one : many);
globalThis.interpolate ??= (text, values) => text.replace(/%\((\w+)\)s/g, (_, name) => values[name]);

const ROOT = document.documentElement;
// The browser's own kind of English or German, such as British, where it has one.
const LOCALE = navigator.languages.find((each) => each.split("-")[0] === ROOT.lang) ?? ROOT.lang;
const ZONE = ROOT.dataset.timeZone || undefined; // without one that of the browser

function color(name) {
  return getComputedStyle(ROOT).getPropertyValue(name).trim();
}

function moment(ms, options) {
  return new Intl.DateTimeFormat(LOCALE, { timeZone: ZONE, ...options }).format(ms);
}

function number(value) {
  return new Intl.NumberFormat(LOCALE, { maximumSignificantDigits: 4 }).format(value);
}

// By how many ms the person's clock is behind UTC at a moment.
function behindUtc(ms) {
  if (!ZONE) return new Date(ms).getTimezoneOffset() * 60000;
  const options = { timeZone: ZONE, hourCycle: "h23", year: "numeric", month: "numeric", day: "numeric", hour: "numeric", minute: "numeric", second: "numeric" };
  const parts = Object.fromEntries(new Intl.DateTimeFormat("en", options).formatToParts(ms).map(({ type, value }) => [type, Number(value)]));
  return Math.floor(ms / 1000) * 1000 - Date.UTC(parts.year, parts.month - 1, parts.day, parts.hour, parts.minute, parts.second);
}

// A stored value in the unit that the person wants; the element says how.
function shown(value, { dataset }) {
  return dataset.factor ? value * Number(dataset.factor) + Number(dataset.offset) : value;
}

function localTimes(place) {
  for (const each of place.querySelectorAll("time[datetime]")) {
    each.title = each.dateTime;
    each.textContent = moment(new Date(each.dateTime), { weekday: "short", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
  }
}

localTimes(document);

// A question before what a button or a form does, where it has one.
document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.ask ?? event.target.dataset.confirm;
  if (question && !confirm(question)) event.preventDefault();
});
