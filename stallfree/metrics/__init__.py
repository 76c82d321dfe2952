"""What a run was worth: records or a client's times in, latencies and stalls out. It knows no engine and no clock."""
