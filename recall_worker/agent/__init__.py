"""What an agent may do with the recalls of its own session: the one core of the MCP server (`mcp`)
and of `recall_worker.tools`.

    tools = AgentTools(recalls, session_id)            # in `tools`
    answer = await tools.schedule("Look at the build.", after="10m")
    answer.text     # for the model: what was done, when it is due, what time it is now
    answer.data     # the same as JSON

or by a tool's name and its arguments as they come from a model, `await tools.call(name, {…})`. What
can't be done raises ToolRefused, whose text says what to do instead; nothing else is raised for
anything that a model, or PostgreSQL, can do wrong. `catalog` has the tools' descriptions and JSON
Schemas; `limits` (pure) how far an agent may go; `arguments` (pure) reads what a model writes;
`words` (pure) says it in words.

No function here takes a session from a model: the session is the one that AgentTools was made for,
and every statement names it. Agents never see comments, leases, workers, reasons, or recalls of
other sessions, and an id of another session is answered as one that does not exist.

Never here: transports, tokens, how a framework wraps a function.
"""

from .limits import Limits
from .tools import AgentTools, Answer, ToolRefused

__all__ = ["AgentTools", "Answer", "Limits", "ToolRefused"]
