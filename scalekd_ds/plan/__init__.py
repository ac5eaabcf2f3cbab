"""Plans a run before it starts: its memory by part, the bytes it communicates, and its hours, from shapes alone.

It may import `checkpoint` and `optim` and everything below them, but not `inspection` or `evaluation` beside it.
"""
