"""The dual-view loss: its specification, Triton kernels, and the choice between the two.

Uses `interpreted` beside it, and nothing else of the package.
"""
