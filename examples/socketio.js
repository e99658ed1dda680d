"use strict";
const KEPT = 200; // messages on the page, and ids by which a message that comes twice is known
const EVENTS = ["device-state-change", "device-status", "alert", "notification"];
const form = document.getElementById("login");
// Asked when the page opens; who is quicker than the answer waits for it.
const gatewayKnown = fetch("/api/v1/gateway").then((answer) => answer.json()).then(
  ({ socketio }) => { form.gateway.value ||= socketio; },
  () => {}, // said when somebody connects without an address
);

let tokens = null;         // from /auth/login: access for some minutes, refresh for the next pair
let position = "0-0";      // of the message seen last; 0-0 asks for the states of all devices to begin with
let socket = null;
const seen = new Set();
const rows = new Map();    // device and state -> row of the table

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (socket) socket.close();
  try {
    tokens = await post("login", { username: form.username.value, password: form.password.value });
  } catch (error) {
    return say("refused", `Not logged in: ${error.message}`);
  }
  await gatewayKnown;
  if (!form.gateway.value) return say("refused", "The server does not say where its gateway is: enter its address.");
  form.password.value = "";
  connect(form.gateway.value);
});

function connect(gateway) {
  say("away", "Connecting …");
  // Called anew for each connection: the token may have run out, and the position has moved on.
  const auth = (give) => access().then((token) => give({ token, position }), (error) => say("refused", error.message));
  socket = io(gateway, { auth, reconnectionDelayMax: 2000, forceNew: true });
  socket.on("connect", () => say("away", "Connected, catching up …"));
  socket.on("connect_error", (error) => {
    say("away", `Not connected: ${error.message}`);
    if (!socket.active) setTimeout(() => socket.connect(), 2000); // the server said no: the library would not try again
  });
  socket.on("disconnect", (reason) => {
    say("away", `The connection ended (${reason}). Trying again …`);
    if (reason === "io server disconnect") socket.connect(); // with a new token, the old one has run out
  });
  socket.on("session-ended", (why) => say("away", why.message));
  socket.on("position", (reached) => {
    position = reached.position;
    say("live", `Live at ${gateway}`);
  });
  socket.on("gap", (gap) => {
    if (gap.from !== "0-0") addMessage(new Date().toISOString(), "gap", "Some messages are not kept any more.");
  });
  socket.on("snapshot", (snapshot) => {
    for (const state of snapshot.states) showState(state.device, state.deviceName, state.stateName, state.value, state.changedAt);
    position = snapshot.complete ? snapshot.position : position;
  });
  for (const event of EVENTS) socket.on(event, show);
}

function show(message) {
  position = message.position;
  if (seen.has(message.id)) return; // every message comes at least once
  seen.add(message.id);
  if (seen.size > KEPT) seen.delete(seen.values().next().value);
  const data = message.data;
  if ("stateName" in data) {
    showState(message.device, data.deviceName, data.stateName, data.value, message.timestamp);
  }
  addMessage(message.timestamp, message.event, inWords(data));
}

function inWords(data) {
  if ("stateName" in data) return `${data.deviceName}: ${data.stateName} = ${data.value}`;
  if ("alarm" in data) return `${data.severity} alarm ${data.change}: ${data.type} at ${data.originatorName}`;
  if ("status" in data) return `${data.deviceName} is ${data.status}`;
  return [data.title, data.message].filter(Boolean).join(": ");
}

function showState(device, deviceName, stateName, value, since) {
  const key = `${device} ${stateName}`;
  const row = rows.get(key) || document.getElementById("states").insertRow();
  rows.set(key, row);
  fill(row, [deviceName, stateName, value === null ? "not known" : value, since ? new Date(since).toLocaleString() : ""]);
}

function addMessage(time, event, what) {
  const table = document.getElementById("messages");
  fill(table.insertRow(0), [new Date(time).toLocaleTimeString(), event, what]);
  if (table.rows.length > KEPT) table.deleteRow(KEPT);
}

function fill(row, texts) {
  row.replaceChildren(...texts.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
}

function say(kind, text) {
  const status = document.getElementById("status");
  status.dataset.kind = kind;
  status.textContent = text;
}

async function access() {
  const { exp } = JSON.parse(atob(tokens.access.split(".")[1].replace(/-/g, "+").replace(/_/g, "/")));
  if (exp * 1000 < Date.now() + 5000) tokens = { ...tokens, ...(await post("refresh", { refresh: tokens.refresh })) };
  return tokens.access;
}

async function post(what, sent) {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(`/api/v1/auth/${what}`, { method: "POST", headers, body: JSON.stringify(sent) });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail || JSON.stringify(body));
  return body;
}
