"""CUDA tensors without a GPU: what a step would do on one, counted operation by operation.

Tensors are PyTorch's fake ones: they have a device, a shape and strides, and no values. Code that asks the CUDA runtime
behind Python's back, such as device guards and the choice of an attention, meets a stand-in that says H100. So a process
has to be started for it:

    env = fake_cuda.environment(folder)            # builds the stand-ins with the C compiler, once
    subprocess.run([sys.executable, "script.py"], env=env)

and in that process

    fake_cuda.pretend()
    with fake_cuda.tensors(), fake_cuda.Watch() as watch, watch.part("student"):
        ...
    print(watch.launches, watch.syncs, watch.copies)

`Watch` raises where tensors of a CPU and of a GPU, or of two GPUs, meet in one operation. What it cannot see: times, values,
and what an operator of PyTorch does inside (a convolution's backward is one operation here, and two or three kernels there).
"""

from fake_cuda.count import Watch
from fake_cuda.launches import count_kernels, run_own_operators
from fake_cuda.runtime import available, environment, materialise, pretend, tensors

__all__ = [
    "Watch",
    "available",
    "count_kernels",
    "environment",
    "materialise",
    "pretend",
    "run_own_operators",
    "tensors",
]
