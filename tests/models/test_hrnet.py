import pytest
import timm
import torch
from timm.models.hrnet import HighResolutionNet

from segmill.checkpoint.choose import outline
from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import load_arrays, shapes_of
from segmill.configuration import build, compose
from segmill.models.backbones.hrnet import HRNet


def hrnet(**changes):
    sizes = {"channels": [4, 8, 12, 16], "num_blocks": 1, "num_modules": [1, 1, 1]}
    return HRNet(**({"name": "", "in_channels": 3} | sizes | changes))


def test_any_image_size_gives_maps_at_strides_4_8_16_32():
    with torch.no_grad():
        features = hrnet().eval()(torch.rand(1, 3, 66, 89))
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (4, 17, 23),
        (8, 9, 12),
        (12, 5, 6),
        (16, 3, 3),
    ]


def test_the_finest_branch_sees_what_the_coarsest_saw():
    """One pixel changes logits far outside of what the finest branch's own convolutions reach."""
    torch.manual_seed(0)
    network = hrnet().eval()
    image = torch.rand(1, 3, 256, 256)
    changed = image.clone()
    changed[..., 0, 0] += 1
    with torch.no_grad():
        difference = (network(image)[0] - network(changed)[0]).abs().sum(1)[0]
    assert difference[30, 30] > 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hr18s", "hr18", "hr48"])
def test_timms_weights_fill_each_variants_trunk(variant):
    config = compose("load", [f"model=fcn_{variant}", "data.num_classes=2"]).model.network
    with torch.device("meta"):
        ours = torch.nn.Module()
        ours.backbone = build(config.backbone)
        peer = timm.create_model(ours.backbone.name)
    theirs = {key: torch.zeros(value.shape).numpy() for key, value in peer.state_dict().items()}
    renamed = apply_rules(outline(theirs), ours.backbone.key_rules()["timm"])
    shapes = {key: array.shape for key, array in renamed.items()}
    assert shapes == shapes_of(ours)


def test_timms_names_are_ours_and_its_first_stage_computes_the_same():
    torch.manual_seed(0)
    peer = HighResolutionNet(timm_sizes()).eval()
    ours = torch.nn.Module()
    ours.backbone = hrnet().eval()
    arrays = {key: value.numpy() for key, value in peer.state_dict().items()}
    load_arrays(ours, arrays, rules=ours.backbone.key_rules()["timm"])
    seen = []
    for network in (peer, ours.backbone):
        network.layer1.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 64)
        peer(image), ours.backbone(image)
    torch.testing.assert_close(seen[1], seen[0])


def timm_sizes():
    """timm's description of `hrnet()`."""
    channels = [(64,), (4, 8), (4, 8, 12), (4, 8, 12, 16)]
    stages = {
        f"stage{index + 1}": {
            "num_modules": 1,
            "num_branches": len(widths),
            "block_type": "BASIC" if index else "BOTTLENECK",
            "num_blocks": (1,) * len(widths),
            "num_channels": widths,
            "fuse_method": "SUM",
        }
        for index, widths in enumerate(channels)
    }
    return {"stem_width": 64, **stages}
