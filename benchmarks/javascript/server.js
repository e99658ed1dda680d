// One reading in a request is one job in BullMQ, and is answered once Redis has it. Takes the ports of itself and of Redis, and its password.
"use strict";

const express = require("express");
const { Queue } = require("bullmq");

const [port, redisPort, password] = process.argv.slice(2);
const queue = new Queue("readings", { connection: { host: "127.0.0.1", port: Number(redisPort), password } });
const app = express();

app.use(express.json());
app.get("/", (_request, response) => response.send("hello"));
app.post("/telemetry", async (request, response) => {
  const job = await queue.add("reading", request.body);
  response.status(202).json({ id: job.id });
});
app.listen(Number(port), "127.0.0.1");
