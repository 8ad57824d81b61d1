"""timm's classifiers as networks of one pixel: logits, features, losses, and timm's own files."""

from pathlib import Path

import pytest
import timm
import timm.data
import torch
import torch.nn.functional as F
from torch import nn

from segmill.checkpoint import pretrained
from segmill.checkpoint.load import load_weights, save_safetensors
from segmill.checkpoint.report import CheckpointError
from segmill.configuration import build, compose
from segmill.data.labelled_image import NO_LABEL
from segmill.errors import SegmillError
from segmill.models.families.image_classifier import ImageClassifier
from segmill.options import fitting, options
from segmill.paths import CONFIGS

PRESETS = ("convnext_large.fb_in1k", "resnet50_gn.a1h_in1k", "vit_base_patch16_224.augreg_in1k")
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


def small(num_classes: int = 5) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(
        model_name="convnext_atto", num_classes=num_classes, options=SMALL
    ).eval()


def test_logits_are_timms_as_a_map_of_one_pixel():
    network, image = small(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = network(image)
        assert logits.shape == (2, 5, 1, 1)
        assert torch.equal(logits[..., 0, 0], network.backbone(image))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnext_atto", SMALL),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 64}),
        ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}),
    ],
)
def test_features_are_what_the_last_layer_classifies(name: str, options: dict):
    network = ImageClassifier(model_name=name, num_classes=5, options=options).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = network.features(image)
        logits = network.backbone.get_classifier()(features)
    torch.testing.assert_close(logits, network(image)[..., 0, 0])


def test_the_loss_is_cross_entropy_over_the_labelled_images():
    network, image = small(), torch.randn(3, 3, 64, 64)
    label = torch.tensor([4, NO_LABEL, 1])
    (loss,) = network.losses(image, label[:, None, None]).values()
    expected = F.cross_entropy(network(image)[[0, 2], :, 0, 0], label[[0, 2]])
    torch.testing.assert_close(loss, expected)


def test_without_any_label_the_loss_is_nothing():
    label = torch.full((2, 1, 1), NO_LABEL)
    (loss,) = small().losses(torch.randn(2, 3, 64, 64), label).values()
    assert loss == 0


def test_class_255_is_a_class():
    network = small(num_classes=256)
    (loss,) = network.losses(torch.randn(1, 3, 64, 64), torch.full((1, 1, 1), 255)).values()
    assert loss > 1


def test_timms_own_file_loads_whole_or_not_at_all(tmp_path: Path):
    theirs = timm.create_model("convnext_atto", num_classes=5, **SMALL)
    save_safetensors(tmp_path / "timm.safetensors", theirs.state_dict(), {})
    network, image = small(), torch.randn(1, 3, 64, 64)
    load_weights(network, tmp_path / "timm.safetensors")
    with torch.no_grad():
        assert torch.equal(network(image)[..., 0, 0], theirs.eval()(image))
    state = theirs.state_dict()
    del state["head.fc.bias"]
    save_safetensors(tmp_path / "part.safetensors", state, {})
    with pytest.raises(CheckpointError, match=r"head\.fc\.bias"):
        load_weights(network, tmp_path / "part.safetensors")


def test_weights_timm_are_those_of_the_tag(tmp_path: Path, monkeypatch):
    theirs = timm.create_model("convnext_atto", num_classes=5, **SMALL)
    save_safetensors(tmp_path / "model.safetensors", theirs.state_dict(), {})
    asked: list[str] = []

    def file(repository: str) -> Path:
        asked.append(repository)
        return tmp_path / "model.safetensors"

    monkeypatch.setattr(pretrained, "hub_file", file)
    network = ImageClassifier(model_name="convnext_atto.d2_in1k", num_classes=5, options=SMALL)
    load_weights(network, "timm")
    assert asked == ["timm/convnext_atto.d2_in1k"]
    assert torch.equal(network.backbone.head.fc.weight, theirs.get_classifier().weight)


def test_weights_timm_of_another_number_of_classes_are_refused(tmp_path: Path, monkeypatch):
    theirs = timm.create_model("convnext_atto", num_classes=7, **SMALL)
    save_safetensors(tmp_path / "model.safetensors", theirs.state_dict(), {})
    monkeypatch.setattr(pretrained, "hub_file", lambda _: tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight"):
        load_weights(small(), "timm")


def test_an_unknown_model_gets_a_suggestion():
    with pytest.raises(SegmillError, match=r"no model 'convnext_atom'.*convnext_atto"):
        ImageClassifier(model_name="convnext_atom", num_classes=5, options={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "convnext_atto.nope"}, r"no convnext_atto with the tag 'nope'.*d2_in1k"),
        ({"options": {"dephts": [1, 1, 1, 1]}}, r"does not take network\.options=.*dephts"),
    ],
)
def test_a_tag_or_an_option_that_timm_does_not_know_is_refused(changes: dict, message: str):
    keys = {"model_name": "convnext_atto", "num_classes": 5, "options": SMALL}
    with pytest.raises(SegmillError, match=message):
        ImageClassifier(**{**keys, **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_tag_and_has_timms_statistics(name: str):
    text = (CONFIGS / f"model/discriminative/classifier/{name}.yaml").read_text(encoding="utf-8")
    config = compose("adapt", ["data=imagenet_c", f"model/discriminative={name}"]).model
    published = timm.get_pretrained_cfg(name)
    assert published is not None
    assert (
        config.discriminative.network.model_name
        == name
        == f"{published.architecture}.{published.tag}"
    )
    assert tuple(config.discriminative.mean) == published.mean
    assert tuple(config.discriminative.std) == published.std
    assert published.input_size == (3, 224, 224)
    assert published.interpolation == "bicubic"
    assert f"data.view.crop_pct={published.crop_pct}." in text
    with torch.device("meta"):
        network: nn.Module = build(config.discriminative).network
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 1000, 1, 1)


def test_classifiers_are_chosen_by_their_name_and_are_no_models_of_segmentation():
    assert options("model/discriminative")["convnext_large.fb_in1k"].startswith("classifier/")
    assert not set(PRESETS) & set(fitting("train", "model"))
