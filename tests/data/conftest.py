"""Images that the tests of the loaders share."""

import pytest
from image_fixtures import make_folder

from scalekd_ds.data.sources.image_folder import index_folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Five images of class a and seven of b, around 200 x 260 pixels; read only."""
    return index_folder(make_folder(tmp_path_factory.mktemp("images"), {"a": 5, "b": 7}, size=(200, 260)), "data.train")
