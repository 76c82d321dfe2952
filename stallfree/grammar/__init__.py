"""Structured output: grammars from requests, compiled apart from the engine, and the tokens that they allow next."""
