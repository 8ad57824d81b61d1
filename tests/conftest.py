"""Fixtures that more than one test folder needs."""

import os
from pathlib import Path

import pytest

# Tests run in parallel, one process a core; more threads would only fight for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images and checkpoints; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SEGMILL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "camvid").is_dir():
        pytest.skip(f"no real data at {folder}: set SEGMILL_TEST_DATA to the folder with camvid/")
    return folder
