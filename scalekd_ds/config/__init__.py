"""One run as typed data: what the science needs. How it runs here (ZeRO stage, precision, buckets) is the DeepSpeed JSON."""

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
