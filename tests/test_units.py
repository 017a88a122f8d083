"""The systemd units: what systemd itself says of them, and that those which should agree do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from recall_worker.mcp.http import LAST_CALL
from recall_worker.settings import Settings, ignored
from recall_worker.terminal import OUTDATED, REFUSED, UNREACHABLE, USAGE
from recall_worker.worker.process import STANDSTILL
from recall_worker.worker.worker import SETTLE_PATIENCE

UNITS = Path(__file__).parent.parent / "systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
EXPOSURE_MOST = 1.5

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="not installed: systemd-analyze"
)


def lines(unit: str) -> list[str]:
    return [
        line
        for line in (UNITS / unit).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]


def value(unit: str, name: str) -> str:
    (found,) = [line.partition("=")[2] for line in lines(unit) if line.startswith(f"{name}=")]
    return found


@pytest.mark.parametrize("unit", ["recall-worker.service", "recall-worker@.service"])
def test_a_reload_is_a_hangup(unit: str) -> None:
    """What `systemctl reload` sends has the secrets read again (tests/process/test_rotation.py)."""
    assert value(unit, "ExecReload") == "kill -HUP $MAINPID"


def installed(folder: Path) -> Path:
    """The units as they would be on a host where the program is there."""
    for path in UNITS.iterdir():
        text = path.read_text(encoding="utf-8").replace(
            "/opt/recall-worker/bin/recall-worker", "/bin/true"
        )
        (folder / path.name).write_text(text, encoding="utf-8")
    for template in ("recall-worker", "recall-worker-queue"):
        shutil.copy(folder / f"{template}@.service", folder / f"{template}@1.service")
    return folder


@needs_systemd
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    units = [
        str(path)
        for path in installed(tmp_path).iterdir()
        if path.suffix in (".service", ".timer", ".target") and "@." not in path.name
    ]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "recall-worker" in line]
    assert done.returncode == 0 and ours == []


@needs_systemd
@pytest.mark.parametrize("unit", SERVICES)
def test_exposure(unit: str, tmp_path: Path) -> None:
    """What `systemd-analyze security` reads, out of ten: as little as a process that talks to two
    addresses needs."""
    path = installed(tmp_path) / unit.replace("@.", "@1.")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    (said,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert float(said) <= EXPOSURE_MOST, done.stdout


def test_one_and_many_are_the_same() -> None:
    """The single unit and the template differ in what they are called, and in nothing else."""
    one, many = lines("recall-worker.service"), lines("recall-worker@.service")
    assert [line for line in one if not line.startswith("Description=")] == [
        line for line in many if not line.startswith("Description=")
    ]


def test_a_queues_worker_is_as_any_other() -> None:
    """Its template names its queue, its own settings and its own secrets; the rest is the same."""
    many, queue = lines("recall-worker@.service"), lines("recall-worker-queue@.service")
    own = [
        "Environment=RECALL_QUEUE=%i",
        "EnvironmentFile=-/etc/recall-worker/queue-%i.env",
        "LoadCredential=RECALL:/etc/recall-worker/queue-%i",
    ]
    assert [line for line in queue if line not in many and not line.startswith("Desc")] == own
    assert [line for line in many if line not in queue and not line.startswith("Desc")] == [
        "LoadCredential=RECALL:/etc/recall-worker/credentials"
    ]


def test_jobs_are_as_bounded_as_the_worker() -> None:
    hardening = [
        line
        for line in lines("recall-worker.service")
        if line in lines("recall-worker-migrate.service")
    ]
    assert len(hardening) > 30
    for unit in ("recall-worker-prune.service", "recall-worker-mcp.service"):
        bounds = [line for line in hardening if not line.startswith(("LoadC", "Type", "Environ"))]
        assert set(bounds) <= set(lines(unit)), unit


def test_the_mcp_servers_unit() -> None:
    """It has secrets of its own, and not the workers'; its calls have the time that they get."""
    unit = "recall-worker-mcp.service"
    assert value(unit, "LoadCredential") == "RECALL:/etc/recall-worker/mcp-credentials"
    assert float(value(unit, "TimeoutStopSec")) > LAST_CALL + 2
    assert value(unit, "RestartPreventExitStatus") == str(USAGE)
    assert value(unit, "ExecStart").endswith("/recall-worker mcp --http ${MCP_LISTEN}")
    for name in ("MemoryMax", "OOMScoreAdjust", "ExecReload"):
        assert value(unit, name) == value("recall-worker.service", name)


@pytest.mark.parametrize("unit", ["recall-worker.service", "recall-worker@.service"])
def test_bounds_leave_room_for_what_the_daemon_does(unit: str) -> None:
    """A drain at the default, its last settles and the goodbye fit into the stop; the longest turn
    of the loop into the watchdog."""
    default = Settings()
    assert float(value(unit, "TimeoutStopSec")) > default.drain_timeout + SETTLE_PATIENCE + 2
    assert float(value(unit, "WatchdogSec")) * 2 / 3 > STANDSTILL - default.poll_interval
    assert value(unit, "StartLimitIntervalSec") == "0" and value(unit, "Restart") == "always"


@pytest.mark.parametrize("unit", ["recall-worker.service", "recall-worker@.service"])
def test_what_is_not_started_again(unit: str) -> None:
    """Wrong settings, and a schema for newer code; what a migration or PostgreSQL's return can mend
    is tried again."""
    listed = {int(status) for status in value(unit, "RestartPreventExitStatus").split()}
    assert listed == {USAGE, OUTDATED} and not listed & {REFUSED, UNREACHABLE}


@pytest.mark.parametrize("unit", ["recall-worker.service", "recall-worker@.service"])
def test_memory_is_bounded(unit: str) -> None:
    """As in kubernetes/ and compose.yaml; and where the host runs out of it the worker goes before
    PostgreSQL."""
    root = UNITS.parent
    [worker] = [
        document
        for document in yaml.safe_load_all(
            (root / "kubernetes" / "recall-worker.yaml").read_text(encoding="utf-8")
        )
        if document["kind"] == "Deployment"
    ]
    [container] = worker["spec"]["template"]["spec"]["containers"]
    composed = yaml.safe_load((root / "compose.yaml").read_text(encoding="utf-8"))["services"][
        "worker"
    ]
    assert value(unit, "MemoryMax") == "256M" and composed["mem_limit"] == "256m"
    assert container["resources"]["limits"]["memory"] == "256Mi"
    assert int(value(unit, "OOMScoreAdjust")) == composed["oom_score_adj"] > 0


def test_the_example_environment_is_all_settings() -> None:
    """Each name in it is a setting that exists, commented out or not; none is a secret, and what
    prune reads is the unit's own."""
    text = (UNITS / "recall-worker.env").read_text(encoding="utf-8")
    names = re.findall(r"^#? ?([A-Z_]+)=", text, re.M)
    assert "RECALL_RUN_URL" in names and ignored(dict.fromkeys(names, "x")) == []
    assert not {
        "RECALL_DSN",
        "RECALL_RUN_TOKEN",
        "RECALL_SIGNING_SECRET",
        "RECALL_LISTEN_DSN",
    } & set(names)
    assert "${PRUNE_OLDER_THAN}" in value("recall-worker-prune.service", "ExecStart")
