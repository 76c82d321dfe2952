"""The engine's scheduler without an engine: driven by the records of a run, or in virtual time."""
