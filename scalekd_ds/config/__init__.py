"""One run as typed data: models, losses, data, optimizer and schedule, each value checked when it is set.

How a run uses its machines (ZeRO stage, precision, buckets) stands in the DeepSpeed JSON instead. This package may use
`errors`, and nothing else.
"""

from scalekd_ds.config.data import DataConfig
from scalekd_ds.config.distill import AsPublishedConfig, DistillConfig
from scalekd_ds.config.optim import EmaConfig, OptimConfig, ScheduleConfig
from scalekd_ds.config.run import RunConfig
from scalekd_ds.config.run_dir import RunDirConfig, TeacherPlacement

__all__ = [
    "AsPublishedConfig",
    "DataConfig",
    "DistillConfig",
    "EmaConfig",
    "OptimConfig",
    "RunConfig",
    "RunDirConfig",
    "ScheduleConfig",
    "TeacherPlacement",
]
