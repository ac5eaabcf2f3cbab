"""LAMB's kernels: numbers in the interpreter and on a GPU, sharded and not, what they compile to, tables, dispatch, errors."""

import functools

import pytest
import torch
from aot import ARCHITECTURES, aot, assert_sound
from forking import forked_ranks
from fused_lamb_cases import CASES, run
from interpreted import run_cases
from launches import record
from launching import WORKERS, result_of
from torch._subclasses.fake_tensor import FakeTensorMode

from scalekd_ds.kernels.lamb import Place, blocks_of, launch, runs_triton, table, triton_kernels
from scalekd_ds.kernels.lamb.api import implementation
from scalekd_ds.kernels.lamb.blocks import BLOCK, SUMS_BLOCK

FILE = __file__.replace("test_fused_lamb", "fused_lamb_cases")
interpreted = functools.cache(lambda: run_cases(FILE))
BETAS = (0.9, 0.999)


def check(found):
    assert found["finite"] == found.get("deterministic", 1) == 1
    assert found.get("padding changed", 0) == 0
    if "of float64" in found:
        # a few units in the last place, as PyTorch's own operations are
        assert found["of float64"] < max(2e-7, 1.5 * found["torch of float64"]) < 1e-6
        assert found["weights of torch's"] < 5e-7 and found["moments of torch's"] < 5e-7


@pytest.mark.parametrize("name", CASES)
def test_numbers_in_the_interpreter_are_those_of_float64_and_of_pytorch(name):
    check(interpreted()[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_numbers_on_the_gpu_are_those_of_float64_and_of_pytorch(name):
    check(run(**CASES[name], device="cuda"))


@pytest.fixture(scope="module")
def two_ranks():
    """ZeRO stage -> what the worker measured, with the kernels in the interpreter."""
    return result_of(forked_ranks(WORKERS / "fused_lamb_worker.py"))


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_two_ranks_make_the_unsharded_update(two_ranks, stage):
    found = two_ranks[stage]
    # relative to the distance moved in 4 steps, as in tests/optim
    assert found["launches"] >= 4 and found["error"] < 2e-5
    assert found["checkpoint"] == 0.0


def layers_on(device, *sizes):
    """Addresses, blocks and the four lists of tensors of layers."""
    columns = [[torch.zeros(size, device=device) for size in sizes] for _ in range(4)]
    places = [Place(i, 0, size, i) for i, size in enumerate(sizes)]
    # `cuda` alone is another device than that of its tensors, `cuda:0`
    device = columns[0][0].device
    return launch.Addresses(device), blocks_of(places, device), columns


def numbers(step=1, lr=0.1, weight_decay=0.02):
    return launch.numbers_of(step, lr, BETAS, 1e-6, weight_decay)


def make_step(addresses, blocks, columns, **more):
    """A step of a group of layers, of which no other rank has any."""
    addresses.update(columns)
    partials = launch.advance(blocks, addresses, numbers(**more))
    if len(partials):
        squares = torch.zeros(2, len(columns[0]), dtype=torch.float64, device=blocks.table.device)
        launch.add_squares(blocks, partials, squares, 0)
        launch.apply(blocks, addresses, numbers(**more), squares[0], 0)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_no_step_after_the_first_waits_for_the_gpu():
    addresses, blocks, columns = layers_on("cuda", 3 * BLOCK, 1000, 64)
    make_step(addresses, blocks, columns)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (2, 3):
            # gradients that lie elsewhere
            columns[0] = [torch.ones_like(grad) for grad in columns[0]]
            make_step(addresses, blocks, columns, step=step, lr=0.1 * step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(w.abs().max() > 0 for w in columns[2])


@pytest.mark.gpu
def test_a_cuda_graph_captures_a_step():
    addresses, blocks, columns = layers_on("cuda", 3 * BLOCK, 1000, 64)
    held = [tensor for column in columns for tensor in column]

    def filled():
        torch.manual_seed(0)
        for tensor in held:
            # second moments are squares
            tensor.copy_(torch.rand_like(tensor))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        make_step(addresses, blocks, columns)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        make_step(addresses, blocks, columns)
    filled()
    make_step(addresses, blocks, columns)
    expected = [tensor.clone() for tensor in held]
    filled()
    assert not torch.equal(held[-1], expected[-1])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


@pytest.mark.gpu
def test_kernels_run_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    assert torch.cuda.current_device() == 0
    for name in ("layers, some free of decay", "three shards with padding"):
        check(run(**CASES[name], device="cuda:1"))


@pytest.mark.gpu
def test_new_numbers_compile_nothing():
    addresses, blocks, columns = layers_on("cuda", 3 * BLOCK, 1000)
    make_step(addresses, blocks, columns)
    kernels = (triton_kernels.advance_kernel, triton_kernels.sums_kernel, triton_kernels.apply_kernel)

    def compiled():
        return [sum(len(per_device[0]) for per_device in kernel.device_caches.values()) for kernel in kernels]

    before = compiled()
    for step, lr in ((2, 0.0), (16, 1.0), (17, 0.5)):
        make_step(addresses, blocks, columns, step=step, lr=lr)
    assert before == compiled() and all(before)


# -- what the kernels compile to -----------------------------------------------------------------------------------

POINTERS = {torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64"}


def launched(monkeypatch, device="cpu"):
    """The launches of a step with weight decay, and of one without."""
    launches = record(monkeypatch, triton_kernels)
    addresses, blocks, columns = layers_on(device, 3 * BLOCK, 1000)
    for weight_decay in (0.02, 0.0):
        make_step(addresses, blocks, columns, weight_decay=weight_decay)
    return launches


@pytest.mark.parametrize("arch", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a != 90)])
def test_compiles_without_spills_and_without_fused_sums(monkeypatch, arch):
    seen = []
    for each in launched(monkeypatch):
        types, constants = {}, {}
        for parameter in each.kernel.params:
            value = each.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                constants[parameter.name] = value
            elif isinstance(value, torch.Tensor):
                types[parameter.name] = POINTERS[value.dtype]
            else:
                types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        warps = each.options.get("num_warps", 4)
        pointers = [name for name, kind in types.items() if kind[0] == "*"]
        resources = aot(each.kernel, types, constants, warps, arch, aligned=pointers, fp_fusion=False)
        assert_sound(resources, arch, matrix=False)
        assert each.options["enable_fp_fusion"] is False and resources.fused == 0
        # three programs of eight warps on a multiprocessor, so that one reads while another computes
        assert resources.registers * 32 * warps * 3 <= 65536
        seen.append(each.kernel.__name__)
    assert seen == ["advance_kernel", "sums_kernel", "apply_kernel", "advance_kernel"]


def test_what_differs_between_steps_is_not_specialised(monkeypatch):
    launches = record(monkeypatch, triton_kernels)
    layers = layers_on("cpu", 3 * BLOCK, 1000)
    make_step(*layers)
    make_step(*layers, step=2, lr=1.0)
    for before, after in zip(launches[:3], launches[3:], strict=True):
        names = [p.name for p in before.kernel.params if p.do_not_specialize]
        new = {n for n, v in before.arguments.items() if not isinstance(v, torch.Tensor) and v != after.arguments[n]}
        assert new <= set(names)
    assert {"root_scale", "eps_term", "lr"} <= set(names)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    monkeypatch.setattr(launch, "addresses_of", lambda tensors: [0] * len(tensors))
    with FakeTensorMode():
        launches = launched(monkeypatch, "cuda:1")
    assert [x.device for x in launches] == [1] * 4
    assert torch.cuda._exchange_device(-1) == 0


# -- tables --------------------------------------------------------------------------------------------------------


def test_blocks_cover_the_segments_and_nothing_else():
    places = [Place(0, 3, 2 * BLOCK, 0), Place(0, 2 * BLOCK + 8, 1, 4), Place(1, 0, 0, 1), Place(1, 0, BLOCK + 5, 2)]
    blocks = blocks_of(places, torch.device("cpu"))
    assert blocks.elements == 3 * BLOCK + 6 and blocks.turns == 1
    for place, (layer, begin, end) in zip(places, blocks.runs.tolist(), strict=True):
        own, at = blocks.table[begin:end].tolist(), place.start
        assert layer == place.layer
        for tensor, start, count, of in own:
            assert (tensor, start, of) == (place.tensor, at, place.layer) and 0 < count <= BLOCK
            at += count
        assert at == place.start + place.elements
        # of 16 bytes, all but the first
        assert all(start % 4 == 0 for _, start, *_ in own[1:])
    assert sum(end - begin for _, begin, end in blocks.runs.tolist()) == len(blocks.table)


def test_a_large_layer_is_added_up_in_turns():
    assert blocks_of([Place(0, 0, SUMS_BLOCK * BLOCK, 0)], torch.device("cpu")).turns == 1
    assert blocks_of([Place(0, 0, SUMS_BLOCK * BLOCK + 1, 0)], torch.device("cpu")).turns == 2


def test_addresses_are_sent_where_one_is_new():
    addresses, _, columns = layers_on("cpu", 5, 7)
    addresses.update(columns)
    sent = addresses.table
    assert sent.tolist() == [[column[i].data_ptr() for column in columns] for i in range(2)]
    addresses.update(columns)
    assert addresses.table is sent
    columns[0][1] = torch.ones(7)
    addresses.update(columns)
    assert addresses.table[1, 0] == columns[0][1].data_ptr() and addresses.table is not sent


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(7, dtype=torch.bfloat16), r"is torch.bfloat16 on cpu .* must be float32"),
        (torch.zeros(14)[::2], r"strides \(2,\): it must be .* contiguous"),
        (torch.zeros(7, device="meta"), "on meta"),
    ],
)
def test_tensors_that_the_kernels_do_not_take_are_named(wrong, said):
    addresses, _, columns = layers_on("cpu", 5, 7)
    columns[1][1] = wrong
    with pytest.raises(ValueError, match=said):
        addresses.update(columns)


# -- dispatch ------------------------------------------------------------------------------------------------------


def test_the_faster_one_of_the_table_runs_and_pytorch_where_nothing_was_measured():
    measured = {table.key_of(90, True): "triton", table.key_of(90, False): "torch"}
    assert implementation("cuda", 90, True, measured) == "triton"
    assert implementation("cuda", 90, False, measured) == "torch"
    assert implementation("cuda", 80, True, measured) == implementation("cpu", 90, True, measured) == "torch"
    assert set(table.measured().values()) <= {"triton", "torch"}


def test_kernels_take_float32_in_contiguous_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(table, "measured", lambda: {table.key_of(90, False): "triton"})
    with FakeTensorMode():
        layer, one = torch.empty(5, 7, device="cuda"), torch.empty(3, device="cuda")
        assert runs_triton([layer, one])
        # in the table only for lists of layers
        assert not runs_triton([one])
        assert not runs_triton([layer.T, one]) and not runs_triton([layer.bfloat16(), one.bfloat16()])
        assert not runs_triton([torch.empty(5, 7), torch.empty(3)])
