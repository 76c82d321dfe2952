"""Proposers guess tokens for `core/speculation.py`. This package does not know how many guesses are checked."""
