"""The MCP server (`recall-worker mcp`): the agent's five tools over the Model Context Protocol. A
process of its own, with the database role `recall_agent`; it needs the extra `mcp`.

`server` puts the tools (agent) before the SDK; `stdio` and `http` are the two transports; `process`
is what both need: settings, secrets, connections, log.

Whose recalls: of the session that the process was started for (stdio, RECALL_MCP_SESSION), or that
the request's bearer token names (http). Nothing else that a client sends has a say in it: no
argument, no header, no `_meta`, no id of an MCP session. The HTTP transport keeps no state between
requests, so each is judged by its own token.

The process holds no connection while nobody calls, and asks PostgreSQL nothing.

Never here: what a tool does (agent), what a token is (tokens).
"""
