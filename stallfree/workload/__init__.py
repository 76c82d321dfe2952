"""What arrives when: requests and their lengths, drawn from a seed or read from a trace. It knows no engine and no clock."""
