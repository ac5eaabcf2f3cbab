"""Makes batches on the device from images on disk.

The order of the samples and their augmentations are pure functions of (seed, epoch, sample), so a run resumes exactly.
This package may use `config`, `cluster` and the layers below them.
"""

from scalekd_ds.data.eval_loader import EvalLoader
from scalekd_ds.data.sampler import StreamSampler
from scalekd_ds.data.sources.image_folder import ImageFolder
from scalekd_ds.data.train_loader import TrainLoader

__all__ = ["EvalLoader", "ImageFolder", "StreamSampler", "TrainLoader"]
