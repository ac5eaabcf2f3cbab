"""`RunDirConfig`: where a run writes, how often, and what of the machine it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scalekd_ds.config.require import require

TeacherPlacement = Literal["replica", "sharded", "offload"]


@dataclass
class RunDirConfig:
    """Where the run writes and how often.

    Attributes:
        dir: The run's folder: checkpoints/, tensorboard/, config.json, student.safetensors at the end.
        ds_config: DeepSpeed JSON: a path, or a name in ds_configs/ (`zero1`, `zero2`, ...).
        resume: `auto` goes on from the newest checkpoint in `dir` if there is one, `never` refuses a used folder, and a
            path goes on from that checkpoint.
        log_every: Steps between two lines of scalars.
        eval_every: Epochs between two evaluations; 0 evaluates at the end only.
        save_every: Steps between two checkpoints; 0 saves at the end only.
        keep_last: Number of newest checkpoints that are kept.
        keep_best: Number of checkpoints with the best top-1 that are kept besides.
        rank_timeout: Seconds without a sign of life from another rank after which a rank ends, naming the silent one.
        hang_timeout: Seconds without progress on any rank, though all are alive, after which all write their stacks and
            end; 0 waits for ever.
        max_skipped: Steps in a row that may be skipped for gradients that are not finite.
        stop_after: End (with a checkpoint) after this many steps of the whole schedule; None runs to its end.
        teacher_placement: Where the frozen teacher's weights are. `replica`: whole on every rank; `sharded`: a share on
            each rank, gathered block by block as they are used; `offload`: that share in the host's memory; `auto`: a
            replica on CPUs, and on GPUs the first of the three that fits by the memory plan.
        teacher_precision: What the frozen teacher computes in. `autocast`: as the DeepSpeed JSON says of the run;
            `fp32`: float32; `bf16`: weights and all activations, also the residual stream; `fp8`: the same, and the
            linear layers before its last stage in 8-bit floats (torchao). The last two change the target of the run:
            at the start, 256 validation images show by how much.
        teacher_gate_spatial: Most that `bf16` and `fp8` may change the teacher's tokens: the mean of 1 - cosine.
        teacher_gate_frequency: The same of the tokens in the frequency view.
        teacher_gate_kl: The same of the teacher's logits: the mean KL divergence in nats.
        cache_gate: Entries of a teacher cache that are compared at the start with the views of this run, and with the
            teacher where its weights are given as a file; 0 compares none.
        progress: `auto` draws a bar on a terminal (`bar`) and writes lines elsewhere (`plain`); `quiet` (or `none`)
            shows nothing, `json` prints one JSON object a line on standard output, and nothing else there.
        monitors: Where scalars go, separated by commas: `tensorboard`, `csv`, `wandb` and `comet`; empty is TensorBoard
            and what the DeepSpeed JSON says.
        pictures: Validation images that TensorBoard shows at each evaluation, as both models see them; 0 shows none.
        baseline_top1: Top-1 in percent of the same student without a teacher, for the gain in the report at the end;
            None takes the paper's, for its pairs on 1,000 classes.
        peak_tflops: Peak of one device in 10^12 FLOP/s, for `system/mfu`; None takes the data sheet's for GPUs that are
            known, and leaves `system/mfu` out on others.
        compile: What torch.compile compiles, which takes minutes at a first start and is kept for later ones: nothing
            (`off`), the frozen `teacher`, or `all`, with student, projectors and losses; `auto` is the teacher on GPUs and
            nothing on CPUs.
        compile_teacher: The old name of `compile`, which true makes `teacher` and false `off`.
        deterministic: On GPUs, compute with algorithms only that give the same numbers again, bit for bit, which are
            slower; an operator that has none ends the run. On CPUs all do.
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
    teacher_precision: Literal["autocast", "fp32", "bf16", "fp8"] = "autocast"
    teacher_gate_spatial: float = 1e-3
    teacher_gate_frequency: float = 4e-3
    teacher_gate_kl: float = 1e-2
    cache_gate: int = 64
    progress: Literal["auto", "bar", "plain", "quiet", "none", "json"] = "auto"
    monitors: str = ""
    pictures: int = 4
    baseline_top1: float | None = None
    peak_tflops: float | None = None
    compile: Literal["auto", "off", "teacher", "all"] = "auto"
    compile_teacher: bool | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.compile_teacher is not None and self.compile == "auto":
            self.compile = "teacher" if self.compile_teacher else "off"
        require(self.log_every > 0, "run.log_every", self.log_every, "at least 1")
        require(self.keep_last > 0, "run.keep_last", self.keep_last, "at least 1")
        require(self.keep_best >= 0, "run.keep_best", self.keep_best, "not negative")
        require(self.rank_timeout >= 5.0, "run.rank_timeout", self.rank_timeout, "at least 5 s")
        require(self.hang_timeout >= 0.0, "run.hang_timeout", self.hang_timeout, "not negative (0 is off)")
        require(self.max_skipped > 0, "run.max_skipped", self.max_skipped, "at least 1")
        require(self.save_every >= 0, "run.save_every", self.save_every, "not negative (0 is off)")
        require(self.eval_every >= 0, "run.eval_every", self.eval_every, "not negative (0 is off)")
        require(self.stop_after is None or self.stop_after > 0, "run.stop_after", self.stop_after, "at least 1")
        for gate in ("spatial", "frequency", "kl"):
            bound = getattr(self, f"teacher_gate_{gate}")
            require(bound > 0.0, f"run.teacher_gate_{gate}", bound, "positive")
        require(self.cache_gate >= 0, "run.cache_gate", self.cache_gate, "not negative (0 is off)")
        require(self.pictures >= 0, "run.pictures", self.pictures, "not negative (0 is off)")
        require(self.peak_tflops is None or self.peak_tflops > 0.0, "run.peak_tflops", self.peak_tflops, "positive")
