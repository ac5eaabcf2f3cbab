"""What belongs to the process as a whole: its standard output and error, and the signals that it gets.

This package uses nothing else of this library.
"""
