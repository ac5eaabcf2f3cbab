"""launch/train.py with both views of a stage in one pass on any device: the path that accelerators take."""

import runpy
from pathlib import Path

from scalekd_ds.projector.pair import ProjectorPair

ProjectorPair.forward = ProjectorPair.stacked
runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")
