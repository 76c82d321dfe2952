"""What a run was worth: records in, latencies and stalls out. It knows no engine and no clock."""
