"""The image and compose.yaml, built and run by a Docker engine of the test's own.

No image is pulled: under the name of the Dockerfile's base goes a Debian made here, and
PostgreSQL's image is another Debian with Debian's own. What is shown of the image holds for
whatever base it is built on; that the base's name exists at a registry is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from release import lock

from ..conftest import connected
from ..support import machine, postgres
from ..support.application import CREATE_TABLES, Application
from ..support.endpoint import Endpoint, Gate
from .test_lease import eventually, promise

TOOLS = ("dockerd", "docker", "docker-compose", "debootstrap")
lacking = (
    "an engine needs root"
    if os.geteuid()
    else ", ".join(tool for tool in TOOLS if shutil.which(tool) is None)
)
pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(lacking), reason=f"not installed: {lacking}"),
]

BASE = "debian:bookworm-slim"
ADDED_MOST_MB = 120
"""What may lie upon the base: Debian's Python, and the venv."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
POSTGRES = """
FROM debian:bookworm-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql-15
ENV PATH=/usr/lib/postgresql/15/bin:$PATH
USER postgres
# What PostgreSQL's image does with POSTGRES_PASSWORD, and no more.
ENTRYPOINT ["sh", "-c", "echo \\"$POSTGRES_PASSWORD\\" > /tmp/pw && \
initdb -D /tmp/data -A scram-sha-256 --pwfile /tmp/pw >/dev/null && \
echo host all all all scram-sha-256 >> /tmp/data/pg_hba.conf && \
exec postgres -D /tmp/data -c listen_addresses='*' -k /tmp"]
"""


class Engine:
    """A Docker engine with a socket and data of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = f"unix://{folder}/sock"

    def docker(
        self,
        *words: str,
        check: bool = True,
        timeout: float = 600,
        tool: str = "docker",
        cwd: Path = machine.HERE,
        **env: str,
    ) -> str:
        """stdout of a docker command. Where it fails: AssertionError with what it said, unless
        `check` is False."""
        done = subprocess.run(
            [tool, *words],
            env=os.environ | {"DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "0", **env},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{tool} {' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done.stdout.strip()

    def answers(self) -> bool:
        return (
            subprocess.run(
                ["docker", "-H", self.host, "version"], capture_output=True, check=False
            ).returncode
            == 0
        )

    def inspect(self, name: str) -> dict[str, Any]:
        (found,) = json.loads(self.docker("inspect", name))
        return dict(found)

    def until(self, condition: Callable[[], object], within: float = 60) -> None:
        end = time.monotonic() + within
        while not condition():
            assert time.monotonic() < end, "not within the time"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the base image in it."""
    folder = tmp_path_factory.mktemp("docker")
    engine = Engine(folder)
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [
            "dockerd",
            "-H",
            engine.host,
            "--data-root",
            str(folder / "data"),
            "--exec-root",
            str(folder / "exec"),
            "-p",
            str(folder / "pid"),
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        end = time.monotonic() + 60
        while not engine.answers():
            if process.poll() is not None or time.monotonic() > end:
                pytest.skip(
                    "no Docker engine runs here: "
                    + (folder / "log").read_text(errors="replace").strip()[-300:]
                )
            time.sleep(0.2)
        root = machine.debian("ca-certificates")
        words = ["import"]
        with contextlib.ExitStack() as stack:
            if CERTIFICATES.is_file():
                # Where this machine trusts more than Debian does, so must the build.
                root = stack.enter_context(_copied(root, folder / "base"))
                shutil.copy(CERTIFICATES, root / "usr/local/share/trusted.pem")
                words += ["--change", "ENV PIP_CERT=/usr/local/share/trusted.pem"]
            with subprocess.Popen(
                ["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE
            ) as tar:
                imported = ["docker", "-H", engine.host, *words, "-", BASE]
                subprocess.run(imported, stdin=tar.stdout, check=True, capture_output=True)
        yield engine
    finally:
        process.terminate()
        process.wait(60)
        log.close()
        _unmount(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _unmount(folder: Path) -> None:
    """What an engine mounted below a folder and left there: its overlays outlive it, and nobody
    could tidy the folder up."""
    mounts = [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    ]
    for mount in reversed([mount for mount in mounts if mount.startswith(f"{folder}/")]):
        subprocess.run(["umount", "-l", mount], capture_output=True, check=False)


@contextlib.contextmanager
def _copied(root: Path, to: Path) -> Iterator[Path]:
    yield machine.copy(root, to)
    shutil.rmtree(to)


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    engine.docker("build", "-q", "--network", "host", "-t", "recall-worker", ".")
    return "recall-worker"


@pytest.fixture
def container(engine: Engine, image: str) -> Iterator[Callable[..., str]]:
    """Starts a container of the image on this machine's network, with a read-only root and no
    capabilities; returns its name."""
    names: list[str] = []

    def start(*words: str, **settings: str) -> str:
        names.append(f"r-{uuid4().hex[:8]}")
        given = [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]
        engine.docker(
            "run",
            "-d",
            "--name",
            names[-1],
            "--network",
            "host",
            "--read-only",
            "--cap-drop",
            "ALL",
            "--security-opt",
            "no-new-privileges",
            *given,
            image,
            *words,
        )
        return names[-1]

    yield start
    for name in names:
        engine.docker("rm", "-f", name, check=False)


def test_what_is_in_it(engine: Engine, image: str) -> None:
    """Small, nobody's account, the program and nothing to build or install with; it says its
    version."""
    found = engine.inspect(image)
    added = (found["Size"] - engine.inspect(BASE)["Size"]) / 1e6
    print(f"{added:.0f} MB upon the base")
    assert added < ADDED_MOST_MB
    assert found["Config"]["User"] == "65532:65532"
    assert re.fullmatch(
        r"recall-worker \d+\.\d+\.\d+", engine.docker("run", "--rm", image, "--version")
    )
    tools = (
        "for t in pip pip3 gcc cc make git curl; do command -v $t; done; python3 -m pip "
        "--version; ls -d /src /tools"
    )
    assert (
        engine.docker(
            "run", "--rm", "--entrypoint", "sh", image, "-c", tools + " 2>/dev/null; true"
        )
        == ""
    )
    # What it is, by the names that registries know, and what is in it.
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.base.name"] == BASE
    assert labels["org.opencontainers.image.title"] == "recall-worker"
    bill = json.loads(
        engine.docker(
            "run", "--rm", "--entrypoint", "cat", image, "/usr/share/sbom/recall-worker.cdx.json"
        )
    )
    named = {component["name"]: component["version"] for component in bill["components"]}
    assert {"libc6", "python3", "ca-certificates", "recall-worker"} <= set(named)
    assert {n: v for n, v in named.items() if n in lock.read("image")} == {
        one.name: one.version
        for one in lock.read("image").values()
        if one.marker is None or one.marker.evaluate()
    }
    # Nobody can change what it runs.
    owned = "find /opt/recall-worker ! -user root -o -perm /o+w ! -type l | head -3"
    assert engine.docker("run", "--rm", "--entrypoint", "sh", image, "-c", owned) == ""


async def test_it_works_and_drains(engine: Engine, container: Callable[..., str]) -> None:
    """A read-only root, secrets as a file, healthy by its own check; SIGTERM reaches the process,
    which lets its run end."""
    with postgres.embedded(tcp=True) as server, postgres.database(server.dsn(tcp=True)) as dsn:
        async with connected(dsn) as db, Endpoint() as endpoint:
            await db.execute(CREATE_TABLES.encode())
            engine.docker("wait", container("migrate", RECALL_DSN=dsn))
            app = await Application.connect(dsn)
            gate = Gate()
            endpoint.script("s", gate)
            name = container("run", RECALL_DSN=dsn, RECALL_RUN_URL=endpoint.url)
            id = await promise(app, "s")
            await gate.entered.wait()
            # Its own question, without the half minute between two.
            check = engine.inspect(name)["Config"]["Healthcheck"]["Test"]
            assert check[0] == "CMD"
            engine.docker("exec", name, *check[1:])

            stopping = asyncio.create_task(
                asyncio.to_thread(engine.docker, "stop", "-t", "30", name)
            )
            await asyncio.to_thread(engine.until, lambda: "worker.draining" in _log(engine, name))
            assert not stopping.done()
            gate.open()
            await eventually(
                db, "select 1 from session_recalls where id = %s and status = 'fired'", [id]
            )
            await stopping
            assert engine.inspect(name)["State"]["ExitCode"] == 0
            assert len(endpoint.requests) == 1
            await app.close()


def _log(engine: Engine, name: str) -> str:
    done = subprocess.run(
        ["docker", "-H", engine.host, "logs", name], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def postgres_image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What goes under the name of PostgreSQL's image."""
    folder = tmp_path_factory.mktemp("postgres")
    (folder / "Dockerfile").write_text(POSTGRES, encoding="utf-8")
    engine.docker("build", "-q", "--network", "host", "-t", "postgres:18", str(folder))


PAGE = """
from urllib.request import Request, urlopen
asked = Request("http://127.0.0.1:9465/recalls", headers={"Authorization": "Bearer TOKEN"})
with urlopen(asked) as page:
    print(page.status, page.read().decode())
""".replace("TOKEN", "to-try-it-out-only")


@pytest.mark.usefixtures("postgres_image")
def test_compose(engine: Engine, image: str) -> None:
    """`docker compose up`, as the file's head says: the schema is there, three workers are, and a
    recall that is scheduled by hand fires."""
    project = ["-p", f"r{uuid4().hex[:8]}", "-f", str(machine.HERE / "compose.yaml")]

    def compose(*words: str, check: bool = True) -> str:
        return engine.docker(*project, *words, tool="docker-compose", check=check)

    try:
        compose("up", "--detach", "--no-build", "--scale", "worker=3")
        workers = compose("ps", "-q", "worker").split()
        assert len(workers) == 3
        for worker in workers:
            engine.until(lambda worker=worker: "worker.ready" in _log(engine, worker))  # type: ignore[misc]
        said = compose(
            "exec",
            "-T",
            "worker",
            "recall-worker",
            "schedule",
            "my-session",
            "Look at the build again.",
            "--json",
        )
        id = json.loads(said)["id"]
        shown = ("exec", "-T", "worker", "recall-worker", "show", id, "--json")
        engine.until(lambda: json.loads(compose(*shown))["recall"]["status"] == "fired")
        listed = json.loads(compose("exec", "-T", "worker", "recall-worker", "workers", "--json"))
        assert len(listed) == 3
        # The console, as a browser on the host reaches it, with the token of the file's head.
        console = compose("ps", "-q", "console").strip()
        engine.until(lambda: "console.listening" in _log(engine, console))
        said = compose("exec", "-T", "console", "python3", "-c", PAGE)
        assert said.startswith("200") and id in said
        compose("stop", "console", "worker")
        assert engine.inspect(console)["State"]["ExitCode"] == 0
        assert {engine.inspect(worker)["State"]["ExitCode"] for worker in workers} == {0}
    finally:
        compose("down", "--volumes", "--timeout", "1", check=False)


@pytest.mark.usefixtures("image", "postgres_image")
def test_the_chat_of_the_examples(engine: Engine) -> None:
    """examples/chat, as its README says: its image is built of this checkout, all is healthy, and a
    reminder that is asked for on the page's way comes back into the chat."""
    folder = machine.HERE / "examples" / "chat"
    dockerfile = str(folder / "Dockerfile")
    engine.docker("build", "-q", "--network", "host", "-t", "recall-chat", "-f", dockerfile, ".")
    port = str(postgres.free_port())
    project = ["-p", f"r{uuid4().hex[:8]}"]

    def compose(*words: str, check: bool = True) -> str:
        return engine.docker(
            *project, *words, tool="docker-compose", check=check, cwd=folder, CHAT_PORT=port
        )

    try:
        compose("up", "--detach", "--no-build")
        chat = httpx.get(f"http://127.0.0.1:{port}/").headers["location"]
        address = f"http://127.0.0.1:{port}{chat}"
        sent = httpx.post(
            f"{address}/messages", json={"text": "remind me in 1 second to stretch"}, timeout=60
        )
        assert sent.status_code == 200, sent.text
        with httpx.stream("GET", f"{address}/events", timeout=60) as page:
            said = (line for line in page.iter_lines() if "It is time: stretch" in line)
            assert '"role": "agent"' in next(said)
        listed = ("exec", "-T", "worker", "recall-worker", "list", "--json")
        engine.until(lambda: [r["status"] for r in json.loads(compose(*listed))] == ["fired"])
        containers = compose("ps", "-q", "chat", "worker").split()
        engine.until(
            lambda: (
                {engine.inspect(one)["State"]["Health"]["Status"] for one in containers}
                == {"healthy"}
            )
        )
        compose("stop", "chat", "worker")
        assert {engine.inspect(one)["State"]["ExitCode"] for one in containers} == {0}
    except BaseException:
        print(compose("logs", "--no-color", check=False))
        raise
    finally:
        compose("down", "--volumes", "--timeout", "1", check=False)
