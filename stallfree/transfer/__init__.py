"""KV transfer between engines: one computes a prompt, another goes on with it. `asking` is the side that decodes and owns the
request. `serving` is the side that prefills. They share `terms`, `frames` and `ring`. It does not know HTTP.
"""
