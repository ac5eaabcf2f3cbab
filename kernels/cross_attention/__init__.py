"""The projector's attention: its specification, Triton kernels, and the choice between these and PyTorch's SDPA.

Uses `interpreted` beside it, and nothing else of the package.
"""
