"""One run as typed data: what the science needs. How it runs here (ZeRO stage, precision, buckets) is the DeepSpeed JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from scalekd_ds.errors import UserError

TeacherPlacement = Literal["replica", "sharded", "offload"]


def _require(holds: bool, key: str, value: Any, need: str) -> None:
    if not holds:
        raise UserError(f"{key} is {value!r}: it must be {need}.")


@dataclass
class DataConfig:
    """Images on disk and how they become batches.

    Attributes:
        root: Folder that holds the two folders below.
        train: Training images below `root`: a folder with one folder per class, WebDataset tars (a folder of them, or
            `train-{000..127}.tar`), TFRecords, a .csv, .tsv or .parquet with columns path and label, or `hf:NAME[:SPLIT]`.
        val: Validation images, likewise, with the same classes.
        image_size: Side of the square that the student sees, in pixels.
        train_images: Use only this many training images (drawn with the seed), or all when None.
        images_per_class: Use only this many training images of every class, or all when None.
        subset_seed: Seed of these draws; None takes the run's seed.
        repeats: Times that an image comes in a row, with other augmentations each time (repeated augmentation).
        balanced: Every class comes equally often, small ones by repeating their images.
        crop_scale: Share of the image's area that random resized crop keeps, lowest and highest.
        crop_ratio: Aspect ratio of that crop, lowest and highest.
        random_crop: False resizes the whole image instead of cropping (for images that are already cut out).
        hflip: Probability of a horizontal flip.
        auto_augment: Policy as timm names it, such as `rand-m9-n2-mstd0.5-inc1` (RandAugment whose severity increases, with
            noise on the magnitude), `original-mstd0.5` (AutoAugment), or `trivial` (TrivialAugmentWide); empty is none.
        color_jitter: Brightness, contrast and saturation: factors are drawn within 1 +- each.
        random_erasing: Probability that a box is erased.
        erasing_fill: `zero` is the mean colour, `noise` a normal deviate for each pixel and channel.
        mixup: alpha of mixup's beta distribution; 0 is off.
        cutmix: alpha of cutmix; with both, either is taken with probability 1/2.
        mix_probability: Of mixing a micro batch at all.
        interpolation: Filter of every resize, and of the policy's geometric operations.
        eval_resize: Shorter side before the centre crop in evaluation, in pixels; None is image_size / 0.875, and
            image_size itself below 64 pixels, where a margin would cost too much.
        eval_batch_size: Validation images in a forward pass on one rank.
        threads: DALI's decoding threads on each rank.
        prefetch: Batches that DALI prepares ahead.
        keep_mb: A set below this many 2^20 bytes is read once and stays in memory, on each rank.
        hw_decoder_load: Share of the JPEGs that a GPU's hardware decoder takes, where it has one.
        largest_image: Height and width in pixels for which a GPU's decoder reserves memory at the start (ImageNet's).
        max_bad_share: Of the training images that may be unreadable before the run stops; each is replaced by another of
            its class.
    """

    root: str = ""
    train: str = "train"
    val: str = "val"
    image_size: int = 224
    train_images: int | None = None
    images_per_class: int | None = None
    subset_seed: int | None = None
    repeats: int = 1
    balanced: bool = False
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    random_crop: bool = True
    hflip: float = 0.5
    auto_augment: str = ""
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    random_erasing: float = 0.0
    erasing_fill: Literal["zero", "noise"] = "noise"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    eval_resize: int | None = None
    eval_batch_size: int = 64
    threads: int = 2
    prefetch: int = 2
    keep_mb: int = 512
    hw_decoder_load: float = 0.65
    largest_image: tuple[int, int] = (6430, 5980)
    max_bad_share: float = 0.001

    @property
    def eval_shorter_side(self) -> int:
        """Pixels of the shorter side before the centre crop."""
        if self.eval_resize is not None:
            return self.eval_resize
        return self.image_size if self.image_size < 64 else round(self.image_size / 0.875)

    def __post_init__(self) -> None:
        _require(self.image_size >= 8, "data.image_size", self.image_size, "at least 8 pixels")
        _require(0.0 <= self.hflip <= 1.0, "data.hflip", self.hflip, "a probability, 0 to 1")
        for name in ("random_erasing", "mix_probability"):
            _require(0.0 <= getattr(self, name) <= 1.0, f"data.{name}", getattr(self, name), "a probability, 0 to 1")
        for name in ("mixup", "cutmix"):
            _require(getattr(self, name) >= 0.0, f"data.{name}", getattr(self, name), "not negative (0 is off)")
        _require(min(self.color_jitter) >= 0.0, "data.color_jitter", self.color_jitter, "three ranges, not negative")
        low, high = self.crop_scale
        _require(0.0 < low <= high <= 1.0, "data.crop_scale", self.crop_scale, "two shares, 0 < low <= high <= 1")
        low, high = self.crop_ratio
        _require(0.0 < low <= high, "data.crop_ratio", self.crop_ratio, "two ratios, 0 < low <= high")
        for name in ("train_images", "images_per_class"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"data.{name}", value, "positive")
        _require(self.eval_batch_size > 0, "data.eval_batch_size", self.eval_batch_size, "at least 1")
        _require(self.repeats > 0, "data.repeats", self.repeats, "at least 1")
        _require(self.threads > 0, "data.threads", self.threads, "at least 1")
        _require(self.prefetch > 0, "data.prefetch", self.prefetch, "at least 1")
        _require(self.keep_mb >= 0, "data.keep_mb", self.keep_mb, "not negative (0 reads anew each time)")
        _require(0.0 <= self.hw_decoder_load <= 1.0, "data.hw_decoder_load", self.hw_decoder_load, "a share, 0 to 1")
        _require(min(self.largest_image) > 0, "data.largest_image", self.largest_image, "a height and a width")
        _require(0.0 <= self.max_bad_share <= 1.0, "data.max_bad_share", self.max_bad_share, "a share, 0 to 1")
        if self.eval_resize is not None:
            _require(self.eval_resize >= self.image_size, "data.eval_resize", self.eval_resize, "at least image_size")


@dataclass
class DistillConfig:
    """ScaleKD's terms. Weights of 0 switch a term off.

    Attributes:
        kd_weight: a in (1-a) CE + a KD; 0 trains on CE alone beside the feature terms.
        temperature: Temperature of logit KD.
        features: False leaves the projectors out: plain logit KD.
        weights_s3: (spatial, frequency) weights of the stage n-1 terms, which pass through the teacher's last stage.
        weights_s4: (spatial, frequency) weights of the last stage's terms.
        heads_s3: Attention heads of the stage n-1 projectors; None takes the teacher's own.
        heads_s4: Attention heads of the last stage's projectors; None takes the teacher's own.
        softmax_scale: gamma in softmax(gamma QK^T / sqrt(d)).
        norm: Norm after the projector's convolution.
        projector: `cap`, or `linear` for the common 1x1 convolution, to compare with.
        tpp: False compares stage n-1 with the teacher's own stage n-1 instead of passing it through the teacher's last
            stage, and lets the last stage's projectors learn their own queries.
        cut: Side of the lowest DCT frequencies that the frequency view drops, k x k.
    """

    kd_weight: float = 0.5
    temperature: float = 1.0
    features: bool = True
    weights_s3: tuple[float, float] = (0.08, 0.06)
    weights_s4: tuple[float, float] = (0.08, 0.06)
    heads_s3: int | None = None
    heads_s4: int | None = None
    softmax_scale: float = 5.0
    norm: Literal["batch", "layer"] = "batch"
    projector: Literal["cap", "linear"] = "cap"
    tpp: bool = True
    cut: int = 1

    def __post_init__(self) -> None:
        _require(0.0 <= self.kd_weight <= 1.0, "distill.kd_weight", self.kd_weight, "0 to 1")
        _require(self.temperature > 0.0, "distill.temperature", self.temperature, "positive")
        _require(self.softmax_scale > 0.0, "distill.softmax_scale", self.softmax_scale, "positive")
        _require(self.cut >= 1, "distill.cut", self.cut, "at least 1 (1 drops the mean alone)")
        for name in ("weights_s3", "weights_s4"):
            _require(min(getattr(self, name)) >= 0.0, f"distill.{name}", getattr(self, name), "not negative")
        for name in ("heads_s3", "heads_s4"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"distill.{name}", value, "positive")


@dataclass
class OptimConfig:
    """Optimizer and its step.

    Attributes:
        name: Optimizer.
        lr: Learning rate after warm-up, for `base_batch` images or, where that is None, for the run's global batch.
        base_batch: Images that `lr` was made for: it is scaled in proportion to the global batch. None does not scale.
        weight_decay: Decoupled for AdamW and LAMB, L2 for SGD.
        no_decay: What weight decay leaves alone: `1d` norms, biases and other one-dimensional parameters, position
            embeddings, class tokens and the projectors' queries; `embeddings` position embeddings and class tokens; `none`
            nothing.
        momentum: SGD only (Nesterov off).
        betas: AdamW and LAMB.
        eps: AdamW and LAMB.
        clip: Largest global gradient norm; 0 is no clipping.
    """

    name: Literal["sgd", "adamw", "lamb"] = "adamw"
    lr: float = 1e-3
    base_batch: int | None = None
    weight_decay: float = 0.05
    no_decay: Literal["1d", "embeddings", "none"] = "1d"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0.0, "optim.lr", self.lr, "positive")
        _require(self.base_batch is None or self.base_batch > 0, "optim.base_batch", self.base_batch, "at least 1")
        _require(self.weight_decay >= 0.0, "optim.weight_decay", self.weight_decay, "not negative")
        _require(self.clip >= 0.0, "optim.clip", self.clip, "not negative (0 is off)")


@dataclass
class EmaConfig:
    """Moving average of the student's weights, once an optimizer step: average <- decay * average + (1 - decay) * weights.

    Attributes:
        decay: Share of the old average that stays, the same from the first step on; 0 keeps no average. (The published
            momentum is 1 - decay.)
        evaluate: The average is what is shipped as student.safetensors and what `top1` counts; it is measured in any case.
    """

    decay: float = 0.0
    evaluate: bool = True

    def __post_init__(self) -> None:
        _require(0.0 <= self.decay < 1.0, "ema.decay", self.decay, "in [0, 1) (0 is off)")


@dataclass
class ScheduleConfig:
    """Learning rate over the run, a pure function of the step.

    Attributes:
        name: `cosine`, `multistep` or `constant`.
        epochs: Length of the run in passes over the training images.
        warmup_epochs: Linear warm-up from `warmup_factor` * lr to lr.
        warmup_factor: Where warm-up starts, as a share of lr.
        min_lr: Where cosine ends.
        milestones: Epochs after which `multistep` multiplies by gamma.
        gamma: That factor.
    """

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    epochs: float = 100.0
    warmup_epochs: float = 0.0
    warmup_factor: float = 1e-3
    min_lr: float = 0.0
    milestones: tuple[float, ...] = (30.0, 60.0, 90.0)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        # so that a dumped configuration reads the same however it was typed
        self.epochs, self.warmup_epochs = float(self.epochs), float(self.warmup_epochs)
        self.milestones = tuple(float(m) for m in self.milestones)
        _require(self.epochs > 0.0, "schedule.epochs", self.epochs, "positive")
        _require(
            0.0 <= self.warmup_epochs < self.epochs, "schedule.warmup_epochs", self.warmup_epochs, "in [0, epochs)"
        )
        _require(0.0 <= self.warmup_factor <= 1.0, "schedule.warmup_factor", self.warmup_factor, "0 to 1")


@dataclass
class RunDirConfig:
    """Where the run writes and how often.

    Attributes:
        dir: The run's folder: checkpoints/, tensorboard/, config.json, student.safetensors at the end.
        ds_config: DeepSpeed JSON: a path, or a name in ds_configs/ (`zero1`, `zero2`, ...).
        resume: `auto` goes on from the newest checkpoint in `dir` if there is one, `never` refuses a used folder, a path
            takes that checkpoint.
        log_every: Steps between two lines of scalars.
        eval_every: Epochs between two evaluations; 0 evaluates at the end only.
        save_every: Steps between two checkpoints; 0 saves at the end only.
        keep_last: Newest checkpoints kept.
        keep_best: Checkpoints with the best top-1 kept besides.
        rank_timeout: Seconds without a word from another rank after which a rank ends, naming it.
        hang_timeout: Seconds in which no rank gets on, though all live, after which all write their stacks and end; 0 waits.
        max_skipped: Steps in a row that may be skipped for gradients that are not finite.
        stop_after: End (with a checkpoint) after this many steps of the whole schedule; None runs it out.
        teacher_placement: Where the frozen teacher's weights are. `replica`: whole on every rank; `sharded`: a share on each
            rank, gathered block by block as they are used; `offload`: that share in the host's memory; `auto`: a replica
            on CPUs, and on GPUs the first of the three that fits by the memory plan.
        progress: `auto` draws a bar on a terminal (`bar`) and writes lines elsewhere (`plain`); `quiet` (or `none`) shows
            nothing, `json` prints one JSON object a line on standard output, and nothing else there.
        monitors: Where scalars go, a list with commas of `tensorboard`, `csv`, `wandb` and `comet`; empty is TensorBoard and
            what the DeepSpeed JSON says.
        pictures: Validation images that TensorBoard shows at each evaluation, as both models see them; 0 shows none.
        baseline_top1: Top-1 in percent of the same student without a teacher, for the gain in the report at the end; None takes
            the paper's, for its pairs on 1,000 classes.
        peak_tflops: What one device could compute, in 10^12 FLOP/s, for `system/mfu`; None is the data sheet's for GPUs that
            are known, and no such scalar on others.
        compile_teacher: torch.compile for the frozen teacher: minutes at the start, for long runs on GPUs.
    """

    dir: str = "runs/default"
    ds_config: str = "zero1"
    resume: str = "never"
    log_every: int = 20
    eval_every: float = 1.0
    save_every: int = 500
    keep_last: int = 2
    keep_best: int = 1
    rank_timeout: float = 30.0
    hang_timeout: float = 1800.0
    max_skipped: int = 10
    stop_after: int | None = None
    teacher_placement: Literal["auto", "replica", "sharded", "offload"] = "auto"
    progress: Literal["auto", "bar", "plain", "quiet", "none", "json"] = "auto"
    monitors: str = ""
    pictures: int = 4
    baseline_top1: float | None = None
    peak_tflops: float | None = None
    compile_teacher: bool = False

    def __post_init__(self) -> None:
        _require(self.log_every > 0, "run.log_every", self.log_every, "at least 1")
        _require(self.keep_last > 0, "run.keep_last", self.keep_last, "at least 1")
        _require(self.keep_best >= 0, "run.keep_best", self.keep_best, "not negative")
        _require(self.rank_timeout >= 5.0, "run.rank_timeout", self.rank_timeout, "at least 5 s")
        _require(self.hang_timeout >= 0.0, "run.hang_timeout", self.hang_timeout, "not negative (0 is off)")
        _require(self.max_skipped > 0, "run.max_skipped", self.max_skipped, "at least 1")
        _require(self.save_every >= 0, "run.save_every", self.save_every, "not negative (0 is off)")
        _require(self.eval_every >= 0, "run.eval_every", self.eval_every, "not negative (0 is off)")
        _require(self.pictures >= 0, "run.pictures", self.pictures, "not negative (0 is off)")
        peak = self.peak_tflops
        _require(peak is None or peak > 0.0, "run.peak_tflops", peak, "positive")


@dataclass
class AsPublishedConfig:
    """What the published files do though they say otherwise; each is off, and the intended behaviour on.

    Attributes:
        no_mixing: Mixup and cutmix are configured, and never happen.
        unscaled_lr: The learning rate is the same on any batch, whatever `optim.base_batch` is.
        teacher_in_train_mode: The teacher's stochastic depth runs, in its targets, its logits and its last stage.
    """

    no_mixing: bool = False
    unscaled_lr: bool = False
    teacher_in_train_mode: bool = False


@dataclass
class RunConfig:
    """One run of `launch/train.py`.

    Attributes:
        recipe: Name this config started from.
        student: timm name (`hf-hub:` and `local-dir:` ones too), or a consolidated .safetensors with its card beside it.
        student_kwargs: Further arguments of the student's constructor, as JSON.
        student_sync_bn: BatchNorm statistics of the student over all ranks, on GPUs; CPUs have no such operator.
        student_weights: `none` starts from timm's initialisation, `pretrained` from timm's weights, else a .safetensors,
            .pth or .pt file; a classifier of other classes starts fresh.
        student_taps: Indices of the two feature maps that are distilled, as timm's `forward_intermediates` counts them;
            None takes the ones that the published code takes for this kind of model.
        teacher: timm name (`hf-hub:` and `local-dir:` ones too), a consolidated .safetensors with its card beside it, or
            `none` for supervised training.
        teacher_kwargs: Further arguments of the teacher's constructor, as JSON.
        teacher_weights: `pretrained`, `none` (random; for tests), or a .safetensors, .pth or .pt file in timm's names,
            mmpretrain's or those of the first release; its number of classes is the teacher's.
        teacher_image_size: Side that the teacher sees, in pixels; None is its own, or the student's where its
            constructor takes an image size.
        loss: Student loss on the labels; bce is summed over classes and averaged over the batch.
        label_smoothing: For `ce`.
        global_batch_size: Images in one optimizer step over all ranks; the same on any number of ranks.
        micro_batch_size: Most images in one forward pass on one rank; gradients are accumulated up to the global batch.
        seed: Seed of every generator.
    """

    recipe: str = ""
    student: str = "resnet50"
    student_kwargs: dict[str, Any] = field(default_factory=dict)
    student_sync_bn: bool = False
    student_weights: str = "none"
    student_taps: tuple[int, int] | None = None
    teacher: str = "none"
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_weights: str = "pretrained"
    teacher_image_size: int | None = None
    loss: Literal["ce", "bce"] = "ce"
    label_smoothing: float = 0.0
    global_batch_size: int = 256
    micro_batch_size: int = 32
    seed: int = 0
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    as_published: AsPublishedConfig = field(default_factory=AsPublishedConfig)
    run: RunDirConfig = field(default_factory=RunDirConfig)

    def __post_init__(self) -> None:
        _require(self.global_batch_size > 0, "global_batch_size", self.global_batch_size, "at least 1")
        _require(self.micro_batch_size > 0, "micro_batch_size", self.micro_batch_size, "at least 1")
        _require(0.0 <= self.label_smoothing < 1.0, "label_smoothing", self.label_smoothing, "0 to 1")
        _require(
            self.label_smoothing == 0.0 or self.loss == "ce", "label_smoothing", self.label_smoothing, "0 with loss bce"
        )

    @property
    def learning_rate(self) -> float:
        """After warm-up, for this run's global batch."""
        base = self.optim.base_batch
        if base is None or self.as_published.unscaled_lr:
            return self.optim.lr
        return self.optim.lr * self.global_batch_size / base

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return (self.data.mixup > 0 or self.data.cutmix > 0) and not self.as_published.no_mixing

    def batches(self, world_size: int) -> tuple[int, int]:
        """(micro batch, accumulation steps) on `world_size` ranks.

        Raises:
            UserError: The global batch cannot be split evenly.
        """
        if self.global_batch_size % world_size:
            raise UserError(
                f"global_batch_size is {self.global_batch_size}, which {world_size} ranks cannot share evenly: choose a "
                f"multiple of {world_size}."
            )
        per_rank = self.global_batch_size // world_size
        # the largest micro batch that divides a rank's share: the optimizer step is then the same on any world size
        micro = next(m for m in range(min(self.micro_batch_size, per_rank), 0, -1) if per_rank % m == 0)
        return micro, per_rank // micro

    def as_dict(self) -> dict[str, Any]:
        """Plain nested data, for JSON."""
        return dataclasses.asdict(self)
