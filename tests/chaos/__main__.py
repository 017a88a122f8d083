"""`python -m tests.chaos`: run the audit, tell what was done and what was found. Exit status 0 only
where the account is clean."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from recall_worker.database.values import Dates

from ..support.daemon import FAKETIME
from . import account as accounting
from . import report as reporting
from .account import STOOD_STILL, Account, Records
from .api import Api
from .drawn import RUN_TIMEOUT, Drawn, draw
from .faults import KINDS, Fault, Schedule
from .hand import Hand
from .journal import resolve
from .people import People
from .stage import Stage, commit, install, scratch

SLOW_MS = 150
"""Milliseconds of the usual lag in calm phases beyond which the account's bounds on time say
little."""
NOT_SHOWN = ("seed", "minutes", "commit", "kinds", "faults", "seconds to recover", "findings")
"""Of a result, what is shown otherwise or not at all."""
STOOD_MOST = 0.25
"""The part of a lease for which the machine may stand still: a worker that is kept waiting for
longer loses leases, as it would by a SIGSTOP that is on no record."""
TIMED = ("lateness", "intervals", "moved", "hung up", "heard", "pages", "recovery", "drain", "stop")
"""The rules with bounds in seconds, which say nothing where the machine stood still for one."""
TIMED_STOOD_MOST = 1.0
HUNG = ("spins", "recovery", "drain", "stop", "leases")
"""The rules by which something did not come to its end."""
HOPELESS_MOST = 30.0
"""Seconds in which what can still end has ended, where workers have stopped for good."""


async def audit(
    seed: int,
    minutes: float,
    drawn: Drawn,
    *,
    site: Path,
    folder: Path,
    kinds: list[str] | None = None,
    alone: bool = False,
) -> tuple[Account, Schedule]:
    """One run of the audit: the account, and the faults. `alone`: the application is, without
    operators and agents beside it."""
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(Api(seed))
        stage = await stack.enter_async_context(Stage(api, site, folder, drawn))
        api.agent = hand = await stack.enter_async_context(Hand(stage.dsn, seed, site, drawn))
        hand.rate = drawn.rate
        people = await stack.enter_async_context(People(stage, hand, seed, drawn))
        schedule = Schedule(stage, hand, people, seed, kinds or list(KINDS))
        await stage.up()
        await hand.fill_stock()
        silence = asyncio.Event()
        beside = () if alone else (people.live(silence),)
        living = asyncio.gather(hand.live(silence), *beside)
        await schedule.run(minutes * 60)
        silence.set()
        await living
        left = await _drained(hand, api, drawn, hopeless=bool(stage.spins or schedule.stuck))
        rows, marks, actions = await hand.until_done(_tables)
        statuses = await stage.end()
        differs = resolve(hand.journal, actions)
        everybody = frozenset(replica.slot for replica in stage.replicas)
        stood = [Fault(STOOD_STILL, since, everybody, until) for since, until in stage.stands]
        records = Records(
            api,
            hand.journal,
            {row["id"]: row for row in rows},
            marks,
            [*schedule.faults, *stood],
            schedule.calm,
            drawn,
            stage.spins,
            differs,
            people.answers,
        )
        account = accounting.settle_up(records)
        account.findings += [f"recovery: {said}" for said in schedule.stuck]
        if left:
            account.findings.append(
                f"drain: {left} recalls had not ended {drawn.drain_most:.0f} s after the "
                f"application fell silent"
            )
        account.findings += [
            f"stop: exit status {status} after SIGTERM" for status in statuses if status != 0
        ]
        account.findings += [
            f"crash: {name} ended with {status} unasked"
            for name, all_of_them in (
                *((r.slot, r.statuses) for r in stage.replicas),
                *((s.name, s.statuses[:-1]) for s in stage.services),
            )
            for status in all_of_them
            if status not in (0, -9)
        ]
        account.findings += [
            f"crash: {service.name} wrote {count} tracebacks"
            for service in stage.services
            if (count := service.tracebacks())
        ]
        (folder / "evidence").write_text(_evidence(account, records), encoding="utf-8")
        account.facts["workers started"] = sum(r.starts for r in stage.replicas)
        account.facts["the machine stood still, s"] = round(
            max((until - since for since, until in stage.stands), default=0.0), 2
        )
        account.facts["postgresql"] = stage.version
        account.facts["live events of the console"] = people.events
        return account, schedule


async def _drained(hand: Hand, api: Api, drawn: Drawn, *, hopeless: bool) -> int:
    """The application cancels what would go on for ever, or waits for an hour, resumes what is
    paused, and waits; how many have not ended in time. `hopeless`: workers were found to have
    stopped for good, so it is not waited for long."""

    async def cancel(conn: psycopg.AsyncConnection[Any]) -> list[tuple[str]]:
        cursor = await conn.execute(
            "update session_recalls set status = 'cancelled', updated_at = now()"
            " where (call_type = 'recurring' or (lease is null and trigger_at > now() + interval "
            "'20 minutes'))"
            " and status in ('pending', 'running') returning id"
        )
        return await cursor.fetchall()

    async def resume(conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute(
            "update session_recalls set paused_at = null, updated_at = now() where paused_at is "
            "not null and (trigger_at < now() + interval '20 minutes' or call_type = 'recurring')"
        )

    async def end() -> None:
        hand.journal.swept |= {str(id) for (id,) in await hand.until_done(cancel)}

    hand.journal.resumed = time.time()
    await hand.until_done(resume)
    await end()

    async def live(conn: psycopg.AsyncConnection[Any]) -> int:
        found = await (
            await conn.execute(
                "select count(*) from session_recalls where status in ('pending', 'running') or "
                "(lease is not null and lease_until > now())"
            )
        ).fetchone()
        return 0 if found is None else int(found[0])

    until = time.monotonic() + (HOPELESS_MOST if hopeless else drawn.drain_most)
    left = 1
    while left and time.monotonic() < until:
        if drawn.session_limit is not None:
            await end()
        left = await hand.until_done(live)
        await asyncio.sleep(0.2)
    # A call whose recall is gone ends a little later, and leaves its mark then.
    until = time.monotonic() + RUN_TIMEOUT
    while api.open() and time.monotonic() < until:  # noqa: ASYNC110 - a count
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    return left


async def _tables(
    conn: psycopg.AsyncConnection[Any],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """session_recalls (ids as text), recall_attempts, and recall_actions in their order."""
    conn.adapters.register_loader("timestamptz", Dates)
    async with conn.cursor(row_factory=dict_row) as cursor:
        rows = await (
            await cursor.execute("select *, id::text as id from session_recalls")
        ).fetchall()
        marks = await (await cursor.execute("select * from recall_attempts")).fetchall()
        actions = await (
            await cursor.execute("select * from recall_actions order by id")
        ).fetchall()
    return rows, marks, actions


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


def told(
    seed: int,
    minutes: float,
    drawn: Drawn,
    audited: str | None,
    account: Account,
    schedule: Schedule,
) -> dict[str, Any]:
    """The result as one document."""
    recovered: dict[str, list[float]] = defaultdict(list)
    for fault in schedule.faults:
        if fault.recovered is not None and fault.ended is not None:
            recovered[fault.kind].append(fault.recovered - fault.ended)
    return {
        "seed": seed,
        "minutes": minutes,
        "commit": audited,
        "settings": drawn.shown,
        **account.facts,
        "faults": dict(sorted(Counter(f.kind for f in schedule.faults).items())),
        "seconds to recover": {
            kind: [round(seconds, 2) for seconds in found]
            for kind, found in sorted(recovered.items())
        },
        "kinds": list(KINDS),
        "kinds not reached": schedule.missed,
        "hung": sum(finding.startswith(HUNG) for finding in account.findings),
        "findings": account.findings,
    }


def is_void(result: Mapping[str, Any]) -> bool:
    """Whether its findings may be the machine's, which was slow in calm phases or stood still."""
    lags, stood = (
        result["lag in calm phases, ms (p50, p99, most)"],
        result["the machine stood still, s"],
    )
    if stood > STOOD_MOST * result["settings"]["lease"]:
        return bool(result["findings"])
    slow = stood > TIMED_STOOD_MOST or (bool(lags) and lags[0] > SLOW_MS)
    timed = [finding for finding in result["findings"] if finding.startswith(TIMED)]
    return slow and timed != [] and len(timed) == len(result["findings"])


def show(result: dict[str, Any]) -> None:
    """For people, on stdout."""
    faults, recovery = result["faults"], result["seconds to recover"]
    print(f"\nseed {result['seed']}, {result['minutes']:g} minutes, commit {result['commit']}")
    print(f"  {'FAULT':<24}{'TIMES':>6}   SECONDS TO RECOVER (median, most)")
    for kind, times in faults.items():
        found = recovery.get(kind)
        median, most = (
            (f"{statistics.median(found):.2f}", f"{max(found):.2f}") if found else ("", "")
        )
        print(f"  {kind:<24}{times:>6}   {median:>6}  {most:>6}")
    for name, value in result.items():
        if name not in NOT_SHOWN:
            said = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else ", ".join(map(str, value))
                if isinstance(value, list)
                else value
            )
            print(f"  {name}: {said}")
    if is_void(result):
        print("  VOID: the machine is too slow, or does too much else: what is found says little")
    for finding in result["findings"][:40]:
        print(f"  FOUND  {finding}")
    if len(result["findings"]) > 40:
        print(f"  … and {len(result['findings']) - 40} more")
    print(
        "  the account is clean"
        if not result["findings"]
        else f"  {len(result['findings'])} findings",
        flush=True,
    )


def report(results: list[dict[str, Any]], document: Path | None) -> None:
    """Print the tables of these results, or write them into a document."""
    if document is None:
        print(reporting.written(results), end="")
        return
    text = document.read_text(encoding="utf-8")
    before, after = text[: text.index(reporting.BEGIN)], text[text.index(reporting.END) :]
    document.write_text(
        f"{before}{reporting.BEGIN}\n{reporting.written(results)}\n{after}", encoding="utf-8"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "--seed",
        "--seeds",
        default="101",
        help="a number, or a range such as 101-103: one run each",
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="write each seed's result into this folder as soon as it is there, as SEED.json, and "
        "all of them into all.json; seeds whose result is there already are not run again. What a "
        "machine that stood still has found is void: SEED.void.json, and run again next time",
    )
    parser.add_argument(
        "--minutes", type=float, default=1.0, help="how long faults go on, each run"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side, each with a PostgreSQL of its own"
    )
    parser.add_argument("--replicas", type=int, default=3)
    for name, what in (
        ("lease", "seconds"),
        ("slots", "a number"),
        ("fleet", "a number, or off"),
        ("session-limit", "runs an hour, or off"),
    ):
        parser.add_argument(f"--{name}", help=f"{what}; drawn by the seed where not given")
    parser.add_argument("--only", help="kinds of faults, with commas between: " + ", ".join(KINDS))
    parser.add_argument(
        "--alone",
        action="store_true",
        help="no operators or agents beside the application: what hangs, a person may free",
    )
    parser.add_argument(
        "--patch", type=Path, help="a defect of tests/planted, for the code that is audited"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing: report these results, written by --json",
    )
    parser.add_argument(
        "--docs", type=Path, help="with --report: the document whose marked part is written anew"
    )
    parser.add_argument("--keep", action="store_true", help="keep the workers' logs, and say where")
    given = parser.parse_args()
    if given.report:
        report(
            [
                result
                for file in given.report
                for result in json.loads(file.read_text(encoding="utf-8"))
            ],
            given.docs,
        )
        return 0
    first, _, last = given.seed.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    kinds = [kind.strip() for kind in given.only.split(",")] if given.only else None
    if wrong := sorted(set(kinds or []) - set(KINDS)):
        parser.error(f"no such fault: {', '.join(wrong)}")
    try:
        settings = {seed: _settings(seed, given) for seed in seeds}
    except ValueError as error:
        parser.error(f"--lease, --slots, --fleet and --session-limit take numbers: {error}")
    if FAKETIME is None:
        print("faketime is not installed: clocks will not jump", file=sys.stderr)
    known = _known(given.into, seeds)
    missing = [seed for seed in seeds if seed not in known]
    if given.jobs > 1 and len(missing) > 1:
        found = side_by_side(missing, given.jobs, sys.argv[1:])
    else:
        found = []
        for seed in missing:
            found.append(_one(seed, given, settings[seed], kinds))
            if given.into is not None:
                void = ".void" if is_void(found[-1]) else ""
                _write(given.into / f"{seed}{void}.json", found[-1:])
    by_seed = known | {result["seed"]: result for result in found}
    results = [by_seed[seed] for seed in seeds if seed in by_seed]
    if given.into is not None:
        results = [result for result in results if not is_void(result)]
        _write(given.into / "all.json", results)
        print(f"\n{reporting.summed_up(results)}", end="")
    if given.json is not None:
        _write(given.json, results)
    if len(seeds) > 1 and kinds is None:
        missed = reporting.not_reached(results)
        print(f"\nkinds of faults that no seed reached: {', '.join(missed) or 'none'}")
    clean = len(results) == len(seeds) and not any(result["findings"] for result in results)
    return 0 if clean else 1


def _known(folder: Path | None, seeds: list[int]) -> dict[int, dict[str, Any]]:
    """The results that are there already, by seed."""
    if folder is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        file = folder / f"{seed}.json"
        if file.exists():
            (known[seed],) = json.loads(file.read_text(encoding="utf-8"))
    return known


def _write(file: Path, results: list[dict[str, Any]]) -> None:
    """All of it or nothing: a run that is ended meanwhile leaves no half of a file."""
    half = file.with_suffix(".half")
    half.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    half.replace(file)


def _settings(seed: int, given: argparse.Namespace) -> Drawn:
    """What the seed draws, but for what was given. Raises ValueError."""

    def number(text: str) -> int | None:
        return None if text == "off" else int(text)

    more: dict[str, Any] = {}
    if given.lease is not None:
        more["lease"] = float(given.lease)
    if given.slots is not None:
        more["slots"] = int(given.slots)
    if given.fleet is not None:
        more["fleet"] = number(given.fleet)
    if given.session_limit is not None:
        more["session_limit"] = number(given.session_limit)
    return dataclasses.replace(draw(seed, given.replicas), **more)


def _one(
    seed: int, given: argparse.Namespace, drawn: Drawn, kinds: list[str] | None
) -> dict[str, Any]:
    """One run, shown; its result."""
    folder = scratch()
    try:
        audited = commit()
        if audited is not None and given.patch is not None:
            audited += f" with {given.patch.name}"
        site = install(folder, given.patch and given.patch.resolve())
        account, schedule = asyncio.run(
            audit(
                seed,
                given.minutes,
                drawn,
                site=site,
                folder=folder,
                kinds=kinds,
                alone=given.alone,
            )
        )
        result = told(seed, given.minutes, drawn, audited, account, schedule)
        show(result)
    finally:
        if given.keep:
            print(f"  the logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return result


def side_by_side(seeds: list[int], jobs: int, words: list[str]) -> list[dict[str, Any]]:
    """A process for each seed, so many at once; the results of those that came to an end, in the
    seeds' order. What they show is shown whole, one after the other."""
    results: dict[int, dict[str, Any]] = {}

    async def one(seed: int, turns: asyncio.Semaphore, folder: Path) -> None:
        file = folder / f"{seed}.json"
        # The last of an option counts.
        mine = [*words, "--seed", str(seed), "--jobs", "1", "--json", str(file)]
        async with turns:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.chaos",
                *mine,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            said, _ = await process.communicate()
        print(said.decode(errors="replace"), end="", flush=True)
        if file.exists():
            (results[seed],) = json.loads(file.read_text(encoding="utf-8"))
        else:
            print(f"  seed {seed} came to no result: exit status {process.returncode}")

    async def all_of_them(folder: Path) -> None:
        turns = asyncio.Semaphore(jobs)
        await asyncio.gather(*(one(seed, turns, folder) for seed in seeds))

    with tempfile.TemporaryDirectory(prefix="recall-chaos-") as folder:
        asyncio.run(all_of_them(Path(folder)))
    return [results[seed] for seed in seeds if seed in results]


if __name__ == "__main__":
    sys.exit(main())
