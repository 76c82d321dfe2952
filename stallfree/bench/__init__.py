"""Load on any OpenAI-compatible server, and what became of it: one run, a search for capacity, servers side by side."""
