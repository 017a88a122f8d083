"""An API on the endpoint kit, for uvicorn to serve in as many processes as a test likes.

Its agent tells a counter of the test that it runs: by a connection that is open as long as the run
is, so that a killed process is seen, and two runs that meet are, too.
"""

from __future__ import annotations

import asyncio
import os

from recall_worker.endpoint import Endpoint, RunRequest

COUNTER = int(os.environ.get("KIT_COUNTER", "0"))
RUN = float(os.environ.get("KIT_RUN", "0.6"))
WITHIN = os.environ.get("KIT_WITHIN", "none")


async def run(session_id: str, message: str, recall: RunRequest) -> str:
    """Takes KIT_RUN seconds; for the message "hold", as long as the counter likes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", COUNTER)
    try:
        writer.write(f"{session_id} {recall.key} {os.getpid()} {recall.starts}\n".encode())
        await writer.drain()
        if message == "hold":
            await reader.readline()
        else:
            await asyncio.sleep(RUN)
    finally:
        writer.close()
    return f"did {message}"


async def sessions(session_id: str) -> bool:
    return not session_id.startswith("missing")


app = Endpoint(
    run=run,
    sessions=sessions,
    dsn=os.environ.get("KIT_DSN"),
    token=os.environ.get("KIT_TOKEN"),
    answer_within=None if WITHIN == "none" else float(WITHIN),
    lease=float(os.environ.get("KIT_LEASE", "15")),
    retry_after=1,
)
