"""What several runs of the audit come to, as the tables of docs/reliability.md. `python -m
tests.chaos --report FILE` prints them."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

BEGIN = (
    "<!-- measured: written by `python -m tests.chaos --report docs/reliability.json --docs "
    "docs/reliability.md` -->\n"
)
END = "<!-- /measured -->\n"
SUMS = (
    "recalls",
    "occurrences",
    "requests",
    "runs",
    "replays under the same key",
    "keys after a failed run",
    "lost",
    "doubled",
    "hung",
)
WHAT = {
    "kill": "SIGKILL of one or two workers",
    "term": "SIGTERM of a worker with runs open",
    "console kill": "SIGKILL of the console while a job of it acts on many",
    "mcp kill": "SIGKILL of the MCP server",
    "stop short": "SIGSTOP for less than a lease",
    "stop long": "SIGSTOP for up to two leases, then SIGCONT",
    "clock": "a host's clock jumps by a second, hours or weeks",
    "postgres kill short": "PostgreSQL killed (-9, all of it), back within a second",
    "postgres kill long": "PostgreSQL killed, back after three leases",
    "postgres restart": "PostgreSQL restarted in good order",
    "postgres frozen": "PostgreSQL stands still while a command or a job acts on many",
    "bells": "pg_terminate_backend of every LISTEN connection",
    "ledgers": "pg_terminate_backend of every other connection of the workers",
    "lone ring": "all bells cut off, and one insert while nobody hears",
    "full house": "PostgreSQL out of connections, the workers' own broken",
    "full disk": "PostgreSQL out of disk",
    "locks": "the application holds rows locked for longer than a lease",
    "database cut": "one or two workers' connections to PostgreSQL refused",
    "database cut for all": "everybody's, for up to two leases",
    "database slow": "200 ms more on each way",
    "database half open": "a worker's connections forgotten on the way",
    "database silent": "a worker cut off without a word for up to two leases",
    "api cut": "connections to the API refused",
    "api slow": "400 ms more on each way",
    "api silent": "connections to the API open, and silent",
    "api down": "the API answers 503 to everything",
    "api down slots full": "every slot in a call that hangs; PostgreSQL killed, then 503 to all",
    "api misconfigured": "the API answers 401 to everything",
}


def not_reached(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of faults that none of these runs struck, of those that the audit had then."""
    struck = {kind for result in results for kind in result["faults"]}
    known = {kind for result in results for kind in result.get("kinds", ())} or struck
    return sorted(known - struck)


def come_since(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of faults that the audit has, and had not when these runs were made."""
    known = {kind for result in results for kind in result.get("kinds", result["faults"])}
    return sorted(set(WHAT) - known)


def audited(results: Sequence[Mapping[str, Any]]) -> str:
    """Which code these runs audited, in a sentence."""
    named = sorted(
        {f"`{result['commit']}`" if result.get("commit") else "not recorded" for result in results}
    )
    return f"Audited commit: {', '.join(named)}."


def summed_up(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each seed, and one for all: for a terminal."""
    names = ("seed", "minutes", "occurrences", "faults", "lost", "doubled", "hung", "findings")
    lines = ["".join(f"{name.upper():>12}" for name in (*names, "p99 ms"))]
    sums = dict.fromkeys(names, 0.0)
    for result in results:
        lags = result["lag in calm phases, ms (p50, p99, most)"]
        cells = {name: result[name] for name in names} | {
            "faults": sum(result["faults"].values()),
            "findings": len(result["findings"]),
        }
        for name in names:
            sums[name] += cells[name]
        words = [f"{cells[name]:>12g}" for name in names]
        lines.append("".join([*words, f"{lags[1]:>12g}" if lags else ""]))
    lines.append("".join([f"{'all':>12}", *(f"{sums[name]:>12,g}" for name in names[1:])]))
    missed = ", ".join(not_reached(results)) or ("none" if results else "all of them")
    lines.append(f"kinds of faults that were not reached: {missed}")
    return "\n".join(lines) + "\n"


def _settings(result: Mapping[str, Any]) -> str:
    drawn = result["settings"]
    limit = drawn["session_limit"]
    cells = [
        result["seed"],
        drawn["slots"],
        drawn["fleet"] or "off",
        f"{drawn['lease']:g} s",
        f"{limit}/h" if limit else "off",
        # Before these were drawn they were always so.
        drawn.get("ids", "text"),
        drawn.get("queues", 1),
        drawn.get("pending_most", 1),
        result.get("postgresql", 18),
    ]
    return " | ".join(map(str, cells))


def written(results: Sequence[Mapping[str, Any]]) -> str:
    """The tables, as Markdown."""
    times: Counter[str] = Counter()
    recoveries: dict[str, list[float]] = defaultdict(list)
    answers: Counter[str] = Counter()
    for result in results:
        times.update(result["faults"])
        answers.update(result["answers"])
        for kind, seconds in result["seconds to recover"].items():
            recoveries[kind] += seconds
    results = [{"hung": 0, **result} for result in results]
    sums = {name: sum(result[name] for result in results) for name in SUMS}
    lines = [audited(results), ""]
    missed = not_reached(results)
    lines += [f"Kinds of faults that were not reached: {', '.join(missed) or 'none'}.", ""]
    if since := come_since(results):
        lines += [f"Kinds that the audit has learned since: {', '.join(since)}.", ""]
    lines += [
        "| seed | slots a worker | fleet's cap | lease | session limit | ids | queues | pending a "
        "session | PostgreSQL |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    lines += [f"| {_settings(result)} |" for result in results]
    lines += [""]
    lines.append(
        "| seed | minutes | "
        + " | ".join(SUMS)
        + " | findings | lag in calm phases, ms: p50, p99, most |"
    )
    lines.append("| ---: " * (len(SUMS) + 3) + "| --- |")
    for result in results:
        cells = [f"{result[name]:,}" for name in SUMS]
        lag = ", ".join(f"{ms:g}" for ms in result["lag in calm phases, ms (p50, p99, most)"])
        lines.append(
            f"| {result['seed']} | {result['minutes']:g} | {' | '.join(cells)} | "
            f"{len(result['findings'])} | {lag} |"
        )
    total = " | ".join(f"**{sums[name]:,}**" for name in SUMS)
    minutes, found = (
        sum(result["minutes"] for result in results),
        sum(len(result["findings"]) for result in results),
    )
    lines += [f"| all | **{minutes:g}** | {total} | **{found}** | |", ""]
    lines += [
        "| fault | what was done | times | seconds to recover: median | most |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for kind, count in sorted(times.items(), key=lambda item: list(WHAT).index(item[0])):
        seconds = recoveries.get(kind, [])
        middle, most = (
            (f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}") if seconds else ("", "")
        )
        lines.append(f"| {kind} | {WHAT[kind]} | {count} | {middle} | {most} |")
    lines += [f"| all | | **{sum(times.values())}** | | |", ""]
    lines += ["| how the API ended a request | times |", "| --- | ---: |"]
    lines += [f"| {how} | {count:,} |" for how, count in answers.most_common()]
    return "\n".join(lines) + "\n"
