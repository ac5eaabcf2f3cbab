"""Attention in windows of a map, as in Swin: its specification, Triton kernels, and the choice between these and SDPA.

Uses `interpreted` beside it and the name of the architecture in `cross_attention.table`, and nothing else of the package.
"""
