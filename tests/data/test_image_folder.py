"""Folders of class folders: what is indexed, subsets, and one line for each folder that cannot be used."""

import pytest
from image_fixtures import make_folder
from source_fixtures import as_nobody

from scalekd_ds.data.sources.image_folder import index_folder
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.data.sources.source import subset
from scalekd_ds.errors import UserError


def test_an_index_has_sorted_paths_and_their_classes_by_number(source):
    assert source.classes == ["a", "b"]
    assert len(source.paths) == 12
    assert source.labels.tolist() == [0] * 5 + [1] * 7
    assert source.paths == sorted(source.paths)


def test_a_subset_is_drawn_by_its_seed(source):
    first, again, other = (subset(source, 6, seed) for seed in (0, 0, 1))
    assert first.paths == again.paths != other.paths
    assert len(first) == 6 and set(first.paths) <= set(source.paths)
    assert first.labels.tolist() == [source.labels[source.paths.index(p)] for p in first.paths]
    with pytest.raises(UserError, match=r"data.train_images is 13: .* has 12 images"):
        subset(source, 13, 0)


def test_a_class_folder_that_may_not_be_read_is_named():
    with as_nobody() as (folder, become):
        train = make_folder(folder / "train", {"a": 2, "b": 2})
        (train / "b").chmod(0)
        become()
        with pytest.raises(UserError, match=r"data.train: the folder .*train/b' cannot be read: Permission denied"):
            index_folder(train, "data.train")


def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(tmp_path):
    make_folder(tmp_path / "train", {"a": 2, "b": 2})
    with pytest.raises(UserError, match=r"data.train: the folder .*trian.* does not exist. Did you mean 'train'"):
        index_folder(tmp_path / "trian", "data.train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no class folders"):
        index_folder(tmp_path / "empty", "data.train")
    make_folder(tmp_path / "one", {"only": 2})
    with pytest.raises(UserError, match="has one class, 'only'"):
        open_source(tmp_path / "one", "data.train")
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*c' has no images"):
        index_folder(tmp_path / "train", "data.train")
