"""The engine over HTTP, with OpenAI's API. It checks requests and writes answers; it schedules nothing."""
