import torch

from segmill.models.layers import (
    ConvBNAct,
    DropPath,
    PyramidPooling,
    classifier,
    resize,
)


def test_a_convolution_keeps_the_size_and_names_its_weights_as_mmsegmentation():
    block = ConvBNAct(4, 6, kernel=3, dilation=2)
    assert block(torch.rand(2, 4, 7, 9)).shape == (2, 6, 7, 9)
    assert {name for name, _ in block.named_parameters()} == {"conv.weight", "bn.weight", "bn.bias"}


def test_the_classifier_starts_with_all_classes_nearly_equal():
    conv = classifier(256, 10)
    assert 0.008 < conv.weight.std() < 0.012
    assert not conv.bias.any()


def test_pyramid_pooling_appends_one_level_for_each_grid():
    pooling = PyramidPooling(in_channels=4, channels=3, grids=[1, 2]).eval()
    feature = torch.rand(1, 4, 6, 8)
    pooled = pooling(feature)
    assert pooled.shape == (1, 10, 6, 8)
    torch.testing.assert_close(pooled[:, :4], feature, atol=0, rtol=0)
    # The 1 x 1 grid is constant over the map.
    torch.testing.assert_close(pooled[:, 4:7], pooled[:, 4:7, :1, :1].expand(-1, -1, 6, 8))


def test_resizing_to_the_same_size_changes_nothing():
    feature = torch.rand(1, 2, 5, 6)
    torch.testing.assert_close(resize(feature, (5, 6)), feature, atol=0, rtol=0)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    branch = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    per_sample = branch.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert set(per_sample.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(branch.mean().item() - 1.0) < 0.03  # four standard errors


def test_drop_path_does_nothing_in_eval_mode():
    branch = torch.rand(3, 2)
    assert DropPath(0.9).eval()(branch) is branch
