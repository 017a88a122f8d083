"""docs/other-languages.md: its TypeScript, compiled and executed with packages from npm, against
PostgreSQL, a worker, and `check-endpoint`."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from recall_worker import Recalls

from ..conftest import Connection
from ..support.daemon import Daemons
from .test_commands import BIN, ended, heard

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "other-languages.md"
PACKAGES = ("pg@8", "@types/pg@8", "@types/node@20", "typescript@5")
COMPILE = "--strict --noEmitOnError --target es2022 --module nodenext --skipLibCheck"

APPLICATION = """
import assert from "node:assert/strict";
import pg from "pg";
import { cancel, list, reschedule, schedule, skipNext, RecallExists } from "./recalls.js";

const pool = new pg.Pool({ connectionString: process.env.RECALL_DSN });
const hour = 3600;
const id = await schedule(pool, "one", "look", { inSeconds: hour });
await assert.rejects(schedule(pool, "one", "again", { inSeconds: 1 }), RecallExists);
await assert.rejects(schedule(pool, "nobody", "x", { inSeconds: 1 }), pg.DatabaseError);
const [first] = await list(pool, "one");
const distance = (first!.trigger_at.getTime() - Date.now()) / 1000;
assert.ok(distance > hour - 600 && distance < hour + 600, String(distance));
assert.deepEqual([first!.id, first!.call_type, first!.status], [id, "once", "pending"]);
const at = new Date("2030-01-31T09:00:00Z");
assert.equal(await reschedule(pool, "two", id, at), false);
assert.equal(await reschedule(pool, "one", id, at), true);
assert.deepEqual((await list(pool, "one"))[0]!.trigger_at, at);
assert.equal(await skipNext(pool, "one"), false);
assert.equal(await cancel(pool, "one"), 1);
assert.equal(await cancel(pool, "one"), 0);

await schedule(pool, "one", "inbox", { everySeconds: hour });
const before = (await list(pool, "one")).find((recall) => recall.status === "pending")!;
assert.equal(await skipNext(pool, "one"), true);
const after = (await list(pool, "one")).find((recall) => recall.status === "pending")!;
assert.equal(after.trigger_at.getTime() - before.trigger_at.getTime(), hour * 1000);
assert.equal(await cancel(pool, "one"), 1);

// In a transaction: the recall exists exactly if the message does; a savepoint saves the rest.
const client = await pool.connect();
await client.query("begin");
await schedule(client, "one", "rolled back", { inSeconds: 1 });
await client.query("rollback");
assert.equal((await list(pool, "one")).filter((recall) => recall.status === "pending").length, 0);
await client.query("begin");
await schedule(client, "one", "kept", { at: new Date() });
await client.query("savepoint before_recall");
await assert.rejects(schedule(client, "one", "second", { at: new Date() }), RecallExists);
await client.query("rollback to savepoint before_recall");
await client.query("commit");
client.release();
console.log((await list(pool, "one")).find((recall) => recall.status === "pending")!.id);
await pool.end();
"""

AGENT = """
import pg from "pg";
import type { AddressInfo } from "node:net";
import { createInterface } from "node:readline";
import { setTimeout } from "node:timers/promises";
import { createTables, hold, serve, take } from "./endpoint.js";

const pool = new pg.Pool({ connectionString: process.env.RECALL_DSN });
await createTables(pool);
let runs = 0;
const server = serve(
  pool,
  async (sessionId, message) => {
    await setTimeout(300);
    return `run ${++runs} in ${sessionId}: ${message}`;
  },
  "s3cret",
);
const lines = createInterface(process.stdin)[Symbol.asyncIterator]();
async function chat(): Promise<void> {
  while (!(await lines.next()).done) {
    const lease = await take(pool, "one");
    await hold(pool, lease!, async () => {
      console.log("the chat has the session");
      await lines.next();
    });
  }
}
void chat();
server.listen(0, "127.0.0.1", () => {
  console.log(`listens on ${(server.address() as AddressInfo).port} now`);
});
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's code, and the tests', as JavaScript. Skips without npm."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    cache = Path(os.environ.get("RECALL_TEST_CACHE") or tempfile.gettempdir())
    cache /= f"recall-test-npm-{os.getuid()}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "complete").exists():
            (cache / "package.json").write_text('{"type": "module", "private": true}')
            quiet = ["--no-fund", "--no-audit", "--ignore-scripts", "--silent"]
            command = [npm, "install", *quiet, *PACKAGES]
            if subprocess.run(command, cwd=cache, check=False).returncode != 0:
                pytest.skip(f"npm can't install {' '.join(PACKAGES)}")
            (cache / "complete").touch()
    folder = tmp_path_factory.mktemp("typescript")
    (folder / "node_modules").symlink_to(cache / "node_modules")
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    page = dict(
        re.findall(
            r"^<!-- (\w+\.ts) -->\n```ts\n(.*?)^```$",
            PAGE.read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        )
    )
    assert set(page) == {"recalls.ts", "endpoint.ts"}
    for name, text in (page | {"application.ts": APPLICATION, "agent.ts": AGENT}).items():
        (folder / name).write_text(text, encoding="utf-8")
    compiler = folder / "node_modules" / "typescript" / "bin" / "tsc"
    done = subprocess.run(
        ["node", compiler, *COMPILE.split(), "application.ts", "agent.ts"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for package in ("pg", "typescript"):
        found = json.loads((cache / "node_modules" / package / "package.json").read_text())
        print(package, found["version"])
    return folder


@pytest.fixture
async def sessions(db: Connection) -> None:
    await db.execute("insert into sessions (id, user_id) values ('one', 'ann'), ('two', 'bo')")


def environ(dsn: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RECALL_")} | {
        "RECALL_DSN": dsn
    }


def output(command: list[str], folder: Path, environ: dict[str, str]) -> str:
    """What a program says, after it has ended well."""
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.05)


class Agent:
    """agent.js, or another module, as a process, and a person who may enter its chat in session
    `one`, and leave."""

    def __init__(self, folder: Path, dsn: str, module: str = "agent.js") -> None:
        self._process = subprocess.Popen(
            ["node", module],
            cwd=folder,
            env=environ(dsn),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        port = heard(self._process, " now").split()[2]
        self.url = f"http://127.0.0.1:{port}/sessions/{{session_id}}/run"

    def enter(self) -> None:
        self.leave()
        heard(self._process, "the chat has the session")

    def leave(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        if self._process.poll() is None:
            ended(self._process)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.usefixtures("sessions")
async def test_scheduling_with_pg(compiled: Path, database: str, daemons: Daemons) -> None:
    """Each function does what the page says; what it schedules in a transaction is fired."""
    said = await asyncio.to_thread(output, ["node", "application.js"], compiled, environ(database))
    daemon = await daemons.start()
    await daemon.hears("recall.settled", within=60, recall=said.strip(), status="fired")


@pytest.mark.usefixtures("sessions")
async def test_the_run_endpoint_in_typescript(
    compiled: Path, database: str, db: Connection
) -> None:
    """`check-endpoint` passes whole; a worker is told that the session is busy while the chat has
    it, and its recall is fired afterwards."""
    agent = await asyncio.to_thread(Agent, compiled, database)
    try:
        settings = {"RECALL_RUN_URL": agent.url, "RECALL_RUN_TOKEN": "s3cret"}
        check = [str(BIN / "recall-worker"), "check-endpoint", "--session", "two"]
        print(await asyncio.to_thread(output, check, compiled, environ(database) | settings))
        await asyncio.to_thread(agent.enter)
        recall = await Recalls().schedule("one", "look", conn=db)
        async with Daemons({"RECALL_DSN": database, **settings}) as daemons:
            daemon = await daemons.start()
            await daemon.hears("recall.settled", within=60, recall=recall.id, outcome="busy")
            agent.leave()
            await daemon.hears("recall.settled", within=60, recall=recall.id, status="fired")
    finally:
        await asyncio.to_thread(agent.end)


@pytest.mark.usefixtures("sessions")
async def test_a_process_that_dies_in_mid_run_frees_its_session(
    compiled: Path, database: str, db: Connection
) -> None:
    """Another process answers busy until the lease has ended, and then runs the same key again.
    (The lease is two seconds here, and the first agent never ends its run.)"""
    endpoint = (compiled / "endpoint.js").read_text()
    assert "const LEASE = 30;" in endpoint and "setTimeout(300)" in AGENT
    for name, wait in {"never": 10**8, "soon": 1}.items():
        (compiled / f"endpoint-{name}.js").write_text(endpoint.replace("LEASE = 30", "LEASE = 2"))
        agent = (
            (compiled / "agent.js").read_text().replace("setTimeout(300)", f"setTimeout({wait})")
        )
        (compiled / f"agent-{name}.js").write_text(
            agent.replace("./endpoint.js", f"./endpoint-{name}.js")
        )
    document = {"session_id": "one", "user_message": "look", "system_message": "", "recall": {}}
    headers = {"Authorization": "Bearer s3cret", "Idempotency-Key": "r:1"}
    dying = await asyncio.to_thread(Agent, compiled, database, "agent-never.js")
    living = await asyncio.to_thread(Agent, compiled, database, "agent-soon.js")
    try:
        async with httpx.AsyncClient(headers=headers, timeout=60, trust_env=False) as http:

            async def call(agent: Agent) -> httpx.Response:
                return await http.post(agent.url.replace("{session_id}", "one"), json=document)

            lost = asyncio.create_task(call(dying))

            async def is_held() -> bool:
                return bool(await (await db.execute("table agent_leases")).fetchall())

            async def is_free() -> bool:
                return (await call(living)).status_code != 409

            await until(is_held)
            assert (await call(living)).status_code == 409
            dying.kill()
            with pytest.raises(httpx.TransportError):
                await lost
            await until(is_free)
            answer = await call(living)
            assert (answer.status_code, answer.json()["output"]) == (200, "run 1 in one: look")
            assert answer.headers["idempotent-replayed"] == "true"
    finally:
        dying.end()
        living.end()
