"""Trains: sets a run up, loops over its steps, evaluates, saves, and ends it cleanly.

This package may use every other one of `scalekd_ds` except `commands`.
"""
