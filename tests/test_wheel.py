"""The built wheel works away from the checkout: the configuration tree comes along."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([sys.executable, *build, str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_runs_from_the_wheel(unpacked):
    assert "segformer_mit-b0" in run(unpacked, "-m", "segmill", "train", "--help")


def test_a_configuration_composes_from_the_wheel(unpacked):
    code = (
        "from segmill.configuration import compose; from segmill.paths import CONFIGS; "
        "print(CONFIGS, compose('train', ['data=scenes', 'model=fcn_tiny_rgbd']).model_name)"
    )
    folder, name = run(unpacked, "-c", code).split()
    assert Path(folder) == unpacked / "segmill" / "configs"
    assert name == "fcn_tiny_rgbd"


def test_the_licence_is_in_the_wheel(unpacked):
    assert list(unpacked.glob("segmill-*.dist-info/licenses/LICENSE"))
