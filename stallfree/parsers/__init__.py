"""From the text that a model writes to its parts: reasoning, answer and tool calls. `pieces` has the parts, `formats` the tool
formats. It does not know HTTP, the engine or tokens. Standard library only.
"""
