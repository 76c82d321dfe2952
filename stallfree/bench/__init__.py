"""Puts load on any OpenAI-compatible server and measures its answers. It knows no engine, only HTTP."""
