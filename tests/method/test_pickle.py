"""A distiller can be pickled, as multiprocessing and torch.save do, and is the same one afterwards."""

import copy
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


# every second pair: a second each
@pytest.mark.parametrize(
    ("student", "teacher"),
    [pytest.param(*pair, marks=pytest.mark.slow) if i % 2 else pair for i, pair in enumerate(PAIRS)],
)
def test_a_distiller_is_the_same_after_its_pickle(student, teacher):
    size = TEACHERS[teacher].get("img_size", 64)
    # SigLIP has no classifier to learn from
    more = {"kd_weight": 0.0} if TEACHERS[teacher].get("num_classes") == 0 else {}
    distiller = ScaleKD(make_student(student, size), make_teacher(teacher), image_size=size, verbose=False, **more)
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, CLASSES - 1])
    losses = []
    compiled = copy.deepcopy(distiller)
    # what torch.compile makes is no function of a module, by whose name it could be pickled
    compiled.teacher.compile(backend="eager")
    copies = (
        pickle.loads(pickle.dumps(distiller)),
        saved(distiller),
        pickle.loads(pickle.dumps(compiled)),
        saved(compiled),
    )
    for one in (distiller, *copies, copy.deepcopy(compiled)):
        torch.manual_seed(0)
        losses.append(one(images, labels)["loss/total"])
    assert losses[0].isfinite() and all(loss == losses[0] for loss in losses)
