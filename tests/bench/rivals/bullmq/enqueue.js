// Enqueues a file of events, one JSON array [user, attributes, ms] a line, and prints the seconds it took.
//   node enqueue.js FILE EVENTS_A_JOB
import { readFileSync } from "node:fs";
import { Queue } from "bullmq";
import { QUEUE, connect } from "./queue.js";

const JOBS_AT_A_TIME = 1000;

const [, , file, size] = process.argv;
const events = readFileSync(file, "utf8").trimEnd().split("\n").map((line) => JSON.parse(line));
const connection = connect();
const queue = new Queue(QUEUE, { connection });
await queue.waitUntilReady();

function* jobs() {
  for (let first = 0; first < events.length; first += Number(size)) {
    // A call must not name a user twice.
    const users = new Map();
    for (const [user, attrs] of events.slice(first, first + Number(size))) {
      users.set(user, { ...users.get(user), ...attrs });
    }
    const opts = { attempts: 20, backoff: { type: "exponential", delay: 250, jitter: 1 }, removeOnComplete: true };
    yield { name: "set", data: [...users], opts };
  }
}

const start = performance.now();
let chunk = [];
for (const job of jobs()) {
  if (chunk.push(job) === JOBS_AT_A_TIME) await queue.addBulk(chunk.splice(0));
}
if (chunk.length) await queue.addBulk(chunk);
console.log((performance.now() - start) / 1000);
await queue.close();
connection.disconnect();
