"""recall-worker: keeps an AI agent's promises to come back."""
