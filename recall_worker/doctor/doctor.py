"""The examination of a worker's surroundings: which checks are made, and in which order.

It uses the host, the account and the settings that it is started with: run it where the worker
runs, as the same account. It disturbs nothing: rights are checked by EXPLAIN of every statement
that the worker has, the endpoint by GET, which runs no agent; the test notification costs each
worker one poll.

Never here: a change of anything, a call to a session.
"""

from __future__ import annotations

from ..settings import Settings
from . import (
    backlog,
    endpoint,
    failures,
    identity,
    listener,
    queues,
    schema,
    secrets,
    server,
    workers,
)
from .examination import Examination


async def examine(settings: Settings) -> Examination:
    """Make every check that can be made. Its findings are in the order in which they are shown."""
    async with Examination(settings) as exam:
        await exam.check("database", server.database)
        if exam.reached:
            await exam.check("schema", schema.schema)
            await exam.check("pooler", listener.pooler)
            await exam.check("listener", listener.listens)
            await exam.check("clock", server.clock)
        if exam.adopted:
            await exam.check("identity", identity.identity)
            await exam.check("rights", schema.rights)
            await exam.check("trigger", schema.triggers)
            await exam.check("workers", workers.workers)
            await exam.check("queues", queues.queues)
            await exam.check("server", server.server)
            await exam.check("backlog", backlog.backlog)
            await exam.check("held", backlog.held)
        await exam.check("endpoint", endpoint.endpoint)
        await exam.check("failures", failures.failures)
        await exam.check("secrets", secrets.secrets)
    return exam
