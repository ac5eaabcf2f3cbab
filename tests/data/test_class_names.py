"""Classes keep their meaning wherever two lists of them meet: every kind of source against every order of a model's.

Each image is a plain square whose colour says which class it is of, so that a label can be held against the truth.
"""

import functools
import io
import itertools
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from source_fixtures import needs_datasets, write_tar
from timm.data import ImageNetInfo

from scalekd_ds.class_names import KnownClasses, are_numbers, match_classes, natural_order
from scalekd_ds.config import DataConfig, RunConfig
from scalekd_ds.data.run_sources import read_sources
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.errors import UserError
from scalekd_ds.evaluation.standalone import images_for

NUMBERS = [str(i) for i in range(12)]
WORDS = ["Birch", "apple", "cherry", "n10", "n2", "pêche", "zebra"]


def encoded(kind: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (kind * 10, 0, 0)).save(file, "PNG")
    return file.getvalue()


def kind_of(source, i: int) -> int:
    """Which class an image of a source is of, by its colour."""
    return Image.open(io.BytesIO(source.read(i).tobytes())).getpixel((0, 0))[0] // 10


def folders(place, names):
    for kind, name in enumerate(names):
        (place / name).mkdir(parents=True)
        (place / name / "x.png").write_bytes(encoded(kind))
    return place


def folders_with_list(place, names):
    folders(place, names)
    (place / "classes.txt").write_text("\n".join(reversed(names)), encoding="utf-8")
    return place


def table(place, names, labels):
    place.mkdir()
    for kind in range(len(names)):
        (place / f"{kind}.png").write_bytes(encoded(kind))
    rows = [f"{kind}.png,{label}" for kind, label in enumerate(labels)]
    (place / "t.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    return place / "t.csv"


def tar(place, names, labels):
    place.mkdir()
    members = []
    for kind, label in enumerate(labels):
        members += [(f"{kind:03d}.png", encoded(kind)), (f"{kind:03d}.cls", str(label).encode())]
    return write_tar(place / "t.tar", members)


def tar_of_folders(place, names):
    place.mkdir()
    return write_tar(place / "t.tar", [(f"{name}/x.png", encoded(kind)) for kind, name in enumerate(names)])


def tar_with_list(place, names):
    # its numbers are positions in its own list, whose order is none of the others'; a number that is a name is that name
    order = list(reversed(names))
    where = tar(place, names, names if names is NUMBERS else [order.index(name) for name in names])
    (place / "classes.txt").write_text("\n".join(order), encoding="utf-8")
    return where


def hub(place, names):
    import datasets

    order = list(reversed(names))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
    rows = {
        "image": [{"bytes": encoded(kind), "path": None} for kind in range(len(names))],
        "label": [order.index(name) for name in names],
    }
    datasets.Dataset.from_dict(rows, features).save_to_disk(place)
    return f"hf:{place}"


# what writes a source -> whether its labels are names, and not numbers alone
KINDS = {
    "folders": (folders, True),
    "folders with classes.txt": (folders_with_list, True),
    "table of names": (lambda place, names: table(place, names, names), True),
    "table of numbers": (lambda place, names: table(place, names, range(len(names))), False),
    "tar of names": (lambda place, names: tar(place, names, names), True),
    "tar of numbers": (lambda place, names: tar(place, names, range(len(names))), False),
    "tar of folders": (tar_of_folders, True),
    "tar with classes.txt": (tar_with_list, True),
    "Hugging Face": (hub, True),
}
kinds = [pytest.param(kind, marks=needs_datasets if kind == "Hugging Face" else ()) for kind in KINDS]


def model_with(names):
    known = {} if names is None else {"label_names": names}
    return SimpleNamespace(num_classes=0, pretrained_cfg=known)


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("names", [NUMBERS, WORDS], ids=["numbers", "words"])
def test_a_model_is_evaluated_on_what_its_outputs_mean(tmp_path, kind, names, capsys):
    write, named = KINDS[kind]
    where = write(tmp_path / "d", names)
    orders = {
        "as strings": sorted(names),
        "natural": natural_order(names),
        "reversed": list(reversed(names)),
        "shifted": names[3:] + names[:3],
        "without names": None,
    }
    for title, order in orders.items():
        model = model_with(order)
        model.num_classes = len(names)
        capsys.readouterr()
        source = images_for(model, "MODEL", where)
        said = capsys.readouterr().out
        assert len(source) == len(names)
        for i, label in enumerate(source.labels.tolist()):
            truth = kind_of(source, i)
            if order is None:
                assert source.classes[label] == (names[truth] if named else NUMBERS[truth])
            elif named or names is NUMBERS:
                assert order[label] == names[truth], (title, label)
            else:
                assert label == truth
        # an order that is an assumption, or that was changed, is said in one line
        own = source.classes if order is None else order
        assumed = order is None or (not named and names is WORDS)
        assert assumed == ("has no class names" in said or "are numbers: they are positions" in said), (title, said)
        assert len(said.splitlines()) <= 1, said
        assert own is not None


@pytest.mark.parametrize("kind", kinds)
def test_a_model_of_other_classes_is_refused_with_the_first_difference(tmp_path, kind):
    write, named = KINDS[kind]
    where = write(tmp_path / "d", WORDS)
    for change, first in (
        (lambda names: ["aple" if name == "apple" else name for name in names], "'apple' Did you mean 'aple'"),
        (lambda names: names[:-1], "only in"),
        (lambda names: [*names, "extra"], None),
    ):
        names = change(list(WORDS))
        model = model_with(names)
        model.num_classes = len(names)
        if not named and len(names) == len(WORDS):
            continue
        if first is None:
            # a part of the classes is evaluated by name; that some are lacking is another error
            source = images_for(model, "MODEL", where) if named else None
            if named:
                assert all(names[label] == WORDS[kind_of(source, i)] for i, label in enumerate(source.labels))
            continue
        with pytest.raises(UserError) as error:
            images_for(model, "MODEL", where)
        text = str(error.value)
        assert "\n" not in text
        assert "classes" in text or "label" in text
        if named and "apple" in first:
            assert first in text
        if named and first == "only in":
            assert "zebra" in text


@pytest.mark.parametrize("names", [NUMBERS, WORDS], ids=["numbers", "words"])
def test_training_and_validation_of_any_two_kinds_have_the_same_classes(tmp_path, names, capsys):
    have = {kind: write for kind, (write, _) in KINDS.items()}
    try:
        import datasets  # noqa: F401
    except ImportError:
        del have["Hugging Face"]
    places = {kind: write(tmp_path / kind.replace(" ", "-"), names) for kind, write in have.items()}
    tried = 0
    for (train_kind, train_at), (val_kind, val_at) in itertools.product(places.items(), places.items()):
        for order in ("string", "natural"):
            at = [
                str(where) if str(where).startswith("hf:") else str(where.relative_to(tmp_path))
                for where in (train_at, val_at)
            ]
            cfg = RunConfig(data=DataConfig(root=str(tmp_path), train=at[0], val=at[1], class_order=order))
            tried += 1
            try:
                train, val = read_sources(cfg)
            except UserError as error:
                # only names that meet labels without names in training may be refused, never mixed up
                assert not KINDS[train_kind][1] and KINDS[val_kind][1] and names is WORDS, (train_kind, val_kind, error)
                continue
            assert train.classes == val.classes
            by_kind = {kind_of(train, i): label for i, label in enumerate(train.labels.tolist())}
            assert sorted(by_kind.values()) == list(range(len(names)))
            own = open_source(val_at if str(val_at).startswith("hf:") else str(val_at), "data.val").classes
            for i, label in enumerate(val.labels.tolist()):
                truth = kind_of(val, i)
                expected = by_kind[truth]
                if names is WORDS and not KINDS[val_kind][1]:
                    # a number is a position in the training classes
                    expected = truth
                elif names is WORDS and not KINDS[train_kind][1]:
                    # and where these have no names, one in the order in which validation lists its own
                    expected = own.index(names[truth])
                assert label == expected, (train_kind, val_kind, order)
            if order == "natural" and not are_numbers(train.classes):
                assert train.classes == natural_order(train.classes)
    assert tried == 2 * len(places) ** 2


def test_validation_may_lack_a_class_where_that_is_allowed(tmp_path):
    folders(tmp_path / "train", ["a", "b", "c"])
    for names in (["a", "c"], ["c"]):
        place = tmp_path / "-".join(names)
        folders(place, names)
        cfg = RunConfig(data=DataConfig(root=str(tmp_path), val=place.name))
        lacking = "b" if "a" in names else "a"
        with pytest.raises(
            UserError, match=rf"no image of {3 - len(names)} of the 3 classes, the first '{lacking}'.*allow_missing"
        ):
            read_sources(cfg)
        cfg.data.allow_missing_classes = True
        _, val = read_sources(cfg)
        assert val.classes == ["a", "b", "c"]
        assert [val.classes[label] for label in val.labels] == names
    folders(tmp_path / "odd", ["a", "d"])
    cfg.data.val = "odd"
    with pytest.raises(
        UserError, match=r"different classes: 1 only in data.val .*the first 'd'.*2 only in data.train.*'b'"
    ):
        read_sources(cfg)


def test_a_run_that_goes_on_keeps_its_order(tmp_path):
    folders(tmp_path / "train", WORDS)
    folders(tmp_path / "val", WORDS)
    cfg = RunConfig(data=DataConfig(root=str(tmp_path)))
    before = list(reversed(WORDS))
    train, val = read_sources(cfg, before)
    assert train.classes == val.classes == before
    assert all(before[label] == WORDS[kind_of(train, i)] for i, label in enumerate(train.labels))
    with pytest.raises(UserError, match=r"data.train .* and the checkpoint have different classes: .*'zebra'"):
        read_sources(cfg, ["other" if name == "zebra" else name for name in before])


def test_accents_are_the_same_in_both_of_unicodes_forms(tmp_path):
    forms = [unicodedata.normalize(form, "pêche") for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    for mine, theirs in (forms, forms[::-1]):
        place = folders(tmp_path / mine, ["apple", mine])
        model = model_with([theirs, "apple"])
        model.num_classes = 2
        source = images_for(model, "MODEL", place)
        assert [kind_of(source, i) for i in np.argsort(source.labels)] == [1, 0]


def test_timms_own_weights_have_imagenets_names():
    info = ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    words = [info.index_to_description(i) for i in range(1000)]
    known = KnownClasses((synsets, words), certain=False)
    match = functools.partial(match_classes, known, 1000, model_is="MODEL", data_is="DATA")
    assert match(synsets).same_order
    assert match(synsets).notice is None
    assert len(set(words)) < 1000 and match(words).same_order
    for names in (synsets, [f"{word}{i}" for i, word in enumerate(words)]):
        known = KnownClasses((names,), certain=False)
        match = functools.partial(match_classes, known, 1000, model_is="MODEL", data_is="DATA")
        assert match(names[::-1]).positions.tolist() == list(range(1000))[::-1]
    # folders with other names than ImageNet's are taken in their order, which is said
    assert "has no class names" in match([f"kind{i}" for i in range(1000)]).notice
    with pytest.raises(UserError, match=r"500 only in DATA, the first 'n99999500'"):
        match_classes(
            KnownClasses((synsets,), False),
            1000,
            [*synsets[:500], *(f"n{99999000 + i}" for i in range(500, 1000))],
            "MODEL",
            "DATA",
        )
    guess = KnownClasses((synsets,), certain=False)._replace(guessed_for_file=True)
    assert "taken for ImageNet's" in match_classes(guess, 1000, synsets, "MODEL", "DATA").notice


def test_natural_order_is_that_of_timms_training_script():
    from timm.data.readers.reader_image_folder import natural_key

    names = [*NUMBERS, *WORDS, "a10b2", "a2b10", "a2b9", "A3", "007", "7", "x-1.5", "x-1.10"]
    assert natural_order(names) == sorted(sorted(names), key=natural_key)
