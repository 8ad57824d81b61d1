"""SiTGuide: directions of time, the null class, shapes, weights of every origin, sharding."""

from pathlib import Path

import pytest
import torch
from test_transformer import inputs, loaded, value
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from segmill.checkpoint.load import save_safetensors
from segmill.errors import SegmillError
from segmill.models.generative.codec import PixelCodec
from segmill.models.generative.guide import Guide
from segmill.models.generative.guide_parts import check_sizes
from segmill.models.generative.sit import SiTGuide
from segmill.models.generative.transformer import DiffusionTransformer
from segmill.models.guide_view import GuideView

NULL = 5


def network() -> DiffusionTransformer:
    return DiffusionTransformer(
        in_channels=3,
        channels=16,
        depth=2,
        num_heads=2,
        patch=2,
        mlp_ratio=2.0,
        num_classes=NULL,
        learn_sigma=False,
        qk_norm=False,
    )


def guide(path: str = "linear", weights: str | None = None, *, factor: int = 4) -> SiTGuide:
    return SiTGuide(
        network=network(),
        codec=PixelCodec(factor=factor, mean=0.0, std=1.0),
        view=GuideView(short=32, window=None, stride=None, multiple=8),
        path=path,
        weights=weights,
    )


def drawn(path: str = "linear") -> SiTGuide:
    """With weights that are not the initial ones, under which the output is 0."""
    made = guide(path, "random")
    made.fill(torch.device("cpu"))
    return made


def windows(height: int = 16, width: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.manual_seed(0)).byte()


def test_it_is_a_guide():
    assert isinstance(guide(), Guide)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16), (8, 56)])
def test_predictions_of_rectangles_have_one_map_for_each_class(height, width):
    made = drawn()
    latent = made.encode(windows(height, width))
    assert latent.shape == (2, 3, height // 4, width // 4)
    classes = torch.tensor([[0, 3, NULL], [1, 1, 4]])
    predicted = made.predict(latent, torch.tensor([0.2, 0.7]), classes)
    assert predicted.shape == (2, 3, *latent.shape[1:])
    assert predicted.requires_grad
    assert torch.equal(predicted[1, 0], predicted[1, 1])
    alone = made.predict(latent[1:], torch.tensor([0.7]), torch.tensor([[4]]))
    # The same sums in float32, batched differently.
    torch.testing.assert_close(alone[0, 0], predicted[1, 2], rtol=1e-5, atol=1e-6)


def test_the_null_class_is_a_class_of_its_own():
    made = drawn()
    latent = made.encode(windows())
    predicted = made.predict(latent, torch.full((2,), 0.5), torch.tensor([[NULL, 0]] * 2))
    assert not torch.allclose(predicted[:, 0], predicted[:, 1], atol=1e-3)


@pytest.mark.parametrize("path", ["linear", "reverse_linear"])
def test_a_mixture_of_one_class_is_the_class(path):
    sit = drawn(path)
    latent = sit.encode(windows())
    t, classes = torch.full((len(latent),), 0.3), torch.tensor([[2, 0, 1]]).expand(len(latent), -1)
    weights = torch.tensor([[0.0, 1.0, 0.0]]).expand(len(latent), -1)
    found = sit.predict_mixed(latent, t, classes, weights)
    # float32: a product with the table in the place of a look-up, summed in another order.
    expected = sit.predict(latent, t, classes[:, 1:2])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found, sit.predict(latent, t, classes[:, :1])[:, 0], atol=1e-3)


def test_a_mixture_passes_the_gradient_to_its_weights():
    sit = drawn()
    latent = sit.encode(windows())
    weights = torch.full((len(latent), 2), 0.5, requires_grad=True)
    classes = torch.tensor([[0, 2]]).expand(len(latent), -1)
    sit.predict_mixed(latent, torch.full((len(latent),), 0.3), classes, weights).sum().backward()
    assert weights.grad is not None
    assert weights.grad.all()


def test_time_is_the_share_of_noise():
    made, latent = guide(), torch.randn(2, 3, 4, 8)
    noise = torch.randn_like(latent)
    noisy, target = made.noisy(latent, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], latent[0])
    assert torch.equal(noisy[1], noise[1])
    assert torch.equal(target, noise - latent)


def test_both_directions_of_time_say_the_same():
    """REPA's network f and willisma's g = -f(1 - t): one flow, two ways of writing it."""
    forwards, backwards = drawn("linear"), drawn("reverse_linear")
    latent, t = forwards.encode(windows()), torch.tensor([0.25, 0.6])
    classes = torch.tensor([[2], [NULL]])
    mirrored = forwards.predict(latent, 1 - t, classes)
    assert torch.equal(backwards.predict(latent, t, classes), -mirrored)


class FourChannels(PixelCodec):
    def __init__(self) -> None:
        super().__init__(factor=8, mean=0.0, std=1.0)
        self.channels = 4


@pytest.mark.parametrize(("case", "path"), [("repa_8", "linear"), ("sit_8", "reverse_linear")])
def test_the_velocity_is_the_originals_in_its_own_direction(case, path):
    """Ours goes from data to noise and counts the noise; willisma's the other way round."""
    view = GuideView(short=64, window=None, stride=None, multiple=16)
    made = SiTGuide(network=loaded(case), codec=FourChannels(), view=view, path=path, weights=None)
    latent, t, classes = inputs(case)
    share, sign = (t, 1) if path == "linear" else (1 - t, -1)
    with torch.no_grad():
        found = made.predict(latent, share, classes[:, None])[:, 0]
    # As in test_transformer; 1 - t rounds once more.
    torch.testing.assert_close(found, sign * value(case, "out"), rtol=0, atol=1e-5)


def test_a_network_with_weights_waits_on_the_meta_device():
    made = guide(weights="random")
    assert all(each.is_meta for each in made.network.parameters())
    made.fill(torch.device("cpu"))
    again = drawn().network.state_dict()
    assert all(torch.equal(again[name], v) for name, v in made.network.state_dict().items())


def test_without_weights_the_network_keeps_what_it_was_built_with():
    made = guide()
    before = [each.clone() for each in made.network.parameters()]
    made.fill(torch.device("cpu"))
    assert all(torch.equal(*each) for each in zip(before, made.network.parameters(), strict=True))


def test_averaged_weights_are_preferred(tmp_path: Path):
    own, other = network(), network()
    tree = {"model": other.state_dict(), "ema": own.state_dict(), "opt": {"state": {}}}
    torch.save(tree, tmp_path / "0400000.pt")
    made = guide(weights=str(tmp_path / "0400000.pt"))
    made.fill(torch.device("cpu"))
    for name, expected in own.state_dict().items():
        assert torch.equal(made.network.state_dict()[name], expected), name


def test_a_file_of_repa_loads_without_its_projectors(tmp_path: Path):
    own = network()
    extra = {"pos_embed": torch.zeros(1, 64, 16), "projectors.0.0.weight": torch.zeros(4, 16)}
    torch.save({**extra, **own.state_dict()}, tmp_path / "last.pt")
    made = guide(weights=str(tmp_path / "last.pt"))
    made.fill(torch.device("cpu"))
    assert torch.equal(made.network.blocks[1].mlp.fc1.weight, own.blocks[1].mlp.fc1.weight)


def test_weights_of_other_classes_are_refused(tmp_path: Path):
    state = network().state_dict()
    state["y_embedder.embedding_table.weight"] = torch.zeros(9, 16)
    save_safetensors(tmp_path / "model.safetensors", state, {})
    made = guide(weights=str(tmp_path))
    with pytest.raises(SegmillError, match="embedding_table"):
        made.fill(torch.device("cpu"))


def test_missing_weights_are_one_paragraph_before_anything_is_built(tmp_path: Path):
    with pytest.raises(SegmillError, match=r"last\.pt .*segmill train experiment=guide_camvid"):
        guide(weights=str(tmp_path / "nowhere.pt"))


def test_what_is_missing_is_listed_for_the_command(tmp_path: Path):
    codec = {"_target_": "x", "weights": str(tmp_path / "taesd3_encoder.safetensors")}
    found = SiTGuide.missing(weights=str(tmp_path / "no.pt"), codec=codec, path="linear")
    assert len(found) == 2
    assert "no.pt" in found[0]
    assert "taesd3_encoder.safetensors" in found[1]
    assert "model.generative.codec.weights=FILE" in found[1]
    assert SiTGuide.missing(weights="random", codec={"_target_": "x", "factor": 4}) == []
    (untrained,) = SiTGuide.missing(weights=None, codec={"_target_": "x", "factor": 4})
    assert "model.generative.weights=null is for training" in untrained


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(SegmillError, match="in_channels=16"):
        check_sizes(
            network(),
            SixteenChannels(),
            GuideView(short=32, window=None, stride=None, multiple=8),
        )
    with pytest.raises(SegmillError, match=r"view\.multiple=8 is no multiple of 16"):
        guide(factor=8)


class SixteenChannels(PixelCodec):
    def __init__(self) -> None:
        super().__init__(factor=4, mean=0.0, std=1.0)
        self.channels = 16


@pytest.fixture
def mesh(tmp_path: Path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_sharded_network_is_filled_with_the_same_values(tmp_path: Path, mesh):
    own = drawn().network
    save_safetensors(tmp_path / "model.safetensors", own.state_dict(), {})
    for weights in ("random", str(tmp_path)):
        made = guide(weights=weights)
        for each in (*made.blocks(), made.network):
            fully_shard(each, mesh=mesh)
        made.fill(torch.device("cpu"))
        for name, sharded in made.network.state_dict().items():
            assert isinstance(sharded, DTensor)
            assert torch.equal(sharded.full_tensor(), own.state_dict()[name]), name
        latent = made.encode(windows())
        made.predict(latent, torch.zeros(2), torch.zeros(2, 1).long()).sum().backward()
