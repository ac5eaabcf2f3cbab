"""Tells lines of other libraries from those of this package, in what a run says."""

import re

# how torch, DeepSpeed, gloo, absl and Python's warnings begin or end theirs
_FOREIGN = re.compile(
    r"\w*Warning: |^\s+(return|warnings\.warn)\b|^\[?[WIEF]\d{4} |^\[[WIEF]\d|\[(INFO|WARNING|ERROR)\]|\[Gloo\]|site-packages/"
)
# of the launcher, whom the test has started itself
_LAUNCHER = re.compile(r"\[(runner|launch|real_accelerator)\.py:")


def foreign_lines(text: str) -> list[str]:
    """The lines of other libraries than DeepSpeed's launcher."""
    return [line for line in text.splitlines() if _FOREIGN.search(line) and not _LAUNCHER.search(line)]
