"""Agents for ADK's own server; they run in ADK's environment, where nothing of recall-worker is
installed."""
