"""Published evaluations: what was deployed, what arrived, what was found; and the same in the simulator, beside it."""
