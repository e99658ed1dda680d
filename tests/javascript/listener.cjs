// A Socket.IO client for tests: options as JSON in the first argument, one JSON value a line out, requests as lines in.
//
// Options: urls, token, transports, position. The urls are tried in turn, each time with the position seen last. Printed:
// {"event", "data"} for what the server sends, {"connected": transport}, {"disconnected": reason}, {"refused": text}, and
// {"answer"} to a request, which is [event, argument]. The end of the input ends the program.
"use strict";
const readline = require("node:readline");
const { io } = require("socket.io-client");

const options = JSON.parse(process.argv[2]);
let position = options.position;
let attempt = 0;
let socket;

function print(value) {
  process.stdout.write(JSON.stringify(value) + "\n");
}

function connect() {
  const url = options.urls[attempt++ % options.urls.length];
  socket = io(url, {
    auth: position ? { token: options.token, position } : { token: options.token },
    transports: options.transports,
    forceNew: true,
    reconnection: false,
    timeout: 3000,
  });
  socket.on("connect", () => print({ connected: socket.io.engine.transport.name }));
  socket.on("connect_error", (error) => again({ refused: error.message }));
  socket.on("disconnect", (reason) => again({ disconnected: reason }));
  socket.onAny((event, data) => {
    if (data && data.position) position = data.position;
    print({ event, data });
  });
}

function again(why) {
  print(why);
  socket.offAny();
  socket.close();
  setTimeout(connect, 50);
}

readline
  .createInterface({ input: process.stdin })
  .on("line", (line) => socket.emit(...JSON.parse(line), (answer) => print({ answer })))
  .on("close", () => process.exit(0));
connect();
