"""A process in which PyTorch takes a machine without a GPU for one with H100s."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).resolve().parent
_MEMORY = 80 << 30
# registrations last as long as this
_OPERATORS = torch.library.Library("aten", "IMPL")


def available() -> str | None:
    """Why a process cannot pretend here, in one line; None where it can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA, whose operators fake tensors need"
    if torch.cuda.is_available():
        return "there is a GPU, which the stand-in would hide"
    if not _compiler():
        return "no C compiler: the stand-in for the CUDA runtime cannot be built"
    return None


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)


def environment(folder: Path, devices: int = 2) -> dict[str, str]:
    """The environment of a process that may call `pretend`.

    Args:
        folder: Where the stand-ins are built, unless they are there.
        devices: GPUs that the process sees.

    Raises:
        RuntimeError: They cannot be built; `available` says so beforehand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # PyTorch looks for the driver by this name, and the runtime's functions are taken from what is loaded first
    for source, library in (("runtime.c", "libfakecudart.so"), ("driver.c", "libcuda.so.1")):
        if not (folder / library).is_file():
            unfinished = folder / f".{library}.{os.getpid()}"
            command = [_compiler(), "-shared", "-fPIC", "-w", str(HERE / source), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source} cannot be compiled: {done.stderr.strip()}")
            unfinished.rename(folder / library)
    libraries = os.pathsep.join([str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {
        "LD_PRELOAD": str(folder / "libfakecudart.so"),
        "LD_LIBRARY_PATH": libraries,
        "PYTHONPATH": path,
        "FAKE_CUDA_DEVICES": str(devices),
    }


def pretend() -> None:
    """Makes PyTorch take this process for one with GPUs of an H100's properties; for a process of `environment`.

    Raises:
        RuntimeError: The process was started without it.
    """
    if "FAKE_CUDA_DEVICES" not in os.environ:
        raise RuntimeError("start the process with fake_cuda.environment()")
    count = int(os.environ["FAKE_CUDA_DEVICES"])
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=_MEMORY,
        multi_processor_count=132,
        warp_size=32,
        uuid="0" * 8,
        L2_cache_size=50 << 20,
        shared_memory_per_block_optin=232448,
    )
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: None,
        "device_count": lambda: count,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda *_, **__: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "get_rng_state_all": list,
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
    }
    for name, replacement in replaced.items():
        setattr(torch.cuda, name, replacement)
    # PyTorch's own constructor goes around the stand-in; on a GPU it is what is written here, a blocking copy
    made = torch.tensor
    torch.tensor = lambda data, device=None, **more: (
        made(data, **more) if device is None else _without_value(made(data, **more)).to(device)
    )
    # newer ones draw until all values lie inside the bounds, which values that are not there never do
    torch.nn.init._no_grad_trunc_normal_ = lambda tensor, *_, **__: tensor
    torch.nn.Module._apply = _apply
    # on a GPU many tensors share a kernel, which PyTorch offers to its own types alone
    torch.nn.utils.clip_grad._has_foreach_support = lambda tensors, device: True
    sys.modules["torch.optim.optimizer"]._foreach_supported_types.append(fake_tensor.FakeTensor)
    # the one fused optimizer of ours that PyTorch has no function of shapes for; nothing comes out of it but changed values
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_sgd_", "Meta"):
        _OPERATORS.impl("_fused_sgd_", lambda *_, **__: None, "Meta")
    # fake tensors would make a real context otherwise
    if hasattr(fake_tensor, "init_gpu_context"):
        fake_tensor.init_gpu_context = lambda device: None


def _without_value(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor whose value is known would be copied to a real GPU otherwise."""
    if isinstance(tensor, fake_tensor.FakeTensor):
        tensor.constant = None
    return tensor


def tensors(allow_real: bool = False) -> AbstractContextManager:
    """Context manager in which every new tensor is fake, on a CPU or on a GPU.

    Args:
        allow_real: Take real CPU tensors, such as those around NumPy's arrays, for fake ones.
    """
    return FakeTensorMode(allow_non_fake_inputs=allow_real)


def _apply(
    module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    """`torch.nn.Module._apply`, by which modules are moved and converted, with new parameters in place of the old ones.

    PyTorch's own swaps fake parameters with the new ones, which it refuses where anything refers to them.
    """
    for child in module.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None and (applied := fn(parameter)) is not parameter:
                module._parameters[name] = torch.nn.Parameter(applied, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
    return module


def materialise(device: torch.device, *modules: torch.nn.Module) -> None:
    """Gives modules that were built on the meta device fake tensors of `device`, inside of `tensors`.

    To build them so takes a fraction of the time of fake tensors. What is no parameter or buffer stays on the meta device,
    as it would stay on the CPU in a module that is moved, and meets no other tensor.

    Args:
        device: Where to.
        modules: Modules; a distiller's teacher is no submodule, and is named beside it.
    """
    made: dict[int, torch.Tensor] = {}
    for held in (held for module in modules for m in module.modules() for held in (m._parameters, m._buffers)):
        for name, tensor in held.items():
            if tensor is None:
                continue
            if id(tensor) not in made:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            held[name] = made[id(tensor)]
