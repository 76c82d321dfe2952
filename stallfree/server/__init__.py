"""The engine over HTTP, as OpenAI's API: what comes in is checked here, what goes out is shaped here, and nothing is scheduled."""
