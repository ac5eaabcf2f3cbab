"""The kernels that inductor makes of a part of the step: its own passes and its own scheduler, without code for a GPU.

The graph of a function is traced by AOTAutograd on fake CUDA tensors, cut into a forward and a backward pass by inductor's
partitioner, lowered, and given to inductor's scheduler, which decides what runs in one kernel. What comes after, code and its
compilation, changes neither kernels nor bytes. Products, convolutions and attention stay calls of libraries, as in the
default mode of torch.compile. Left out is what computes on the
device while it compiles: padding of products to aligned widths, which is decided by timing both, and folding of constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_function
from torch._inductor import config, ir, scheduler
from torch._inductor.compile_fx import (
    _recursive_joint_graph_passes,
    _recursive_post_grad_passes,
    partition_fn,
    view_to_reshape,
)
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_leaves, tree_map_only

from roofline_parts.cards import CARDS
from roofline_parts.cost import Kernel, kernels_of, point_flop, shape_text
from roofline_parts.scores import Scores
from roofline_parts.trace import BACKWARD, Trace

# operators of a fused kernel that its name tells, of which there may be dozens
_NAMED = 4
# what is no arithmetic, and no name for a kernel that does more
_SILENT = (
    "convert_element_type",
    "view",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "reshape",
    "getitem",
    "slice",
    "select",
    "clone",
    "copy_",
    "copy",
)


class Fused:
    """Collects the kernels of what it compiles.

    Args:
        scores: Attentions that are not fused, as the eager trace has found them.
        look_into: Makes a trace that looks into our own operators, which inductor calls and does not fuse.

    Attributes:
        kernels: In the order in which they were compiled: the backward pass of a part follows its forward pass.
    """

    def __init__(self, scores: Scores, look_into: Callable[[], Trace]) -> None:
        self.kernels: list[Kernel] = []
        self._scores, self._look_into = scores, look_into
        config.shape_padding = config.joint_graph_constant_folding = False
        # it was taken from torch.cuda before the process pretended to have a GPU
        CudaInterface.get_device_properties = staticmethod(torch.cuda.get_device_properties)
        # it would ask the driver, whose answer decides between two ways to fuse
        scheduler.get_gpu_dram_gbps = lambda: CARDS["H100"].gb_s

    def compiled(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that computes what `call` does, and adds the kernels of both passes to `part`, when it is called.

        Args:
            part: Name of the part; its backward pass is `backward PART`.
            call: A function of trees of fake CUDA tensors.
        """

        def compiler(name: str, is_inference: bool) -> Callable[..., Any]:
            def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
                for found in self._lowered(_copy(graph), inputs, is_inference, name.startswith(BACKWARD)):
                    found["part"] = name
                    self.kernels.append(found)
                return make_boxed_func(graph.forward)

            return compile_graph

        return aot_function(
            call,
            fw_compiler=compiler(part, False),
            bw_compiler=compiler(f"{BACKWARD} {part}", False),
            inference_compiler=compiler(part, True),
            partition_fn=partition_fn,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )

    def _lowered(
        self, graph: torch.fx.GraphModule, inputs: Sequence[Any], is_inference: bool, is_backward: bool
    ) -> Iterator[Kernel]:
        with V.set_fake_mode(detect_fake_mode(inputs)), V.set_debug_handler(DebugContext()):
            if is_inference:
                graph = _recursive_joint_graph_passes(graph) or graph
            view_to_reshape(graph)
            _recursive_post_grad_passes(graph, is_inference=is_inference)
            lowering = GraphLowering(graph, example_inputs=inputs, is_inference=is_inference, is_backward=is_backward)
            with V.set_graph_handler(lowering):
                lowering.run(*inputs)
                lowering._update_scheduler()
                for node in lowering.scheduler.nodes:
                    yield from self._kernels_of(node)

    def _kernels_of(self, node: Any) -> list[Kernel]:
        if isinstance(node, NopKernelSchedulerNode):
            return []
        if isinstance(node, ExternKernelSchedulerNode):
            # the outputs of a call that has several are nodes of their own
            return [] if isinstance(node.node, ir.MultiOutput) else self._call(node)
        return [_fused(node)]

    def _call(self, node: Any) -> list[Kernel]:
        """The kernels of a call of a library."""
        origin = node.node.get_origin_node() or next(iter(node.node.get_origins()))
        args, kwargs, out = tree_map_only(
            torch.fx.Node, lambda n: n.meta["val"], (origin.args, dict(origin.kwargs), origin)
        )
        name = origin.target._schema.name
        if name.startswith("scalekd_ds::"):
            with self._look_into() as trace:
                origin.target(*args, **kwargs)
            return trace.kernels
        kernels = kernels_of(origin.target, args, kwargs, out)
        if name in ("aten::bmm", "aten::baddbmm"):
            self._scores.leave_out(kernels[0], [*tree_leaves(args), out])
        return kernels


def _fused(node: Any) -> Kernel:
    """A kernel that inductor writes, with the bytes that its scheduler counts: each buffer once."""
    # a statistic such as a mean with its variance has two values
    found = [o for inner in node.get_nodes() for o in inner.node.get_origins() if o.op == "call_function"]
    names = list(dict.fromkeys(map(_name, found)))
    origins = [o for o in found if isinstance(o.meta.get("val"), torch.Tensor)]
    telling = [name for name in names if name not in _SILENT] or names
    working = [(_name(o), o.meta["val"]) for o in origins if _name(o) not in _SILENT]
    both = node.get_read_write_buffers_sizes()
    written = node.get_read_write_buffers_sizes_impl(include_reads=False, include_writes=True)
    return {
        "op": ("+".join(telling[:_NAMED]) or "copy") + ("+..." if len(telling) > _NAMED else ""),
        "shape": shape_text([o.meta["val"] for o in origins]),
        "part": "",
        "read": both - written,
        "written": written,
        "flop": sum(point_flop(name, [value]) for name, value in working),
        "unit": "fp32",
        "must": None,
        "kernels": 1,
        "launches": 1,
        "waits": False,
    }


def _name(node: torch.fx.Node) -> str:
    """The operator of a node, without its library and overload."""
    return str(getattr(node.target, "__name__", node.target)).removeprefix("aten.").removeprefix("prims.").split(".")[0]


def _copy(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy that the lowering may change."""
    copied = torch.fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    return torch.fx.GraphModule(graph, copied)
