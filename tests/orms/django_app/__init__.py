"""A Django application with the agent's two tables: as docs/adoption.md has its models."""
