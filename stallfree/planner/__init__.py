"""Finds the deployment that serves a load best, by simulation, and explains it. It starts no server."""
