"""Counts of right predictions, and the precision in which models are evaluated."""

import pytest
import torch

from scalekd_ds.data.eval_loader import FILLER, LEFT_OUT
from scalekd_ds.evaluation.accuracy import count_correct, evaluate

CUDNN = torch.backends.cudnn


@pytest.mark.parametrize("num_classes", [2, 5, 30])
def test_filler_and_images_that_cannot_be_used_are_not_counted(num_classes):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels = torch.randint(LEFT_OUT, num_classes, (16,), generator=generator)
        # a model's logits for a black image may be anything
        logits = torch.randn(16, num_classes, generator=generator)
        logits[labels < 0] = torch.nan
        real = labels >= 0
        order = logits[real].argsort(1, descending=True)[:, : min(5, num_classes)]
        right = order == labels[real, None]
        expected = [real.sum(), right[:, 0].sum(), right.any(1).sum(), (labels == LEFT_OUT).sum()]
        found = count_correct(logits, labels)
        assert found.tolist() == [float(count) for count in expected] and found.dtype == torch.float64
    nothing = count_correct(torch.randn(3, num_classes), torch.tensor([FILLER, FILLER, LEFT_OUT]))
    assert nothing.tolist() == [0.0, 0.0, 0.0, 1.0]


def precision():
    return CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision


@pytest.fixture
def cudnn_settings():
    before = precision()
    yield
    CUDNN.allow_tf32 = "tf32" in before
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = before


@pytest.mark.parametrize("set_by", ["default", "the older setting", "convolutions alone"])
def test_evaluation_is_without_tf32_and_puts_the_settings_back(cudnn_settings, set_by):
    if set_by == "the older setting":
        CUDNN.allow_tf32 = False
    if set_by == "convolutions alone":
        CUDNN.conv.fp32_precision = "ieee"
    before, seen = precision(), []

    def predict(images):
        seen.append((*precision(), CUDNN.allow_tf32))
        return images

    def damaged(images):
        raise RuntimeError("no such model")

    batches = [(torch.randn(2, 7), torch.tensor([0, 1]))] * 2
    evaluate(predict, batches, torch.device("cpu"))
    assert seen == [("ieee", "ieee", False)] * 2
    assert precision() == before
    with pytest.raises(RuntimeError, match="no such model"):
        evaluate(damaged, batches, torch.device("cpu"))
    assert precision() == before


@pytest.mark.gpu
def test_a_convolution_on_a_gpu_keeps_the_bits_of_float32_in_evaluation():
    torch.manual_seed(0)
    convolution, images = torch.nn.Conv2d(256, 64, 3, bias=False), torch.randn(8, 256, 16, 16)
    exact = convolution.double()(images.double()).flatten(1)
    convolution.float().cuda()
    seen = []

    def predict(batch):
        seen.append(convolution(batch).flatten(1))
        return seen[-1]

    evaluate(predict, [(images.cuda(), torch.zeros(8, dtype=torch.int64, device="cuda"))], torch.device("cuda"))
    error = (seen[0].double().cpu() - exact).abs().max() / exact.abs().max()
    # TF32 keeps 10 bits of a factor, which is an error of some 4e-4 here; float32 by Winograd has some 1e-5
    assert error < 5e-5
