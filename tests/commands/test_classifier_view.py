"""A classifier's images are prepared as timm's data config of its tag says."""

import logging

import pytest
import timm
from omegaconf import DictConfig

from segmill.commands.classifier_view import follow_timm
from segmill.configuration import compose
from segmill.errors import SegmillError

PRESETS = ("convnext_large.fb_in1k", "resnet50_gn.a1h_in1k", "vit_base_patch16_224.augreg_in1k")
VIT = "vit_base_patch16_224.augreg_in1k"
MODEL = "model.discriminative.network.model_name"


def adapt(*words: str) -> DictConfig:
    return compose("adapt", ["experiment=convnext_imagenet_c", "model.generative=null", *words])


@pytest.mark.parametrize("data", ["imagenet", "imagenet_c"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_view_follows_the_classifier(name: str, data: str, caplog: pytest.LogCaptureFixture):
    words = (f"data={data}", f"model/discriminative={name}")
    config, row = adapt(*words), adapt(*words)
    follow_timm(config, [row])
    published = timm.get_pretrained_cfg(name)
    assert published is not None
    model = config.model.discriminative
    assert (tuple(model.mean), tuple(model.std)) == (published.mean, published.std)
    for each in (config, row):
        view = each.data.view
        assert (3, view.size, view.size) == published.input_size
        assert (view.crop_pct, view.interpolation) == (published.crop_pct, published.interpolation)
    assert caplog.text == ""


def test_what_is_typed_stays_and_is_said(caplog: pytest.LogCaptureFixture):
    config = adapt("data.view.crop_pct=1.0")
    with caplog.at_level(logging.WARNING):
        follow_timm(config, [])
    assert config.data.view.crop_pct == 1.0
    assert config.data.view.interpolation == "bicubic"
    assert "convnext_large.fb_in1k says: data.view.crop_pct=0.875." in caplog.text


def test_another_tag_with_the_statistics_of_the_preset_is_refused():
    with pytest.raises(SegmillError) as caught:
        follow_timm(adapt(f"{MODEL}={VIT}"), [])
    text = str(caught.value)
    assert f"model/discriminative=classifier/{VIT}, or model.discriminative.mean=[0.5,0.5" in text
    same = ["model.discriminative.mean=[0.5,0.5,0.5]", "model.discriminative.std=[0.5,0.5,0.5]"]
    follow_timm(adapt(f"{MODEL}={VIT}", *same), [])


def test_weights_of_ones_own_may_have_other_statistics(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        follow_timm(adapt(f"{MODEL}={VIT}", "weights=own.pt"), [])
    assert "Unless weights=own.pt was trained with others." in caplog.text


def test_a_model_of_one_size_refuses_another():
    with pytest.raises(SegmillError, match=r"224 x 224 only\. Set data\.view\.size=224"):
        follow_timm(adapt(f"model/discriminative={VIT}", "data.view.size=384"), [])


def test_a_tag_that_timm_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(SegmillError, match=r"no convnext_large with the tag 'fb_in2k'.*fb_in1k"):
        follow_timm(adapt(f"{MODEL}=convnext_large.fb_in2k"), [])


@pytest.mark.parametrize("words", [("data=scenes_c",), ("data=digits_c", "run=somewhere")])
def test_other_models_and_runs_are_left_alone(words: tuple[str, ...]):
    config = compose("adapt", [*words])
    before = config.copy()
    follow_timm(config, [])
    assert config == before
