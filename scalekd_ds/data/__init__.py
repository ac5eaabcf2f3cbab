"""From images on disk to batches on the device. Order and augmentation are data: pure functions of (seed, epoch, sample)."""

from scalekd_ds.data.pipeline import EvalLoader, TrainLoader
from scalekd_ds.data.sampler import StreamSampler
from scalekd_ds.data.source import ImageFolder

__all__ = ["EvalLoader", "ImageFolder", "StreamSampler", "TrainLoader"]
