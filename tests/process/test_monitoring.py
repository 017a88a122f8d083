"""monitoring/ against the real thing: what alerts and dashboard name is what a daemon exports, and
Prometheus takes all of it.

promtool and prometheus are Debian's package `prometheus`; where it is missing these tests skip, and
.ci/run installs it.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from ..support.application import Application
from ..support.daemon import Daemons
from ..support.postgres import free_port
from .test_lease import promise
from .test_ops import address, read, scrape

ROOT = Path(__file__).resolve().parent.parent.parent
MONITORING = ROOT / "monitoring"
ALERTS = MONITORING / "alerts.yml"
DASHBOARD = MONITORING / "dashboard.json"
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0][
    "rules"
]
PANELS: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
SHOWN = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
UNHEARD = "http://127.0.0.1:1/"
"""A RECALL_FAILURE_URL, as some metrics are there only with one."""
NAME = re.compile(r"\b(?:recall_worker|process)_\w+")

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus"
)
prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="prometheus is not installed: apt-get install prometheus",
)


def checked(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *map(str, arguments)], input=text, capture_output=True, text=True, check=False
    )


def query(expression: str) -> str:
    """A dashboard's expression as Prometheus takes it."""
    return expression.replace("$job", ".*").replace("$__rate_interval", "1m")


@pytest.mark.slow
async def test_whatever_is_named_is_exported(app: Application, daemons: Daemons) -> None:
    """Each metric, and each label with its value, that alerts and dashboard name is on a real
    daemon's page."""
    daemon = await daemons.start(ops_listen=0, failure_url=UNHEARD)
    await promise(app, "s")
    await daemon.hears("recall.settled")
    found = await scrape(daemon)
    names = {name for name, _ in found}
    expressions = [rule["expr"] for rule in RULES] + [expression for _, expression in SHOWN]
    named = {name for expression in expressions for name in NAME.findall(expression)}
    assert named <= names, named - names
    for name, label, value in re.findall(
        r'(\w+)\{[^}]*?(outcome|status|state)="(\w+)"', "\n".join(expressions)
    ):
        assert [labels for n, labels in found if n == name and (label, value) in labels], (
            name,
            label,
            value,
        )
    # And the other way round: what is exported is shown to somebody.
    families = {
        re.sub(r"_(?:bucket|sum|count)$", "", name)
        for name in names
        if name.startswith("recall_worker_")
    }
    shown = {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in named}
    assert families - shown == set()


@pytest.mark.slow
@promtool
async def test_prometheus_likes_the_page(app: Application, daemons: Daemons) -> None:
    """`promtool check metrics` has nothing to say on names, units, types and help texts."""
    daemon = await daemons.start(ops_listen=0)
    await promise(app, "s")
    await daemon.hears("recall.settled")
    done = checked("check", "metrics", text=(await read(daemon, "/metrics")).text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@promtool
def test_the_alerts_are_alerts() -> None:
    """`promtool check rules` finds each of them, and `promtool test rules` sees it fire, and a
    healthy fleet be quiet."""
    done = checked("check", "rules", "--lint=all", "--lint-fatal", ALERTS)
    assert done.returncode == 0 and f"{len(RULES)} rules found" in done.stdout, (
        done.stdout + done.stderr
    )
    done = checked("test", "rules", MONITORING / "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
@promtool
@pytest.mark.parametrize("name", [rule["alert"] for rule in RULES])
def test_no_alert_goes_untested(name: str, tmp_path: Path) -> None:
    """With one alert made mute, its tests fail; they fail likewise where it is always on."""
    shutil.copy(MONITORING / "alerts_test.yml", tmp_path)
    for instead in ("vector(0) > 1", "vector(1)"):
        rules = [rule | {"expr": instead} if rule["alert"] == name else rule for rule in RULES]
        (tmp_path / "alerts.yml").write_text(
            yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}), encoding="utf-8"
        )
        assert checked("test", "rules", tmp_path / "alerts_test.yml").returncode == 1, instead


def test_each_alert_has_its_page_in_the_runbook() -> None:
    """docs/monitoring.md has a heading for each alert, and none for one that there isn't; the alert
    points there."""
    headings = re.findall(
        r"^### (Recall\w+)$",
        (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert headings == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_the_dashboard_is_well_made() -> None:
    """Each panel has a title, a description, a place of its own and the dashboard's data source;
    ids are unique."""
    assert (
        len({panel["id"] for panel in PANELS})
        == len({panel["title"] for panel in PANELS})
        == len(PANELS)
    )
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["description"].endswith(".") and panel["targets"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


@pytest.fixture
def configuration(tmp_path: Path) -> Iterator[Path]:
    """A Prometheus that scrapes every second, with the alerts as they stand; its targets stand in
    targets.json."""
    (tmp_path / "alerts.yml").write_bytes(ALERTS.read_bytes())
    job = {
        "job_name": "recall-worker",
        "file_sd_configs": [{"files": [str(tmp_path / "targets.json")]}],
    }
    whole = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [job],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    yield tmp_path


@pytest.mark.slow
@prometheus
async def test_a_real_prometheus(configuration: Path, app: Application, daemons: Daemons) -> None:
    """Prometheus scrapes two workers, evaluates each alert without an error, and every panel of the
    dashboard shows something."""
    workers = [await daemons.start(ops_listen=0, failure_url=UNHEARD) for _ in range(2)]
    targets = [(await address(worker)).removeprefix("http://") for worker in workers]
    (configuration / "targets.json").write_text(
        json.dumps([{"targets": targets}]), encoding="utf-8"
    )
    port = free_port()
    arguments = [
        f"--config.file={configuration / 'prometheus.yml'}",
        f"--storage.tsdb.path={configuration / 'data'}",
    ]
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        *arguments,
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client, asyncio.timeout(60):

            async def ask(path: str, **params: str) -> Any:
                while True:
                    try:
                        async with client.get("/api/v1/" + path, params=params) as answer:
                            if answer.status == 200:
                                return (await answer.json())["data"]
                    except aiohttp.ClientConnectionError:
                        pass
                    await asyncio.sleep(0.2)

            async def shown(expression: str) -> list[Any]:
                found = (await ask("query", query=query(expression)))["result"]
                return [r for r in found if r["value"][1] != "NaN"]

            n = 0
            missing = SHOWN
            while missing:
                n += 1
                await promise(app, f"s{n}")
                await asyncio.sleep(0.5)
                # Nothing was aborted, and nobody stumbled.
                missing = [
                    (title, e)
                    for title, e in missing
                    if "aborted_total" not in e and "stumbles_total" not in e
                ]
                missing = [(title, e) for title, e in missing if not await shown(e)]
            rules = (await ask("rules"))["groups"][0]["rules"]
            while any(rule["health"] == "unknown" for rule in rules):
                rules = (await ask("rules"))["groups"][0]["rules"]
            assert [(r["name"], r["lastError"]) for r in rules if r.get("lastError")] == []
            assert {rule["health"] for rule in rules} == {"ok"} and len(rules) == len(RULES)
            [one] = await shown("sum(recall_worker_outcomes_total)")
            assert 0 < float(one["value"][1]) <= n
            assert await shown("count(recall_worker_build_info)") and not await shown(
                "ALERTS{alertstate='firing'}"
            )
    finally:
        process.terminate()
        await process.wait()
