"""`segmill weights inspect`: origin, the matching variant, what would load."""

from pathlib import Path

import pytest
import torch
from torch import nn

from golden import FOLDER, ModelGolden
from segmill.checkpoint.inspect import Variant, inspect_file
from segmill.checkpoint.keys import Rename, Rule
from segmill.checkpoint.load import save_safetensors
from segmill.checkpoint.origin import guess_origin
from segmill.commands.weights import run_inspect
from segmill.errors import SegmillError


class Net(nn.Module):
    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.decode_head = nn.Linear(width, num_classes)

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        return {"hf": (Rename(r"encoder\.(\d)\.(.+)", r"backbone.\1.\2"),)}


class Other(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, num_classes + 1)


BUILT: list[str] = []


def variants() -> list[Variant]:
    def net(name: str, depth: int, width: int) -> Variant:
        def build(num_classes: int) -> nn.Module:
            BUILT.append(name)
            return Net(depth, width, num_classes)

        return Variant(name, "nets", build)

    nets = [net(f"net_d{depth}_w{width}", depth, width) for depth in (2, 3) for width in (4, 8)]
    return [*nets, Variant("other", "others", Other)]


def test_the_variant_and_its_classes_are_found(tmp_path: Path) -> None:
    torch.save({"state_dict": Net(3, 8, 19).state_dict(), "epoch": 1}, tmp_path / "x.pth")
    found = inspect_file(tmp_path / "x.pth", variants())
    assert found.best is not None
    assert (found.best.variant, found.best.num_classes) == ("net_d3_w8", 19)
    assert found.best.report.problems == 0
    assert (found.wrappers, found.beside, found.training) == (("state_dict",), ("epoch",), ())
    assert (found.arrays, found.values) == (8, 3 * 72 + 9 * 19)


def test_a_head_with_one_more_class_is_understood(tmp_path: Path) -> None:
    torch.save(Other(19).state_dict(), tmp_path / "x.pth")
    best = inspect_file(tmp_path / "x.pth", variants()).best
    assert best is not None
    assert (best.variant, best.num_classes, best.report.problems) == ("other", 19, 0)


def test_other_names_are_mapped(tmp_path: Path) -> None:
    state = {n.replace("backbone", "encoder"): v for n, v in Net(2, 4, 5).state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    best = inspect_file(tmp_path / "x.pth", variants()).best
    assert best is not None
    assert (best.variant, best.keys, best.report.problems) == ("net_d2_w4", "hf", 0)


def test_the_file_name_finds_the_variant_at_once(tmp_path: Path) -> None:
    torch.save(Net(3, 4, 5).state_dict(), tmp_path / "net_d3_w4_512x512_160k.pth")
    BUILT.clear()
    assert inspect_file(tmp_path / "net_d3_w4_512x512_160k.pth", variants()).best is not None
    assert BUILT == ["net_d3_w4"]


def test_what_almost_fits_is_reported(tmp_path: Path) -> None:
    state = Net(3, 8, 19).state_dict()
    del state["decode_head.bias"]
    torch.save(state | {"extra": torch.ones(1)}, tmp_path / "x.pth")
    best = inspect_file(tmp_path / "x.pth", variants()).best
    assert best is not None
    assert (best.variant, best.report.missing, best.report.unused) == (
        "net_d3_w8",
        ("decode_head.bias",),
        ("extra",),
    )


def test_a_file_of_something_else_matches_nothing(tmp_path: Path) -> None:
    torch.save({"unet.conv": torch.ones(2)}, tmp_path / "x.pth")
    found = inspect_file(tmp_path / "x.pth", variants())
    assert (found.best, found.origin) == (None, "plain names")


@pytest.mark.parametrize(
    ("names", "tree", "origin"),
    [
        (["backbone.w", "decode_head.w"], {"meta": {"mmseg_version": "1"}}, "MMSegmentation"),
        (["backbone.w", "decode_head.w"], {"message_hub": 1}, "MMSegmentation, saved by mmengine"),
        (["segformer.encoder.w"], {}, "Hugging Face SegFormer"),
        (["module.backbone.layer1.0.w", "module.classifier.4.w"], {}, "torchvision segmentation"),
        (["network.backbone.trunk.w"], {"pytorch-lightning_version": "2"}, "segmill, saved by L"),
        (["backbone.downsample_layers_e.0.w"], {}, "official DFormer"),
        (["patch_embed.proj.weight", "blocks.0.norm.weight"], {}, "timm"),
        (["w"], {}, "plain names"),
    ],
)
def test_the_origin_is_guessed_from_the_names(names: list[str], tree: dict, origin: str) -> None:
    assert guess_origin(names, tree, {}).startswith(origin)


def test_a_training_state_and_a_jittor_file_are_named() -> None:
    state = inspect_file(FOLDER / "checkpoints" / "full_zip.pth", [])
    assert state.training == ("optimizer",)
    jittor = inspect_file(FOLDER / "checkpoints" / "j.pkl", [])
    assert jittor.origin.endswith("saved by Jittor")


def test_the_command_names_a_published_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pspnet_r50-d8_512x512_160k_ade20k.pth"
    state = {name: torch.from_numpy(array) for name, array in ModelGolden("pspnet").state().items()}
    torch.save({"meta": {"mmseg_version": "1.2.2"}, "state_dict": state}, path)
    run_inspect(path)
    text = capsys.readouterr().out
    assert "MMSegmentation" in text
    assert "pspnet_r50-d8 fits exactly, names of mmseg" in text
    assert "0 missing, 0 unused, 0 of wrong shape" in text
    assert "starts at step 0" in text
    assert f'segmill.load("pspnet_r50-d8", weights="{path}"' in text


def test_the_command_takes_one_variant_and_knows_when_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_safetensors(tmp_path / "m.safetensors", {"w": torch.ones(1)}, {"note": "x"})
    run_inspect(tmp_path / "m.safetensors", model="fcn_tiny")
    text = capsys.readouterr().out
    assert "metadata  note = x" in text
    assert "shares a name" in text
    with pytest.raises(SegmillError, match="did you mean fcn_tiny"):
        run_inspect(tmp_path / "m.safetensors", model="fcn_tinny")
