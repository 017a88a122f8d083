// graphile-worker as on its performance page: local queue, batched completion, a pool as large as
// the concurrency (up to 25).
import { Logger, run } from "graphile-worker";
import { Agent, request } from "undici";

const [dsn, url, slots] = [process.argv[2], process.argv[3], Number(process.argv[4])];
const dispatcher = new Agent({ connections: slots, pipelining: 1, keepAliveTimeout: 4000 });

async function call(payload, helpers) {
  const body = JSON.stringify({
    session_id: payload.session,
    user_message: payload.message,
    system_message: `[Scheduled recall] ${payload.message}`,
    recall: { id: payload.session, call_type: "once", occurrence: 1 },
  });
  const answer = await request(url.replace("{session_id}", encodeURIComponent(payload.session)), {
    method: "POST",
    dispatcher,
    headers: { "content-type": "application/json", "idempotency-key": `${helpers.job.id}:1` },
    body,
  });
  await answer.body.json();
}

const runner = await run({
  preset: {
    worker: {
      connectionString: dsn,
      concurrentJobs: slots,
      maxPoolSize: Math.min(25, slots + 2),
      localQueue: { size: 500 },
      completeJobBatchDelay: 0,
      failJobBatchDelay: 0,
      logger: new Logger(() => () => {}),
    },
  },
  taskList: { call },
});
await runner.promise;
