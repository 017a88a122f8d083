"""An AgentOS for the tests; it runs in Agno's environment, where nothing of recall-worker is
installed."""
