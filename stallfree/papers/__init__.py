"""Published evaluations, set up for the simulator: what was deployed, what arrived, what was found. It measures nothing itself."""
