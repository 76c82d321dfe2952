"""The engine: the loop around the scheduler and an executor, and the text around the tokens."""
