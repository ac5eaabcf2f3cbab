"""A distiller can be pickled, as multiprocessing and torch.save do, and is the same one afterwards."""

import io
import pickle

import pytest
import torch
from zoo import CLASSES, STUDENTS, TEACHERS, make_student, make_teacher

from scalekd_ds import ScaleKD

VIT_TEACHER, RESNET = "vit_base_patch16_224.augreg_in21k", "resnet18"
PAIRS = [(RESNET, teacher) for teacher in TEACHERS] + [(s, VIT_TEACHER) for s in STUDENTS if s != RESNET]


def saved(distiller):
    file = io.BytesIO()
    torch.save(distiller, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_distiller_is_the_same_after_its_pickle(student, teacher):
    size = TEACHERS[teacher].get("img_size", 64)
    # SigLIP has no classifier to learn from
    more = {"kd_weight": 0.0} if TEACHERS[teacher].get("num_classes") == 0 else {}
    distiller = ScaleKD(make_student(student, size), make_teacher(teacher), image_size=size, verbose=False, **more)
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, CLASSES - 1])
    losses = []
    for copy in (distiller, pickle.loads(pickle.dumps(distiller)), saved(distiller)):
        torch.manual_seed(0)
        losses.append(copy(images, labels)["loss/total"])
    assert losses[0].isfinite() and losses[0] == losses[1] == losses[2]
