"""The routes, in groups: each says what it takes and gives; checking, translating, answering and failing are done elsewhere."""
