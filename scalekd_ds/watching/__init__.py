"""Measures a run and shows it: timings, memory, energy, agreement, pictures, TensorBoard, and the terminal.

It may import `plan`, `inspection`, `evaluation` and everything below them, but not `export` or `training`, which calls it.
"""
