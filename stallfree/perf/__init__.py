"""What an iteration costs, in seconds: models of it, for policies to plan with and simulators to run on."""
