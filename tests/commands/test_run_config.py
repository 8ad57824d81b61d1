"""What a command takes from an earlier run: single values may change, nothing is passed over."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from segmill.commands.run_config import config_of_run, require_steps_to_take, resumed_config
from segmill.configuration import Invocation, compose
from segmill.errors import SegmillError


def invocation(verb: str, *overrides: str) -> Invocation:
    return Invocation(verb=verb, argv=(), command="", overrides=overrides, dry_run=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = compose("train", ["data=scenes", "model=dformer-tiny", "weights=moved.pth"])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    return folder


@pytest.mark.parametrize("plus", ["", "++"])
def test_a_value_of_the_new_command_wins(plus: str, run: Path) -> None:
    words = (f"{plus}trainer.clip=1.0",)
    config = resumed_config(run, compose("train", words), invocation("train", *words))
    assert config.trainer.clip == 1.0
    assert set(config) == set(OmegaConf.load(run / "config.yaml"))
    assert config.data.name == "scenes"


def test_the_weights_that_a_run_started_from_are_not_asked_for_again(run: Path) -> None:
    config = resumed_config(run, compose("train", []), invocation("train"))
    assert config.weights is None


def test_a_key_cannot_be_taken_away_from_a_run(run: Path) -> None:
    words = ("~data.splits.test",)
    with pytest.raises(SegmillError, match=r"~data\.splits\.test would make it another one"):
        resumed_config(run, compose("train", words), invocation("train", *words))
    config = OmegaConf.merge(compose("eval", words), {"run": str(run)})
    with pytest.raises(SegmillError, match="would take a part of the run's own data away"):
        config_of_run(config, invocation("eval", *words))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("plus", ["", "++"])
def test_an_evaluation_takes_the_runs_data_and_the_new_values(plus: str, run: Path) -> None:
    words = (f"{plus}data.workers=0", "data.cache=ram")
    config = OmegaConf.merge(compose("eval", words), {"run": str(run)})
    data = config_of_run(config, invocation("eval", *words)).data  # pyright: ignore[reportArgumentType]
    assert (data.name, data.workers, data.cache) == ("scenes", 0, "ram")


@pytest.mark.parametrize(
    ("runtime", "name", "done", "refused"),
    [
        ("torch", "last.pkl", 6, True),
        ("torch", "last.pkl", 5, False),
        ("torch", "last.ckpt", 6, False),  # its report may still be missing
        ("jittor", "last.ckpt", 7, True),
        ("jittor", "last.pkl", 6, False),
    ],
)
def test_only_an_unfinished_run_goes_on_in_the_other_runtime(
    runtime: str, name: str, done: int, refused: bool
) -> None:
    where = {"done": done, "max_steps": 6, "runtime": runtime}
    if not refused:
        require_steps_to_take(Path("run") / name, **where)
        return
    with pytest.raises(SegmillError, match=r"all 6 steps are done.*set trainer\.max_steps"):
        require_steps_to_take(Path("run") / name, **where)
