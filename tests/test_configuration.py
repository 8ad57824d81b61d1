"""The configuration edge: what is found, what is refused, and how it is said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from segmill.configuration import build, compose
from segmill.errors import SegmillError
from segmill.inspection import problems_in
from segmill.models.generative.guide import Guide
from segmill.typecheck import Mismatch, converted, described

SMALL = ["data=scenes", "model=fcn_tiny_rgbd", "trainer=cpu"]


def refusal(*overrides: str, command: str = "train") -> str:
    with pytest.raises(SegmillError) as caught:
        compose(command, [*SMALL, *overrides])
    return str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A constructor for the tests."""

    size: tuple[int, int]
    rate: float
    mode: Literal["whole", "slide"]
    names: Sequence[str] = ()
    path: Path | None = None
    child: Any = None


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """A data set of somebody else's."""

    name: str


PART = {"_target_": f"{__name__}.Part", "size": [2, 3], "rate": 1, "mode": "whole"}


def test_a_short_model_name_finds_its_file_in_the_subfolder():
    config = compose("train", SMALL)
    assert config.model_name == "fcn_tiny_rgbd"
    assert config.model.network["decode_head"]["_target_"].endswith("FCNHead")


def test_the_whole_option_name_is_taken_too():
    config = compose("train", ["data=scenes", "model=discriminative/fcn_tiny_rgbd"])
    assert config.model_name == "fcn_tiny_rgbd"


def test_an_option_in_the_current_folder_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "protocol"
    folder.mkdir(parents=True)
    text = Path("configs/protocol/whole.yaml").read_text(encoding="utf-8")
    (folder / "mine.yaml").write_text(text.replace("name: whole", "name: mine"))
    monkeypatch.chdir(tmp_path)
    assert compose("train", [*SMALL, "protocol=mine"]).protocol.name == "mine"


def test_a_file_of_the_current_folder_that_would_be_hidden_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "protocol"
    folder.mkdir(parents=True)
    (folder / "whole.yaml").write_text("name: another")
    monkeypatch.chdir(tmp_path)
    assert "give yours another name" in refusal("protocol=whole")


def test_experiment_is_a_group_and_its_name_a_value(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "quick.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /model: discriminative/fcn_tiny_rgbd\n"
        "  - override /data: scenes\n  - _self_\n"
        "optimizer: {learning_rate: 0.5}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = compose("train", ["experiment=quick", "experiment.name=mine"])
    assert config.experiment.name == "mine"
    assert config.optimizer.learning_rate == 0.5
    assert config.model_name == "fcn_tiny_rgbd"


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("model=fcn_tiny_rgdb", "did you mean fcn_tiny_rgbd"),
        ("modle=fcn_tiny", "did you mean model"),
        ("optimizer.learning_rat=1", "did you mean optimizer.learning_rate?"),
        ("batch_size=4", "did you mean data.batch_size?"),
        ("trainer.zzz=4", "keys in trainer: accelerator, devices"),
        ("trainer.max_steps=abc", "TrainerSettings expects a whole number, found text"),
        ("trainer.precision=bf16", "'32-true' or 'bf16-mixed'"),
        ("trainer.ema=true", "expects a number or null, found true/false"),
        ("seed=1.5", "seed=1.5"),
        ("+trainer.max_step=3", "did you mean max_steps"),
        ("+sead=3", "did you mean seed"),
        ("data.data_root=???", "data.data_root has no value: give it as data.data_root=VALUE"),
        ("data.test_scale=${data.tset_scale}", "it refers to ${data.tset_scale}"),
        ("model.network._target_=segmill.nothing.Here", "there is no segmill.nothing.Here"),
        ("tta=dusa", "train has no group tta; its groups are data, model"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, answer):
    assert answer in refusal(override)


def test_a_group_that_the_command_does_not_have_is_named():
    with pytest.raises(SegmillError, match="predict has no group optim; its groups are protocol"):
        compose("predict", ["run=x", "path=y", "optim=adamw_poly"])


@pytest.mark.parametrize(
    ("command", "override", "answer"),
    [
        ("train", "data=camvid_c", "data=camvid_c is for segmill adapt and corrupt; train takes "),
        ("adapt", "data=camvid", "data=camvid is for segmill train, eval and data check; adapt "),
        ("train", "trainer=adapt", "trainer=adapt is for segmill adapt; train takes cpu, ddp, "),
        ("data_check", "data=acdc", "data=acdc is for segmill adapt and corrupt; data check takes"),
    ],
)
def test_an_option_for_another_command_is_refused_in_one_sentence(command, override, answer):
    with pytest.raises(SegmillError) as caught:
        compose(command, [override])
    assert str(caught.value).startswith(answer)
    assert "\n" not in str(caught.value)


def test_an_option_of_the_users_own_class_is_taken(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "data"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"_target_: {__name__}.OwnData\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    assert compose("data_check", ["data=mine"]).data.name == "mine"


def test_every_problem_is_in_one_message():
    text = refusal("protocol=wole", "trainer.max_steps=abc", "optimizer.learning_rat=1", "seed=x")
    assert text.startswith("4 problems, nothing was started:")
    assert text.count("\n  - ") == 4


def test_a_value_with_special_characters_is_taken_as_text():
    config = compose("predict", ["run=~/runs/a=b", "path=photo (1).jpg"])
    assert config.run == "~/runs/a=b"
    assert config.path == "photo (1).jpg"


def test_whole_numbers_are_numbers():
    assert compose("train", [*SMALL, "optimizer.learning_rate=1"]).optimizer.learning_rate == 1


def test_build_makes_tuples_and_floats_as_annotated():
    part = build(OmegaConf.create({**PART, "names": ["a"], "path": "x/y"}))
    assert part == Part(size=(2, 3), rate=1.0, mode="whole", names=("a",), path=Path("x/y"))
    assert isinstance(part.rate, float)


def test_build_makes_inner_parts_first_and_passes_further_keywords():
    part = build({**PART, "child": PART}, names=["b"])
    assert part.child.size == (2, 3)
    assert part.names == ("b",)


def test_build_leaves_a_partial_unfinished():
    part = build({"_target_": PART["_target_"], "_partial_": True, "size": [1, 1]})
    assert part(rate=1.0, mode="slide").size == (1, 1)


def test_a_missing_argument_of_a_model_is_named():
    config = OmegaConf.create({"model": {"_target_": PART["_target_"], "rate": 1.0}})
    problems = problems_in(config, None)
    assert [each.partition(" is missing")[0] for each in problems] == ["model.size", "model.mode"]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (None, int | None, None),
        (None, Guide | None, None),
        ([1, 2], tuple[int, int], (1, 2)),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ("a", str | tuple[str, ...], "a"),
        (2, int | Sequence[int] | Literal["auto"], 2),
        ("auto", int | Sequence[int] | Literal["auto"], "auto"),
        ({0: "ignore"}, Mapping[int | str, int | str], {0: "ignore"}),
        ("x", Path, Path("x")),
        ([[1, 2]], list[tuple[int, int]], [(1, 2)]),
        ({"any": object}, Any, {"any": object}),
    ],
)
def test_a_fitting_value_is_converted(value, hint, expected):
    result = converted(value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (True, float),
        (1, bool),
        ("1", int),
        (1.0, int),
        (1, str),
        (None, str),
        ("ab", Sequence[str]),
        ([1, 2, 3], tuple[int, int]),
        (True, Literal[1, "auto"]),
        ([1], Mapping[str, int]),
        (3, Part),
        ("x", Guide),
    ],
)
def test_a_value_of_another_kind_is_a_mismatch(value, hint):
    with pytest.raises(Mismatch):
        converted(value, hint)


def test_annotations_read_as_words():
    assert described(int | None) == "a whole number or null"
    assert described(tuple[int, int]) == "a list of 2: a whole number, a whole number"
    assert described(Literal["auto", True]) == "'auto' or true"
    assert described(Sequence[str]) == "a list, each text"


def test_a_mapping_may_bring_its_own_keys():
    config = compose("train", [*SMALL, "optimizer.rules={norm: {decay_mult: 0.0}}"])
    assert config.optimizer.rules == {"norm": {"decay_mult": 0.0}}


def test_a_mapping_with_a_misspelt_argument_is_refused():
    assert "did you mean learning_rate" in refusal("optimizer={learning_rat: 1.0}")


def test_a_list_takes_the_place_of_a_mapping():
    rows = compose("adapt", ["experiment=camvid-c", "methods=[tent,dusa]"]).methods
    assert list(rows) == ["tent", "dusa"]
    expected = "data.splits=['a']: segmill.data.datamodule.SegmentationData expects a mapping"
    assert expected in refusal("data.splits=[a]")
