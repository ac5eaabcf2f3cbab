"""Measures the steps of a run, and makes the scalars of a logged step."""

from __future__ import annotations

import time

import torch
from deepspeed import comm as dist

from scalekd_ds.distiller import untimed
from scalekd_ds.training.run import Run
from scalekd_ds.watching.agreement import cosines, logit_agreement
from scalekd_ds.watching.communication_time import CommunicationTime
from scalekd_ds.watching.mfu import device_tflops, flop_per_image
from scalekd_ds.watching.resources import Energy, memory
from scalekd_ds.watching.timing import PARTS, StepTimer


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each scalar over the ranks, with one all-reduce and one host sync; collective.

    A NaN on any rank is a NaN on every rank.
    """
    means = torch.stack([value.float() for value in values.values()]) / dist.get_world_size()
    dist.all_reduce(means)
    return dict(zip(values, means.tolist(), strict=True))


def sum_over_ranks(value: float, device: torch.device) -> float:
    """The sum of a number over the ranks; collective."""
    total = torch.tensor(float(value), device=device)
    dist.all_reduce(total)
    return total.item()


class Watch:
    """Times training and counts its energy; a context manager around the training loop.

    On entry it instruments the distiller and `deepspeed.comm`, and on exit it restores them. A step that is not logged
    costs readings of the clock, or events on a GPU, and never a wait for the device.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.timer = run, StepTimer(run.device)
        self.energy = Energy(run.device)
        self._communication = CommunicationTime(self.timer.part)
        self._logits: tuple[torch.Tensor, torch.Tensor] | None = None
        self._logged = run.step
        self._images = self._seconds = 0.0
        # steps and seconds between the last two logged steps, and the time that the cache was read for before
        self._window = (0, 1.0)
        self._cache_read = 0.0
        self.started = time.perf_counter()
        self.peak_flops: float | None = None
        tflops = device_tflops(run.cfg, run.device)
        if tflops is not None and dist.get_rank() == 0:
            engine = run.engine
            autocast = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
            micro, _ = run.cfg.batches(dist.get_world_size())
            self._flop = flop_per_image(run.cfg, len(run.classes), micro, autocast)
            self.peak_flops = tflops * 1e12 * dist.get_world_size() if self._flop else None

    def __enter__(self) -> Watch:
        self.run.distiller.time_part = self.timer.part
        self._communication.__enter__()
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        self._communication.__exit__(*error)
        self.run.distiller.time_part, self.run.distiller.on_logits = untimed, None

    def reset(self) -> None:
        """Begins a new measurement; the time since the last step, such as that of an evaluation, does not count."""
        self.timer.reset()
        self._logged = self.run.step
        self._cache_read = self.run.cache.seconds if self.run.cache is not None else 0.0

    def expect(self, logged: bool) -> None:
        """Call it before a step; `logged` says whether `scalars` will be called after it."""
        self.run.distiller.on_logits = self._keep if logged else None

    def _keep(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
        self._logits = student_logits.detach(), teacher_logits

    def scalars(self, losses: dict[str, torch.Tensor]) -> dict[str, float]:
        """All scalars of a logged step by their names in TensorBoard; collective.

        Args:
            losses: Losses of this rank, means over the micro batches.
        """
        run = self.run
        agreement = logit_agreement(*self._logits) if self._logits is not None else {}
        self._logits = None
        scalars = mean_over_ranks(losses | agreement)
        if run.distiller.feature_weights and run.teacher is not None:
            scalars |= cosines(scalars, run.distiller)
        scalars |= {f"weight/{name}": weight for name, weight in run.distiller.weights().items()}
        scalars["optim/lr"] = run.engine.get_lr()[0]
        norm = run.engine.get_global_grad_norm() if run.grad_norm is None else run.grad_norm
        if norm is not None:
            scalars["optim/grad_norm"] = float(norm)
        scalars["optim/skipped_steps"] = float(run.engine.skipped_steps)
        scalars["data/bad_files"] = sum_over_ranks(len(run.train_loader.bad_files), run.device)
        scalars["data/images_seen"] = float(run.images)
        scalars["progress/epoch"] = run.images / (run.steps_per_epoch * run.cfg.global_batch_size)
        self.energy.update()
        return scalars | self._system() | self._of_cache()

    def _of_cache(self) -> dict[str, float]:
        """How long this rank has read the teacher cache since the last logged step, beside its steps, and what it has read."""
        cache = self.run.cache
        if cache is None:
            return {}
        read, self._cache_read = cache.seconds - self._cache_read, cache.seconds
        steps, wall = self._window
        return {
            "cache/read_s": read / max(1, steps),
            "cache/share_of_step": read / wall,
            "cache/view": float(cache.last_view),
            "cache/damaged_entries": sum_over_ranks(len(cache.damaged), self.run.device),
        }

    def _system(self) -> dict[str, float]:
        """Speed, memory, and shares of the time of a step by part, of this rank since the last logged step."""
        steps = self.run.step - self._logged
        self._logged = self.run.step
        wall, shares = self.timer.read()
        self._window = steps, wall
        images = steps * self.run.cfg.global_batch_size
        self._images, self._seconds = self._images + images, self._seconds + wall
        found = {
            "system/images_per_s": images / wall,
            "system/images_per_s_mean": self._images / self._seconds,
            "system/step_s": wall / steps,
        }
        for name in PARTS:
            if name in shares:
                found[f"system/share_{name}"] = shares[name]
        # the shares of a GPU may sum to over 1, because it computes while the host waits for data
        found["system/share_other"] = max(0.0, 1.0 - sum(shares.get(name, 0.0) for name in PARTS))
        found["system/share_communication"] = shares.get("communication", 0.0)
        found["data/wait_s"] = shares.get("data_wait", 0.0) * wall / steps
        if self.peak_flops is not None and self._flop is not None:
            found["system/mfu"] = self._flop * images / wall / self.peak_flops
        return found | memory(self.run.device)

    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, with those of earlier starts."""
        return self.run.seconds_before + time.perf_counter() - self.started

    def joules(self) -> float | None:
        """Energy of all ranks in joules, with that of earlier starts; None where no rank can measure it, or one no more.

        Collective.
        """
        own = self.energy.update()
        values = own or 0.0, float(own is not None), float(self.energy.is_lost)
        total, known, lost = (sum_over_ranks(value, self.run.device) for value in values)
        return total + self.run.joules_before if known and not lost else None
