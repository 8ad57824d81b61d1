"""A miniature of ImageNet-C for the tests of its folders and of its tasks."""

import shutil
from pathlib import Path

import pytest
from tiny_classes import write_imagenet_c


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet-c")
    write_imagenet_c(root, "fog", "snow")
    return root


@pytest.fixture
def own(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "imagenet-c")
