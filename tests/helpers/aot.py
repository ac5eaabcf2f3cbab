"""Compiles a Triton kernel for a GPU that is not there, and reads what it takes. On triton 3.6 and 3.9."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
# bytes of shared memory that a block may ask for
SHARED = {80: 166912, 90: 232448, 100: 232448}
ARCHITECTURES = tuple(SHARED)


class Resources(NamedTuple):
    """registers a thread; stack and shared in bytes; matrix: `wgmma`, `tcgen05`, `mma` or None; fused multiply-adds."""

    registers: int
    stack: int
    shared: int
    matrix: str | None
    fused: int


def aot(
    kernel,
    types: dict[str, str],
    constants: dict,
    num_warps: int,
    arch: int,
    num_stages: int = 3,
    aligned: Collection[str] | None = None,
    fp_fusion: bool = True,
) -> Resources:
    """Compiles `kernel` for sm_`arch`; the arguments `aligned` are multiples of 16, or all pointers and int64 ones."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    if aligned is None:
        aligned = [n for n in names if signature[n][0] == "*" or signature[n] == "i64"]
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=dict(constants), attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    ptx = compiled.asm["ptx"]
    opcodes = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    return Resources(
        int(found[1]),
        int(found[2]) + int(found[4]),
        compiled.metadata.shared,
        next((name for name, opcode in opcodes.items() if opcode in ptx), None),
        len(re.findall(r"fma\.rn\.f(?:32|64)", ptx)),
    )


def assert_sound(resources: Resources, arch: int, matrix: bool) -> None:
    """No spills on sm_90, shared memory that a block can have, no stub, and matrix units where there is a dot."""
    # triton 3.6 has compiled a kernel into a stub of 4 registers without an error
    assert resources.registers >= 16, resources
    assert resources.shared <= SHARED[arch], resources
    assert arch != 90 or resources.stack == 0, resources
    assert not matrix or resources.matrix is not None, resources
