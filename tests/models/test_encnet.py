import pytest
import torch
import torch.nn.functional as F

from segmill.models.families.encnet import EncHead, Encoding, present_classes


def head(num_classes=5):
    sizes = {"in_index": 0, "channels": 6, "num_codes": 4, "se_weight": 0.2, "dropout": 0.0}
    return EncHead(in_channels=[3], num_classes=num_classes, **sizes)


def test_the_encoding_is_the_weighted_sum_of_all_differences():
    encoding = Encoding(6, num_codes=4)
    feature = torch.rand(2, 6, 5, 7, requires_grad=True)
    pixels = feature.flatten(2).transpose(1, 2)
    differences = pixels[:, :, None] - encoding.codewords
    nearness = F.softmax(encoding.scale * differences.square().sum(3), dim=2)
    # float32, sums in another order
    torch.testing.assert_close(
        encoding(feature), (nearness[..., None] * differences).sum(1), atol=1e-5, rtol=1e-5
    )


def test_an_ignored_pixel_says_nothing_about_the_classes():
    label = torch.tensor([[[0, 0], [4, 255]], [[255, 255], [255, 255]]])
    assert present_classes(label, 5).tolist() == [[1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert present_classes(label.to(torch.uint8), 5).equal(present_classes(label, 5))


@pytest.mark.parametrize("num_classes", [2, 19, 150])
def test_presence_is_mmsegmentations_histogram(num_classes):
    torch.manual_seed(0)
    label = torch.randint(0, num_classes, (3, 4, 6))
    label[:, 0, ::2] = 255
    histograms = [
        each.float().histc(bins=num_classes, min=0, max=num_classes - 1) > 0 for each in label
    ]
    assert present_classes(label, num_classes).equal(torch.stack(histograms).float())


def test_the_se_loss_is_binary_cross_entropy_over_all_classes():
    torch.manual_seed(0)
    network, feature = head().eval(), torch.rand(2, 3, 8, 8)
    label = torch.randint(0, 3, (2, 32, 32))
    losses = network.losses([feature], label)
    assert set(losses) == {"loss_ce", "loss_se"}
    encoded, _ = network.enc_module(network.bottleneck(feature))
    prob = network.se_layer(encoded).sigmoid()
    present = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    wanted = -(present * prob.log() + (1 - present) * (1 - prob).log()).mean()
    torch.testing.assert_close(losses["loss_se"], 0.2 * wanted)


def test_a_head_learns_which_classes_are_there():
    torch.manual_seed(0)
    network, feature = head().train(), torch.rand(2, 3, 8, 8)
    label = torch.randint(0, 3, (2, 32, 32))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    history = []
    for _ in range(10):
        losses = network.losses([feature], label)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(losses["loss_se"].item())
    assert history[-1] < 0.8 * history[0]
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_distances_do_not_lose_their_digits_in_mixed_precision():
    torch.manual_seed(0)
    encoding, pixels = Encoding(512, num_codes=4), 10 + torch.rand(1, 3, 512)
    with torch.autocast("cpu", torch.bfloat16):
        distances = encoding.squared_distances(pixels)
    wanted = (pixels[:, :, None] - encoding.codewords).square().sum(3)
    torch.testing.assert_close(distances, wanted)
