"""Groups of instances that form anew for every iteration: who holds which KV, and who computes what next."""
