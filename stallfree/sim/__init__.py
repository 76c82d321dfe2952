"""The engine's scheduler without an engine: driven by records of a run, or by virtual time."""
