"""The graphs that DALI gets for a GPU: it takes their operators and arguments, and asks for the GPU alone."""

import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from scalekd_ds.config import DataConfig
from scalekd_ds.data import EvalLoader, StreamSampler, TrainLoader

GPU = torch.device("cuda", 3)
PIXELS = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.1])
NO_GPU = "CUDA-capable GPU|CUDA is not available"


@pytest.fixture
def host_constants(monkeypatch):
    """Constants of a loader stay on the host, since there is no GPU to hold them."""
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self if a and a[0] == GPU else to(self, *a, **k))


def train_loader(source, **options) -> TrainLoader:
    cfg = DataConfig(image_size=32, **options)
    return TrainLoader(source, cfg, StreamSampler(len(source), 0, 4, 4, 0, 1), GPU, *PIXELS)


def eval_loader(source, **options) -> EvalLoader:
    return EvalLoader(source, DataConfig(image_size=32, **options), 4, 0, 1, GPU, *PIXELS)


def graph_of(loader, monkeypatch) -> tuple[DataNode, dict]:
    """The output and the arguments of the pipeline that the loader builds, up to the driver that is missing."""
    seen = {}

    def set_outputs(self, output):
        seen["output"] = output
        return outputs(self, output)

    def init(self, **arguments):
        seen["arguments"] = arguments
        # its number is looked at before the graph is, and refused where there is no driver
        made(self, **arguments | {"device_id": None})

    outputs, made = Pipeline.set_outputs, Pipeline.__init__
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "set_outputs", set_outputs)
        patched.setattr(Pipeline, "__init__", init)
        with pytest.raises(RuntimeError, match=NO_GPU):
            loader._build_pipeline(lambda: None)
    return seen["output"], seen["arguments"]


NO_CROP, POLICY, JITTER = {"random_crop": False}, {"auto_augment": "rand-m9-n2"}, {"color_jitter": (0.1, 0.0, 0.0)}
ON_HOST = POLICY | {"augment_on": "host"}
ERASING = {"random_erasing": 0.5}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these graphs, in test_loader_on_gpu.py")
@pytest.mark.parametrize(
    ("make", "options"),
    [
        *[(train_loader, crop | policy | ERASING) for crop in ({}, NO_CROP) for policy in ({}, POLICY, ON_HOST)],
        (train_loader, JITTER),
        (train_loader, {"interpolation": "bicubic", "hw_decoder_load": 0.0}),
        (eval_loader, {}),
        (eval_loader, {"eval_resize": 40, "interpolation": "bicubic"}),
    ],
)
def test_dali_takes_the_operators_and_arguments_for_a_gpu(source, monkeypatch, host_constants, make, options):
    output, arguments = graph_of(make(source, **options), monkeypatch)
    # the host's policy gets its pixels by a copy within the graph, all else stays on the GPU
    assert output.device == ("cpu" if "augment_on" in options else "gpu")
    # a policy on the GPU gets pixels, and they are normalised behind it
    is_normalised = "CropMirrorNormalize" in output.source.name
    assert is_normalised is (options.keys().isdisjoint({"auto_augment", "color_jitter"}))
    assert arguments["device_id"] == 3
    # without it outputs are on no stream of the caller's, and there is no way back to the host
    assert arguments["exec_dynamic"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs these graphs, in test_loader_on_gpu.py")
@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (lambda images, starts: fn.resize(images, size=[8, 8], no_such_argument=1), KeyError),
        (lambda images, starts: fn.slice(images, start=starts.gpu(), shape=[8, 8], axis_names="HW"), ValueError),
    ],
)
def test_a_graph_that_dali_does_not_take_would_be_seen(source, monkeypatch, host_constants, broken, error):
    loader = eval_loader(source)
    monkeypatch.setattr(
        loader, "_graph", lambda encoded, starts, *_: broken(fn.decoders.image(encoded, **loader._decoder()), starts)
    )
    with pytest.raises(error):
        loader._build_pipeline(lambda: None)
