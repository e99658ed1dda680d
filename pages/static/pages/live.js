// Hears the gateway over Socket.IO while a page is open. Without it nothing is lost: the page looks by itself, only less often.
"use strict";

const MESSAGES = ["device-state-change", "device-status", "alert"];
const AGAIN_MS = 15000;
const MOST = 180; // rooms that one connection may be in, and a few to spare

// variables: gives the uuids whose readings are wanted. onReading gets the newest of one, onMessage any other news.
function listen({ variables, onReading, onMessage }) {
  let socket = null;
  const asked = new Set();

  async function access() {
    const headers = { "X-CSRFToken": document.querySelector("meta[name=csrf-token]").content };
    const answer = await fetch(document.querySelector("meta[name=live]").content, { method: "POST", headers });
    if (!answer.ok || answer.redirected) throw new Error(`the server answered ${answer.status}`);
    return answer.json();
  }

  function ask() {
    for (const variable of variables()) {
      if (asked.has(variable) || asked.size >= MOST) continue;
      asked.add(variable);
      socket.emit("subscribe", { room: `telemetry-${variable}` });
    }
  }

  async function connect() {
    let first;
    try {
      first = await access();
    } catch {
      return void setTimeout(connect, AGAIN_MS); // the server is away, or the session has ended: the page itself says so
    }
    const auth = (give) => {
      const given = first ?? access(); // the token that came with the address is good for the first connection
      first = null;
      Promise.resolve(given).then(({ token }) => give({ token }), () => give({}));
    };
    socket = io(first.gateway, { auth, reconnectionDelayMax: AGAIN_MS });
    socket.on("connect", () => {
      asked.clear();
      ask();
      onMessage(); // what was missed until now
    });
    // The server said no, or ended the session, perhaps for a token that ran out: the library would not try again.
    for (const event of ["connect_error", "disconnect"]) socket.on(event, () => socket.active || setTimeout(() => socket.connect(), AGAIN_MS));
    socket.on("new-datastream", onReading);
    socket.on("datastream-batch", ({ variable, latest }) => onReading({ variable, ...latest }));
    for (const event of MESSAGES) socket.on(event, onMessage);
  }

  connect();
  return { isLive: () => Boolean(socket?.connected) && variables().length <= MOST, ask: () => socket?.connected && ask() };
}
