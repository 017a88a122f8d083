// pg-boss: its schema, a worker or a writer, as a process.
//
//     node pgboss.mjs schema|write DSN
//     node pgboss.mjs work DSN URL SLOTS
//
// With LISTEN and NOTIFY, and jobs fetched and settled by tens: what its documents advise for
// speed. The writer's protocol is in contenders.Writer.
import { createInterface } from "node:readline";
import { PgBoss } from "pg-boss";
import { Agent, request } from "undici";

const [what, dsn, url, slots] = [...process.argv.slice(2, 5), Number(process.argv[5])];
const MESSAGE = "Look at the build again, and say whether it is green. ".repeat(4);
const BATCH = 10;

const boss = new PgBoss({
  connectionString: dsn,
  max: what === "work" ? Math.min(25, slots + 2) : 2,
  useListenNotify: true,
  // What a worker of the application would supervise is the worker's; a writer does nothing else.
  supervise: what === "work",
  schedule: what === "work",
});
boss.on("error", (error) => console.error(error));

async function schema() {
  await boss.start();
  await boss.createQueue("call", { notify: true });
  await boss.stop({ graceful: false });
  process.exit(0);
}

async function write() {
  await boss.start();
  for await (const line of createInterface({ input: process.stdin })) {
    const { session, due, rows } = JSON.parse(line);
    const made = (name) => ({
      data: { session: name, message: MESSAGE },
      ...(due ? { startAfter: new Date(due) } : {}),
    });
    if (rows === undefined) {
      const { data, ...options } = made(session);
      await boss.send("call", data, options);
    } else {
      const jobs = Array.from({ length: rows }, (_, n) => made(`${session}${n + 1}`));
      await boss.insert("call", jobs);
    }
    console.log(JSON.stringify({ at: Number(process.hrtime.bigint()) }));
  }
  process.exit(0);
}

async function work() {
  const dispatcher = new Agent({ connections: slots, pipelining: 1, keepAliveTimeout: 4000 });
  const call = async (job) => {
    const { session, message } = job.data;
    const body = JSON.stringify({
      session_id: session,
      user_message: message,
      system_message: `[Scheduled recall] ${message}`,
      recall: { id: session, call_type: "once", occurrence: 1 },
    });
    const answer = await request(url.replace("{session_id}", encodeURIComponent(session)), {
      method: "POST",
      dispatcher,
      headers: { "content-type": "application/json", "idempotency-key": `${job.id}:1` },
      body,
    });
    await answer.body.json();
  };
  await boss.start();
  const options = {
    batchSize: BATCH,
    localConcurrency: Math.max(1, Math.floor(slots / BATCH)),
    burstWhenBatchFull: true,
  };
  await boss.work("call", options, (jobs) => Promise.all(jobs.map(call)));
}

await { schema, write, work }[what]();
