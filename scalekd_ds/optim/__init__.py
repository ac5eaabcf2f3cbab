"""Builds optimizers and learning rate schedules that are correct under every ZeRO stage.

This package may use `engine` and the layers below it.
"""
