"""Published evaluations, their deployments, loads and results, beside the same in the simulator. It knows no command line."""
