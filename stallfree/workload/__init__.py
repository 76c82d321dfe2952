"""Requests and their lengths and arrivals, drawn from a seed or read from a trace. It knows no engine and no clock."""
