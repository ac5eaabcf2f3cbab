"""`ScaleKD.compile` and `Teacher.compile`: one graph for each part, the eager numbers, and a module that stays what it was."""

import copy
import pickle
import re

import pytest
import tiny_pair
import torch
from torch._dynamo.utils import counters
from zoo import STUDENTS, TEACHERS, make_student, make_teacher

from scalekd_ds import ScaleKD, Teacher
from scalekd_ds.engine.compilation import eagerly, try_teacher

STEPS = 3


def build(**options) -> ScaleKD:
    torch.manual_seed(0)
    return ScaleKD(tiny_pair.student(), Teacher(tiny_pair.teacher()), verbose=False, image_size=64, **options).train()


def compiled(distiller: ScaleKD, **options) -> ScaleKD:
    """Without code for the CPU, which would take minutes; graphs and numbers are those of any backend."""
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": False} | options
    distiller.teacher.compile(**options)
    return distiller.compile(**options)


def step(distiller: ScaleKD, optimizer: torch.optim.Optimizer, batch) -> dict[str, float]:
    images, labels = batch
    losses = distiller(images, labels, distiller.teacher_targets(images))
    optimizer.zero_grad()
    losses["loss/total"].backward()
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


@torch.no_grad()
def evaluate(distiller: ScaleKD) -> None:
    """Batches of two sizes for student and teacher, as an evaluation has them."""
    distiller.eval()
    with eagerly():
        for size in (5, 3):
            distiller.student(torch.zeros(size, 3, 64, 64))
            distiller.teacher_targets(torch.zeros(size, 3, 64, 64))
    distiller.train()


def train(distiller: ScaleKD, epochs: int = 3) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Some steps an epoch with an evaluation after each; (losses, weights and statistics)."""
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01, momentum=0.9)
    losses = []
    for _ in range(epochs):
        losses += [step(distiller, optimizer, tiny_pair.batch()) for _ in range(STEPS)]
        evaluate(distiller)
    return losses, distiller.state_dict()


@pytest.fixture(scope="module")
def trained():
    """A compiled distiller after three epochs without a recompilation, its losses, and dynamo's counters."""
    torch.compiler.reset()
    counters.clear()
    distiller = compiled(build())
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses, _ = train(distiller)
    yield distiller, losses, {name: dict(counts) for name, counts in counters.items()}
    torch.compiler.reset()


@pytest.fixture
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def test_three_epochs_with_evaluations_compile_four_graphs_once_and_give_the_eager_numbers(trained):
    distiller, found, counted = trained
    # teacher, student, projectors with TPP, losses
    assert counted["stats"]["unique_graphs"] == 4
    assert not counted.get("graph_break")
    expected, expected_state = train(build())
    assert [losses.keys() for losses in found] == [losses.keys() for losses in expected]
    for ours, eager in zip(found, expected, strict=True):
        assert ours == pytest.approx(eager, rel=1e-5)
    state = distiller.state_dict()
    assert list(state) == list(expected_state)
    for name, value in state.items():
        torch.testing.assert_close(value, expected_state[name], rtol=1e-4, atol=1e-6, msg=name)


def test_an_evaluation_without_eagerly_would_compile_for_each_size(trained):
    """The test above would see it: what `eagerly` keeps out counts as a recompilation."""
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        trained[0].teacher_targets(torch.zeros(5, 3, 64, 64))


def test_copies_pickles_and_the_student_by_itself_are_not_compiled(trained):
    distiller, plain = trained[0], build()
    assert [name for name, _ in distiller.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in distiller.named_parameters()] == [name for name, _ in plain.named_parameters()]
    graphs = counters["stats"]["unique_graphs"]
    images, labels = tiny_pair.batch()
    for other in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        other(images, labels)
        assert not other._compiled and not other.teacher._compiled
        assert other.tapped_student._compiled_call_impl is None
    distiller.student(torch.zeros(4, 3, 64, 64))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    "options",
    [
        {"tpp": False},
        {"cut": 2},
        {"projector": "linear"},
        {"weights_s3": (0.08, 0.0)},
        {"kd_weight": 1.0},
        {"features": False},
        {"loss": "bce"},
        {"norm": "layer"},
    ],
    ids=str,
)
def test_no_option_of_the_method_breaks_a_graph(options):
    images, labels = tiny_pair.batch()
    expected = build(**options)(images, labels)
    found = compiled(build(**options), backend="eager")(images, labels)
    assert not counters["graph_break"]
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, rel=1e-5
    )


@pytest.mark.usefixtures("nothing_compiled")
def test_a_teacher_runs_as_written_again():
    distiller = compiled(build())
    distiller.teacher.run_as_written().targets(torch.zeros(2, 3, 64, 64))
    assert not counters["stats"]


@pytest.mark.usefixtures("nothing_compiled")
def test_a_teacher_that_cannot_be_compiled_is_one_line_and_runs_as_written():
    def broken(graph, inputs):
        raise RuntimeError("no code for this one")

    distiller = build()
    expected = distiller.teacher.targets(torch.ones(2, 3, 64, 64)).tokens
    distiller.teacher.compile(backend=broken)
    assert re.fullmatch(
        r"the teacher is not compiled, since torch could not \(.*no code for this one.*\); --run\.compile off does not try",
        try_teacher(distiller, 2),
    )
    assert torch.equal(distiller.teacher.targets(torch.ones(2, 3, 64, 64)).tokens, expected)
    distiller.teacher.compile(backend="eager")
    assert try_teacher(distiller, 2) is None


@pytest.mark.usefixtures("nothing_compiled")
def test_a_last_stage_that_cannot_be_compiled_is_found_at_the_start():
    def broken(graph, inputs):
        # the last stage alone has a gradient
        if torch.is_grad_enabled():
            raise RuntimeError("no code for this one")
        return graph

    distiller = build()
    distiller.teacher.lower_precision(torch.bfloat16)
    distiller.teacher.compile(backend=broken)
    assert "no code for this one" in try_teacher(distiller, 2)
    # the graphs that a trial makes are those of the step
    distiller.teacher.compile(backend="eager", dynamic=False)
    assert try_teacher(distiller, 2) is None
    graphs = counters["stats"]["unique_graphs"]
    images, labels = (part[:2] for part in tiny_pair.batch())
    targets = distiller.teacher_targets(images)
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(images, labels, targets)
    losses["loss/total"].backward()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("options", [{"features": False}, {"weights_s3": (0.0, 0.0)}, {"tpp": False}], ids=str)
def test_a_trial_leaves_out_a_last_stage_that_no_tokens_go_through(options):
    distiller = build(**options)
    distiller.teacher.compile(backend="eager", dynamic=False)
    assert try_teacher(distiller, 2) is None
    # without TPP the tokens before the last stage are a target, and not compiled
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("name", STUDENTS)
def test_every_kind_of_student_is_one_graph(name):
    student = make_student(name).train()
    student.compile(backend="eager", fullgraph=True, dynamic=False)
    student(torch.randn(2, 3, 64, 64))
    assert counters["stats"]["unique_graphs"] == 1


def call(teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets, the last stage's tokens, and the gradient of its input."""
    generator = torch.Generator().manual_seed(0)
    size, stage = teacher.preprocessing.size or (64, 64), teacher.last_input
    tokens = torch.randn(2, stage.grid[0] * stage.grid[1], stage.dim, generator=generator, requires_grad=True)
    targets = teacher.targets(torch.randn(2, 3, *size, generator=generator)).tokens
    out = teacher.last_stage(tokens)
    return targets, out.detach(), torch.autograd.grad(out.square().sum(), tokens)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("name", TEACHERS)
def test_every_kind_of_teacher_is_two_graphs(name):
    """But for BEiT, whose last blocks are copied to leave out the class token's bias, which breaks the graph in each."""
    teacher = make_teacher(name)
    expected = call(teacher)
    teacher.compile(backend="eager", fullgraph=not name.startswith("beit"), dynamic=False)
    found = [call(teacher)]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 2 if name.startswith("beit") else graphs == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        found.append(call(teacher))
    assert counters["stats"]["unique_graphs"] == graphs
    for ours in found:
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
