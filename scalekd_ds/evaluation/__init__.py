"""Measures the accuracy of a model, during a run and of plain weights.

This package may use `optim`, `checkpoint` and the layers below them.
"""
