"""The parts of benchmarks/roofline.py.

`trace_step.py` runs in a process that takes the machine for one with a GPU, and writes down the kernels of a step, eager
(`trace`) and as inductor fuses them (`fused`), each with its bytes and FLOP (`cost`). `model` turns kernels into time on a card
of `cards`, and `report` prints it.
"""
