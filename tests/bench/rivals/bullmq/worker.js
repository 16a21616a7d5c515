// BullMQ: each job is one call, under BullMQ's own limiter, which is global for a queue.
import { Queue, Worker } from "bullmq";
import { QUEUE, connect } from "./queue.js";

const OVER_THE_QUOTA = 60007;
// Its windows are fixed: a second of the API's may touch eleven of a tenth, which together stay below the quota.
const QUOTA = Number(process.env.IMATTR_QUOTA ?? 100);
const LIMITER = { max: Math.floor((QUOTA * 9) / 100), duration: 100 };

const queue = new Queue(QUEUE, { connection: connect() });

async function call(users) {
  const random = Math.floor(Math.random() * 2 ** 32);
  const response = await fetch(`${process.env.CALL_URL}&random=${random}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ UserAttrs: users.map(([user, attrs]) => ({ To_Account: user, Attrs: attrs })) }),
    signal: AbortSignal.timeout(10_000),
  });
  return response.json();
}

const worker = new Worker(
  QUEUE,
  async (job) => {
    const { ErrorCode: code } = await call(job.data);
    if (code === OVER_THE_QUOTA) {
      // As documented for an API that says "too many requests": all workers pause, the job goes back.
      await queue.rateLimit(1000);
      throw Worker.RateLimitError();
    }
    if (code !== 0) throw new Error(`code ${code}`);
  },
  { connection: connect(), concurrency: 16, limiter: LIMITER },
);
worker.on("error", (error) => console.error(error));
