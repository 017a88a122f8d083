"""What is served beside a worker: `pages` (/livez, /readyz, /metrics), `metrics` (what /metrics
says), `traces` (OpenTelemetry, an extra). `run` imports what is switched on, and nothing else.

Never here: a decision about a recall. This room reads events and a worker's state, and changes
neither.
"""
