"""What is served beside a worker: `pages` (/livez, /readyz, /metrics), `metrics` (the content of
/metrics), `traces` (OpenTelemetry, an extra). `run` imports only what is switched on.

Never here: a decision about a recall. This room reads events and a worker's state, and changes
neither.
"""
