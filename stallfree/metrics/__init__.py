"""Measures a run: latencies and stalls from records, or from a client's times. It knows no engine and no clock."""
