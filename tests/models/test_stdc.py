from functools import partial

import torch

from segmill.checkpoint.load import choose_rules
from segmill.models.backbones.stdc import STDCBlock, STDCContextPath
from segmill.models.families.fcn import FCNHead
from segmill.models.families.stdc import STDC, STDCHead

FCN = {"channels": 8, "num_convs": 1, "kernel": 3, "concat_input": False, "dropout": 0.1}


def trunk():
    return STDCContextPath(
        in_channels=3,
        stage_channels=[4, 8, 16, 24, 32],
        num_blocks=[2, 2, 2],
        context_channels=8,
        fused_channels=16,
    )


def boundary_head():
    return STDCHead(in_channels=[4], in_index=0, channels=4, dropout=0.0, boundary_threshold=0.1)


def stdc(threshold=0.7, min_kept=10):
    boundary = partial(STDCHead, in_index=0, channels=4, dropout=0.1, boundary_threshold=0.1)
    return STDC(
        backbone=trunk(),
        decode_head=partial(FCNHead, in_index=3, num_classes=5, **FCN),
        auxiliary_head=[partial(FCNHead, in_index=2, num_classes=5, **FCN), boundary],
        threshold=threshold,
        min_kept=min_kept,
    )


def test_a_block_halves_and_keeps_its_width():
    block = STDCBlock(6, 16, stride=2)
    assert [layer.conv.out_channels for layer in block.layers] == [8, 4, 2, 2]
    assert block(torch.rand(2, 6, 9, 12)).shape == (2, 16, 5, 6)


def test_any_image_size_gives_maps_at_strides_8_16_8_8():
    with torch.no_grad():
        features = trunk().eval()(torch.rand(1, 3, 66, 89))
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (16, 9, 12),
        (8, 5, 6),
        (8, 9, 12),
        (16, 9, 12),
    ]


def test_logits_have_the_images_size_and_keep_their_corners():
    network, image = stdc().eval(), torch.rand(1, 3, 50, 71)
    with torch.no_grad():
        logits = network(image)
        coarse = network.decode_head(network.backbone(image))
    assert logits.shape == (1, 5, 50, 71)
    torch.testing.assert_close(logits[..., ::49, ::70], coarse[..., ::6, ::8])


def test_boundaries_lie_where_classes_meet():
    label = torch.zeros(1, 16, 16, dtype=torch.int64)
    label[:, :, 7:] = 3
    boundary = boundary_head().boundary(label)
    # On the side of the higher class, which at the image's edge is the one inside.
    assert boundary[0, 8].tolist() == [0] * 7 + [1] + [0] * 7 + [1]


def test_a_label_without_edges_has_boundaries_only_at_the_images_border():
    """There the zeros beyond it are another class, as in the original."""
    label = torch.ones(1, 12, 12, dtype=torch.int64)
    boundary = boundary_head().boundary(label)
    assert boundary[0, 0].all()
    assert not boundary[0, 3:9, 3:9].any()


def test_boundaries_are_found_in_full_precision_under_autocast():
    label = torch.randint(0, 19, (1, 24, 24)).where(torch.rand(1, 24, 24) > 0.1, 255)
    head = boundary_head()
    with torch.autocast("cpu", torch.bfloat16):
        half = head.boundary(label)
    assert half.equal(head.boundary(label))


def test_losses_have_the_originals_names_and_no_kernel_learns():
    network = stdc().train()
    terms = network.losses(torch.rand(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64)))
    assert list(terms) == ["decode.loss_ce", "aux_0.loss_ce", "aux_1.loss_ce", "aux_1.loss_dice"]
    sum(terms.values()).backward()
    still = [name for name, each in network.named_parameters() if each.grad is None]
    assert still == ["auxiliary_head.1.fusion_kernel"]


def test_only_hard_pixels_count():
    network = stdc(threshold=0.0, min_kept=0).eval()
    with torch.no_grad():
        terms = network.losses(torch.rand(1, 3, 64, 64), torch.randint(0, 5, (1, 64, 64)))
    assert terms["decode.loss_ce"] == terms["aux_0.loss_ce"] == 0
    assert terms["aux_1.loss_ce"] > 0


def test_imagenet_files_name_the_trunk_without_its_prefix():
    network = stdc()
    names = network.backbone.backbone.state_dict()
    arrays = {name: value.numpy() for name, value in names.items()}
    origin, rules = choose_rules(network, arrays)
    assert origin == "mmseg"
    assert rules
