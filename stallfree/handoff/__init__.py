"""Hand-off between engines: one computes a prompt, another goes on with it. `asking` is the side that decodes and owns the request,
`serving` the side that prefills; `terms`, `frames` and `ring` are what they have in common. It does not know HTTP.
"""
