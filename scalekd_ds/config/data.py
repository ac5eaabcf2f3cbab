"""`DataConfig`: the images of a run and how they become batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scalekd_ds.config.require import require


@dataclass
class DataConfig:
    """Images on disk and how they become batches.

    Attributes:
        root: Folder that holds the two folders below.
        train: Training images below `root`: a folder with one folder per class, WebDataset tars (a folder of them, or
            `train-{000..127}.tar`), TFRecords, a .csv, .tsv or .parquet with columns path and label, or
            `hf:NAME[:SPLIT]`.
        val: Validation images below `root`, in any of these forms, with the same classes.
        class_order: `string` sorts the names of the classes as torchvision does, `10` before `2`; `natural` sorts numbers
            in them as numbers, as timm's own training script does.
        allow_missing_classes: Validation images may lack some of the classes.
        image_size: Side of the square that the student sees, in pixels.
        train_images: Use only this many training images (drawn with the seed), or all when None.
        images_per_class: Use only this many training images of every class (drawn with the seed), or all when None.
        subset_seed: Seed of these two draws; None takes the run's seed.
        repeats: Times that an image comes in a row, with other augmentations each time (repeated augmentation).
        views: Augmentations of an image that come again and again: pass p of the images takes view p mod `views`; None draws
            new ones in every pass.
        view_seed: Seed of the augmentations and of the images that replace bad ones; None takes the run's seed, which alone
            gives the order.
        balanced: Every class comes equally often; small classes repeat their images.
        crop_scale: Lowest and highest share of the image's area that random resized crop keeps.
        crop_ratio: Lowest and highest aspect ratio of that crop.
        random_crop: False resizes the whole image instead of cropping (for images that are already cut out).
        hflip: Probability of a horizontal flip.
        auto_augment: Policy as timm names it, such as `rand-m9-n2-mstd0.5-inc1` (RandAugment whose severity increases,
            with noise on the magnitude), `original-mstd0.5` (AutoAugment), or `trivial` (TrivialAugmentWide); empty is
            none.
        augment_on: Where `auto_augment` and `color_jitter` are applied when a GPU decodes: `device` on the GPU, `host` by
            Pillow in the threads below. The pixels are the same. Without a GPU it is the host.
        color_jitter: Brightness, contrast and saturation: each factor is drawn from 1 - value to 1 + value.
        random_erasing: Probability that a box of the image is erased.
        erasing_fill: What fills the box: `zero` the mean colour, `noise` a normal deviate for each pixel and channel.
        mixup: alpha of mixup's beta distribution; 0 is off.
        cutmix: alpha of cutmix's beta distribution; 0 is off. With both on, each is taken with probability 1/2.
        mix_by: `batch` mixes each image with one of its micro batch, as timm does. `view` mixes it with any other of the
            training images: partner, box and share follow from the seed of the views, the view and the image, and so come
            again in any batch and on any number of ranks.
        mix_probability: Probability that a micro batch is mixed at all; by view, that an image is.
        interpolation: Filter of every resize, and of the policy's geometric operations.
        eval_resize: Shorter side before the centre crop in evaluation, in pixels; None is image_size / 0.875, and
            image_size itself below 64 pixels, where a margin would cost too much.
        eval_batch_size: Validation images in a forward pass on one rank.
        threads: Threads of each rank that read, decode and augment; None takes the cores that the rank has on its node but
            one, from 2 to 8, of which 4 decode beside a GPU. Batches do not depend on it.
        prefetch: Batches that DALI prepares ahead.
        keep_mb: A set of images below this many 2^20 bytes is read once and then stays in memory, on each rank.
        hw_decoder_load: Share of the JPEGs that a GPU's hardware decoder takes, where it has one.
        largest_image: Height and width in pixels for which a GPU's decoder reserves memory at the start; by default
            those of ImageNet's largest image.
        max_bad_share: Share of the images that may be unreadable before the run stops, rounded up to a whole image; in
            training each of them is replaced by another image of its class, and in validation it is left out.
    """

    root: str = ""
    train: str = "train"
    val: str = "val"
    class_order: Literal["string", "natural"] = "string"
    allow_missing_classes: bool = False
    image_size: int = 224
    train_images: int | None = None
    images_per_class: int | None = None
    subset_seed: int | None = None
    repeats: int = 1
    views: int | None = None
    view_seed: int | None = None
    balanced: bool = False
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    random_crop: bool = True
    hflip: float = 0.5
    auto_augment: str = ""
    augment_on: Literal["device", "host"] = "device"
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    random_erasing: float = 0.0
    erasing_fill: Literal["zero", "noise"] = "noise"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_by: Literal["batch", "view"] = "batch"
    mix_probability: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    eval_resize: int | None = None
    eval_batch_size: int = 64
    threads: int | None = None
    prefetch: int = 2
    keep_mb: int = 512
    hw_decoder_load: float = 0.65
    largest_image: tuple[int, int] = (6430, 5980)
    max_bad_share: float = 0.001

    @property
    def eval_shorter_side(self) -> int:
        """The shorter side of a validation image before the centre crop, in pixels."""
        if self.eval_resize is not None:
            return self.eval_resize
        return self.image_size if self.image_size < 64 else round(self.image_size / 0.875)

    def __post_init__(self) -> None:
        require(self.image_size >= 8, "data.image_size", self.image_size, "at least 8 pixels")
        for name in ("hflip", "random_erasing", "mix_probability"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"data.{name}", value, "a probability, 0 to 1")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(value >= 0.0, f"data.{name}", value, "not negative (0 is off)")
        require(min(self.color_jitter) >= 0.0, "data.color_jitter", self.color_jitter, "three ranges, not negative")
        low, high = self.crop_scale
        require(0.0 < low <= high <= 1.0, "data.crop_scale", self.crop_scale, "two shares, 0 < low <= high <= 1")
        low, high = self.crop_ratio
        require(0.0 < low <= high, "data.crop_ratio", self.crop_ratio, "two ratios, 0 < low <= high")
        for name in ("train_images", "images_per_class"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name}", value, "positive")
        require(
            self.view_seed is None or abs(self.view_seed) < 2**62,
            "data.view_seed",
            self.view_seed,
            "of less than 62 bits",
        )
        for name in ("eval_batch_size", "repeats", "views", "threads", "prefetch"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name}", value, "at least 1")
        for name, most in (("threads", 1024), ("prefetch", 100)):
            value = getattr(self, name)
            # each is a thread of the system or a batch in memory, which run out without an error that says so
            require(value is None or value <= most, f"data.{name}", value, f"at most {most}")
        require(self.keep_mb >= 0, "data.keep_mb", self.keep_mb, "not negative (0 keeps nothing)")
        for name in ("hw_decoder_load", "max_bad_share"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"data.{name}", value, "a share, 0 to 1")
        require(min(self.largest_image) > 0, "data.largest_image", self.largest_image, "a height and a width in pixels")
        if self.eval_resize is not None:
            require(self.eval_resize >= self.image_size, "data.eval_resize", self.eval_resize, "at least image_size")
