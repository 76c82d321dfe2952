"""The scheduler: what runs in the next iteration, and what its result changes.

Standard library only. It knows no clock, log, random number, thread, tensor or model, so that the engine and a simulator run
the same code.
"""
