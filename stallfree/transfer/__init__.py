"""KV transfer between engines: one computes a prompt, and another decodes it. `asking` is the side that decodes and owns the
request. `serving` is the side that prefills. Both share `terms`, `frames` and `ring`. It does not know HTTP.
"""
