"""Cost models: the seconds of an iteration, for policies that plan and for simulators."""
