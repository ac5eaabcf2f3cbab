"""From images on disk to batches on the device. Order and augmentation are data: pure functions of (seed, epoch, sample)."""

from scalekd_ds.data.eval_loader import EvalLoader
from scalekd_ds.data.sampler import StreamSampler
from scalekd_ds.data.sources.image_folder import ImageFolder
from scalekd_ds.data.train_loader import TrainLoader

__all__ = ["EvalLoader", "ImageFolder", "StreamSampler", "TrainLoader"]
