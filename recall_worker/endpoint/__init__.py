"""The endpoint kit: the run endpoint of docs/endpoint.md as an ASGI application, for applications
in Python to mount.

`application` answers requests, runs the agent and keeps the open runs; `request` reads a request
and checks it; `store` says what has to be remembered of keys and sessions, `memory` remembers it in
one process, and `postgres` in PostgreSQL, for several; `watchdog` renews leases while the event
loop is blocked.

The database decides who has a session, which key has run, and when a lease has ended. The process
may only believe that it has what it took or renewed less than a lease ago.

Never here: sessions, messages and chats (they are the application's), a web framework, the table
session_recalls, the environment (all settings are arguments).
"""

from .application import Endpoint, SessionBusy, SessionLock
from .request import RunRequest
from .store import StoreUnavailable

__all__ = ["Endpoint", "RunRequest", "SessionBusy", "SessionLock", "StoreUnavailable"]
