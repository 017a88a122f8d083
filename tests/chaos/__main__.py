"""`python -m tests.chaos`: run the audit, tell what was done and what was found. Exit status 0 only where the account is clean."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from benchmarks.ground import commit
from recall_worker.line import Dates

from . import account as accounting
from . import report as reporting
from .account import Account, Records
from .api import Api
from .faults import KINDS, Schedule
from .hand import Hand
from .stage import FAKETIME, LEASE, Stage, install, scratch

DRAIN_MOST = 330.0
"""Seconds in which everything must have ended when the application has fallen silent: the longest backoff of a recall that was deferred again and
again, and some. Most often it takes ten."""


async def audit(
    seed: int, minutes: float, *, site: Path, folder: Path, replicas: int = 3, kinds: list[str] | None = None, rate: float = 25.0
) -> tuple[Account, Schedule]:
    """One run of the audit: the account, and the faults."""
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(Api(seed))
        stage = await stack.enter_async_context(Stage(api, replicas, site, folder, {}))
        api.agent = hand = await stack.enter_async_context(Hand(stage.dsn, seed))
        hand.rate = rate
        schedule = Schedule(stage, hand, seed, kinds or list(KINDS))
        await stage.up()
        silence = asyncio.Event()
        living = asyncio.create_task(hand.live(silence))
        await schedule.run(minutes * 60)
        silence.set()
        await living
        left = await _drained(hand)
        rows, marks = await hand.insist(_tables)
        statuses = await stage.end()
        records = Records(api, hand.journal, {row["id"]: row for row in rows}, marks, schedule.faults, schedule.calm)
        account = accounting.settle_up(records)
        account.findings += [f"recovery: {said}" for said in schedule.stuck]
        if left:
            account.findings.append(f"drain: {left} recalls had not ended {DRAIN_MOST:.0f} s after the application fell silent")
        account.findings += [f"stop: exit status {status} after SIGTERM" for status in statuses if status != 0]
        account.findings += [
            f"crash: {r.slot} ended with {status} unasked"
            for r in stage.replicas
            for status in r.statuses
            if status not in (0, -9)
        ]
        (folder / "evidence").write_text(_evidence(account, records), encoding="utf-8")
        account.facts["workers started"] = sum(r.starts for r in stage.replicas)
        return account, schedule


async def _drained(hand: Hand) -> int:
    """The application cancels what would go on for ever, and waits; how many have not ended in time."""

    async def cancel(conn: psycopg.AsyncConnection[Any]) -> list[tuple[str]]:
        cursor = await conn.execute(
            "update session_recalls set status = 'cancelled', updated_at = now()"
            " where call_type = 'recurring' and status in ('pending', 'running') returning id"
        )
        return await cursor.fetchall()

    for (id,) in await hand.insist(cancel):
        hand.journal.promises[id].maybe_ended = True

    async def live(conn: psycopg.AsyncConnection[Any]) -> int:
        found = await (
            await conn.execute(
                "select count(*) from session_recalls where status in ('pending', 'running') or lease_until > now()"
            )
        ).fetchone()
        return 0 if found is None else int(found[0])

    end = time.monotonic() + DRAIN_MOST
    left = 1
    while left and time.monotonic() < end:
        left = await hand.insist(live)
        await asyncio.sleep(0.2)
    return left


async def _tables(conn: psycopg.AsyncConnection[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    conn.adapters.register_loader("timestamptz", Dates)
    async with conn.cursor(row_factory=dict_row) as cursor:
        rows = await (await cursor.execute("select * from session_recalls")).fetchall()
        marks = await (await cursor.execute("select * from recall_attempts")).fetchall()
    return rows, marks


def _evidence(account: Account, records: Records) -> str:
    """All that is on record of the recalls and sessions that findings name."""
    said = "\n".join(account.findings)
    lines = [said]
    for promise in records.journal.promises.values():
        if promise.id in said or f" {promise.session}:" in said:
            lines += ["", str(promise), str(records.rows.get(promise.id))]
            lines += [f"  {call}" for call in records.by_recall[promise.id]]
            lines += [f"  {mark}" for mark in records.marks_of[promise.id]]
    return "\n".join([*lines, "", *map(str, records.faults), *map(str, records.calm)])


def told(made_of: str, seed: int, minutes: float, account: Account, schedule: Schedule) -> dict[str, Any]:
    """The result as one document. `made_of`: the commit that was audited."""
    recovered: dict[str, list[float]] = defaultdict(list)
    for fault in schedule.faults:
        if fault.recovered is not None and fault.ended is not None:
            recovered[fault.kind].append(fault.recovered - fault.ended)
    return {
        "commit": made_of,
        "seed": seed,
        "minutes": minutes,
        "lease": LEASE,
        **account.facts,
        "faults": dict(sorted(Counter(f.kind for f in schedule.faults).items())),
        "seconds to recover": {kind: [round(seconds, 2) for seconds in found] for kind, found in sorted(recovered.items())},
        "findings": account.findings,
    }


def show(result: dict[str, Any]) -> None:
    """For people, on stdout."""
    faults, recovery = result["faults"], result["seconds to recover"]
    print(f"\nseed {result['seed']}, {result['minutes']:g} minutes, a lease of {result['lease']} s")
    print(f"  {'FAULT':<24}{'TIMES':>6}   SECONDS TO RECOVER (median, most)")
    for kind, times in faults.items():
        found = recovery.get(kind)
        median, most = (f"{statistics.median(found):.2f}", f"{max(found):.2f}") if found else ("", "")
        print(f"  {kind:<24}{times:>6}   {median:>6}  {most:>6}")
    for name, value in result.items():
        if name not in ("seed", "minutes", "lease", "faults", "seconds to recover", "findings"):
            said = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else ", ".join(map(str, value))
                if isinstance(value, list)
                else value
            )
            print(f"  {name}: {said}")
    for finding in result["findings"][:40]:
        print(f"  FOUND  {finding}")
    if len(result["findings"]) > 40:
        print(f"  … and {len(result['findings']) - 40} more")
    print("  the account is clean" if not result["findings"] else f"  {len(result['findings'])} findings", flush=True)


def report(results: list[dict[str, Any]], document: Path | None) -> None:
    """Print the tables of these results, or write them into a document."""
    if document is None:
        print(reporting.written(results), end="")
        return
    text = document.read_text(encoding="utf-8")
    before, after = text[: text.index(reporting.BEGIN)], text[text.index(reporting.END) :]
    document.write_text(f"{before}{reporting.BEGIN}\n{reporting.written(results)}\n{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", default="101", help="a number, or a range such as 101-105: one run each")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long faults go on, each run")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--rate", type=float, default=25.0, help="what the application does in a second")
    parser.add_argument("--only", help="kinds of faults, with commas between: " + ", ".join(KINDS))
    parser.add_argument("--patch", type=Path, help="a patch to plant in the code that is audited")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="run nothing: report these results, written by --json"
    )
    parser.add_argument("--docs", type=Path, help="with --report: the document whose marked part is written anew")
    parser.add_argument("--keep", action="store_true", help="keep the workers' logs, and say where")
    given = parser.parse_args()
    if given.report:
        report([result for file in given.report for result in json.loads(file.read_text(encoding="utf-8"))], given.docs)
        return 0
    first, _, last = given.seed.partition("-")
    kinds = [kind.strip() for kind in given.only.split(",")] if given.only else None
    if wrong := sorted(set(kinds or []) - set(KINDS)):
        parser.error(f"no such fault: {', '.join(wrong)}")
    if FAKETIME is None:
        print("faketime is not installed: clocks will not jump", file=sys.stderr)
    results, made_of = [], commit()
    for seed in range(int(first), int(last or first) + 1):
        folder = scratch()
        try:
            site = install(folder, given.patch and given.patch.resolve())
            account, schedule = asyncio.run(
                audit(seed, given.minutes, site=site, folder=folder, replicas=given.replicas, kinds=kinds, rate=given.rate)
            )
            results.append(told(made_of, seed, given.minutes, account, schedule))
            show(results[-1])
        finally:
            if given.keep:
                print(f"  the logs are in {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if any(result["findings"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
