"""The commands that a user types: they compose, they run, and say what is missing."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from segmill.configuration import build, compose
from tiny_adaptation import tiny_adapt_words

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "run_tta.py"
THREE = ["gaussian_noise", "shot_noise", "impulse_noise"]

# What is typed after `python scripts/run_tta.py` -> a key, and the value that it should have.
TYPED: list[tuple[str, str, Any]] = [
    ("experiment.name=my_experiment", "experiment.name", "my_experiment"),
    ("tta.forward_mode=discriminative_only", "tta.forward_mode", "discriminative_only"),
    ("data.data_root=/path/to/ade20k_c", "data.data_root", "/path/to/ade20k_c"),
    ("data.corruptions=[gaussian_noise,shot_noise,impulse_noise]", "data.corruptions", THREE),
    ("data.severities=[1,3,5]", "data.severities", [1, 3, 5]),
    ("tta.continual=true", "tta.continual", True),
    ("tta.mixed=true", "tta.mixed", True),
    ("tta.max_epochs=2", "tta.max_epochs", 2),
    ("trainer.fast_dev_run=true", "trainer.fast_dev_run", True),
    ("model.update.discriminative=false", "model.update.discriminative", False),
    ("model.update.generative=false", "model.update.generative", False),
    ("model.update.update_norm_only=true", "model.update.update_norm_only", True),
    ("model.loss.topk=5", "model.loss.topk", 5),
    ("model.loss.classes_threshold=10", "model.loss.classes_threshold", 10),
    ("model.loss.temperature=0.5", "model.loss.temperature", 0.5),
    ("model.loss.timestep_range=[0.1,0.9]", "model.loss.timestep_range", [0.1, 0.9]),
    ("logging.wandb.entity=my_team", "logging.wandb.entity", "my_team"),
    ("logging.wandb.project=mine", "logging.wandb.project", "mine"),
    ("optimizer.learning_rate=1e-6", "optimizer.learning_rate", 1e-6),
    ("trainer.devices=2", "trainer.devices", 2),
    ("trainer.precision=32-true", "trainer.precision", "32-true"),
    ("weights=segformer.b5.640x640.ade.160k.pth", "weights", "segformer.b5.640x640.ade.160k.pth"),
    ("model.generative.weights=/models/sd3", "model.generative.weights", "/models/sd3"),
    ("seed=3", "seed", 3),
]


@pytest.mark.parametrize(("typed", "key", "value"), TYPED, ids=[each[0] for each in TYPED])
def test_what_is_typed_is_what_runs(typed: str, key: str, value: Any) -> None:
    config = compose("adapt", [typed])
    found = OmegaConf.select(config, key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value
    for part in ("trainer", "protocol", "logging"):
        build(config[part])
    build(config.model["update"])
    build(config.model.loss)


def test_the_bare_command_is_segformer_b5_under_stable_diffusion_3_on_ade20k_c() -> None:
    config = compose("adapt", [])
    assert config.data.name == "ade20k_c"
    assert len(config.data.corruptions) == 15
    assert config.data.severities == [5]
    assert "segformer-b5" in config.weights
    assert config.model.generative["_target_"].endswith("SD3Guide")
    assert config.tta.method["_target_"].endswith("Dusa")
    assert config.trainer.precision == "bf16-mixed"
    assert config.trainer.devices == "auto"


def run_script(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The script as a process of its own, without network, weights or data."""
    environment = {key: each for key, each in os.environ.items() if not key.startswith("SEGMILL_")}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
        timeout=120,
    )
    return done, time.monotonic() - started


def test_the_bare_command_says_at_once_all_that_is_missing_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    done, seconds = run_script(tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    first, *items = done.stderr.splitlines()
    assert first == "segmill: 3 things are missing here; nothing was started. What to do:"
    data, weights, guide = items
    assert "data/ade20k_c/ADE20K_val-c/gaussian_noise/5/validation" in data
    assert "Set data.data_root" in data
    assert "segmill corrupt" in data
    assert "nvidia/segformer-b5-finetuned-ade-640-640" in weights
    assert "weights=THAT_FILE" in weights
    assert "stabilityai/stable-diffusion-3-medium-diffusers" in guide
    assert "gated" in guide
    assert "hf auth login" in guide
    assert "model.generative.weights=THAT_FOLDER" in guide
    assert list(tmp_path.iterdir()) == []
    assert seconds < 60, "nobody waits for a network that is not there"


def test_the_script_runs_from_its_words_to_the_report(tmp_path: Path) -> None:
    keys = {"experiment__name": "my_experiment", "limit": 2}
    done, _ = run_script(tmp_path, *tiny_adapt_words(tmp_path, **keys))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "runs" / "my_experiment"
    assert (folder / "report.html").is_file()
    lines = done.stdout.splitlines()
    assert lines[0] == f"Run folder: {folder}"
    assert lines[-1] == f"Next: open {folder / 'report.html'}"
    assert "dusa  02_contrast_5  2/2  mIoU " in done.stdout
    assert (folder / "command.txt").read_text().startswith("segmill adapt data=scenes_c")
