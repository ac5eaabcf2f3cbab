"""What of a run torch.compile compiles, where it keeps what it has made, and what a user reads where it fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from scalekd_ds.distiller import ScaleKD
from scalekd_ds.errors import UserError
from scalekd_ds.names import one_line

Asked = Literal["auto", "off", "teacher", "all"]
Compiled = Literal["off", "teacher", "all"]

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def what_to_compile(asked: Asked, device_type: str, stage: int) -> Compiled:
    """What `--run.compile` stands for in this run.

    `auto` is the teacher on GPUs, and nothing on CPUs, where compiling a Swin-S takes minutes, longer than many a run.

    Args:
        asked: `run.compile`.
        device_type: `cuda` or `cpu`.
        stage: DeepSpeed's ZeRO stage.

    Raises:
        UserError: `all` at ZeRO stage 3.
    """
    if asked == "auto":
        return "teacher" if device_type == "cuda" else "off"
    if asked == "all" and stage == 3:
        raise UserError(
            "run.compile is all at ZeRO stage 3, where DeepSpeed gathers the weights in hooks that a compiled graph does not "
            "call: set --run.compile teacher, or a --run.ds_config of stage 0, 1 or 2."
        )
    return asked


def _caches() -> Path | None:
    """The user's folder of caches, or None where there is none that can be written."""
    # a user without a home, as in a container that runs under any number, has none; the standard says to ignore a relative one
    places = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]
    place = next((Path(place) for place in places if os.path.isabs(place)), None)
    if place is None:
        return None
    try:
        (place / "scalekd_ds").mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return place if os.access(place / "scalekd_ds", os.W_OK) else None


def options(deterministic: bool) -> dict[str, Any]:
    """The arguments of torch.compile in a run; call it before anything is compiled.

    Compiled code is kept in the user's cache, so that a second start finds it; torch's own place is the folder of temporary
    files, which many machines empty. TORCHINDUCTOR_CACHE_DIR names another one.

    Args:
        deterministic: `run.deterministic`: no choice among kernels by how fast they were just now.
    """
    caches = _caches()
    if caches is not None:
        os.environ.setdefault(_CACHE, str(caches / "scalekd_ds" / "compiled"))
    # dropout and stochastic depth then draw the numbers that they draw without compiling
    settings: dict[str, Any] = {"fallback_random": True}
    if deterministic:
        import torch._inductor.config as inductor

        # the older releases of torch that are supported may not have it
        settings |= {"deterministic": True} if hasattr(inductor, "deterministic") else {}
    # every micro batch of a run has the same shape
    return {"dynamic": False, "options": settings}


def eagerly() -> AbstractContextManager:
    """A context in which nothing is compiled, and what was compiled runs as it was written.

    Evaluations have other batches, a short one at the end among them, and would compile everything anew for each size.
    """
    # the import of dynamo takes a second, which a run without it need not spend
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _is_of_the_compiler(error: BaseException) -> bool:
    """Whether an error is torch.compile's own, and not one of what it compiles."""
    if "torch._dynamo" not in sys.modules:
        return False
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _cure(said: str) -> str:
    missing = ("C++ compiler", "C compiler", "is not found", "C++ compile error")
    return "install a compiler (Debian: g++ python3-dev), or " if any(words in said for words in missing) else ""


def _said(error: BaseException) -> str:
    """What torch.compile says of its failure; hints for torch's developers follow it, which are left out."""
    said = str(getattr(error, "inner_exception", None) or error).split("\nSet TORCHDYNAMO")[0]
    return one_line(said)[:300]


def try_teacher(distiller: ScaleKD, batch: int) -> str | None:
    """Compiles a teacher whose `compile` was called, on blank images and tokens, and undoes it where that fails.

    Of a headless teacher there is the last stage alone.

    Args:
        distiller: On the device of the run.
        batch: Images of a micro batch.

    Returns:
        What a user should know, in one line, or None.
    """
    teacher = distiller.teacher
    # a headless one without features has nothing to compile
    if teacher is None or (teacher.headless and not teacher.is_compiled):
        return None
    device, precision = next(teacher.parameters()).device, teacher.precision
    try:
        if not teacher.headless:
            distiller.teacher_targets(torch.zeros(batch, 3, *distiller.image_size, device=device))
        # without features at that stage nothing goes through the last one
        if distiller.tpp and "s3" in distiller.projectors:
            pair: Any = distiller.projectors["s3"]
            before, views = teacher.stages[0], len(pair.names)
            # as in a step: of all views, under autocast, and backward; the projectors' last norm is in float32 on GPUs
            dtype = precision if device.type == "cpu" else torch.float32
            tokens = torch.zeros(views * batch, before.grid[0] * before.grid[1], before.dim, device=device, dtype=dtype)
            with torch.autocast(device.type, precision, enabled=precision is not None):
                out = teacher.last_stage(tokens.requires_grad_())
            torch.autograd.grad(out.sum(), tokens)
    except RuntimeError as error:
        if not _is_of_the_compiler(error):
            raise
        teacher.run_as_written()
        return f"the teacher is not compiled, since torch could not ({_said(error)}); --run.compile off does not try"
    return None


@contextmanager
def naming_the_compiler(asked: Asked) -> Iterator[None]:
    """A context in which a failure of torch.compile ends the run with a line that names the setting.

    Args:
        asked: `run.compile`.

    Raises:
        UserError: torch.compile failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_the_compiler(error):
            raise
        said = _said(error)
        less = "teacher or off" if asked == "all" else "off"
        raise UserError(
            f"run.compile is {asked}, and torch could not compile it ({said}): {_cure(said)}set --run.compile {less}."
        ) from error
