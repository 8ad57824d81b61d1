"""A guide as the network of a training run: its loss, what it answers, and its file."""

import math
from pathlib import Path

import pytest
import torch

import segmill
from segmill.checkpoint.load import save_safetensors
from segmill.configuration import build, compose, plain
from segmill.errors import SegmillError
from segmill.model_file import default_classes
from segmill.models.discriminative import Discriminative
from segmill.models.generative.classifier import GuideClassifier, ReadOut, class_shares
from segmill.models.generative.codec import PixelCodec, TinyCodec
from segmill.models.generative.sit import SiTGuide
from segmill.models.generative.transformer import DiffusionTransformer
from segmill.models.guide_view import GuideView
from segmill.segmenter import Segmenter, save_segmenter
from tiny_run import train_tiny

CLASSES = 3
COLOURS = torch.tensor([[230, 40, 40], [40, 220, 40], [30, 30, 200]], dtype=torch.float32)


def classifier(**changes: object) -> GuideClassifier:
    torch.manual_seed(0)
    network = DiffusionTransformer(
        in_channels=3,
        channels=32,
        depth=2,
        num_heads=2,
        patch=1,
        mlp_ratio=2.0,
        num_classes=CLASSES,
        learn_sigma=False,
        qk_norm=False,
    )
    guide = SiTGuide(
        network=network,
        codec=PixelCodec(factor=4, mean=0.0, std=0.5),
        view=GuideView(short=16, window=None, stride=None, multiple=4),
        path="linear",
        weights=None,
    )
    settings: dict = {
        "t_range": (0.1, 0.6),
        "classes_per_image": None,
        "unconditional": 0.1,
        "contrast": 0.0,
        "read_out": ReadOut(times=(0.3, 0.5), seed=0),
        **changes,
    }
    return GuideClassifier(guide=guide, **settings)


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of two coloured halves, normalised, and their labels: colour tells the class."""
    draw = torch.Generator().manual_seed(seed)
    pair = torch.rand(count, CLASSES, generator=draw).argsort(dim=1)[:, :2]
    label = pair[:, :, None, None].expand(-1, -1, 16, 12).movedim(1, 2).flatten(2).contiguous()
    noise = 20 * torch.randn(count, 3, 16, 24, generator=draw)
    image = (COLOURS[label].movedim(3, 1) + noise).clamp(0, 255)
    return image / 127.5 - 1, label


def test_shares_count_the_labelled_pixels_of_a_cell():
    label = torch.full((1, 4, 8), 255)
    label[0, :2, :4] = 1
    label[0, 2, :4] = 2
    shares = class_shares(label, CLASSES, 4)
    assert torch.equal(shares[0, :, 0, 0], torch.tensor([0.0, 8 / 12, 4 / 12]))
    assert not shares[0, :, 0, 1].any()  # nothing is labelled there


def test_the_loss_is_the_one_of_adaptation_with_the_label_as_probabilities():
    made = classifier(unconditional=0.0, t_range=(0.4, 0.4))
    for parameter in made.guide.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image, label = samples(2, seed=0)
    label[:, :, 9:] = 255
    torch.manual_seed(1)
    loss = made.losses(image, label)["guide.loss_mse"]

    torch.manual_seed(1)
    latent = made.guide.encode(image * 127.5 + 127.5)
    torch.rand(2)
    noise = torch.randn_like(latent)
    t = torch.full((2,), 0.4)
    noisy, target = made.guide.noisy(latent, noise, t)
    every = torch.arange(CLASSES).expand(2, -1)
    shares = class_shares(label, CLASSES, 4)
    mean = (shares[:, :, None] * made.guide.predict(noisy, t, every)).sum(dim=1)
    known = (label != 255).unflatten(1, (4, 4)).unflatten(3, (6, 4)).any(dim=4).any(dim=2)
    squared = (mean - target).square().mean(dim=1)
    # The same float32 sums over another number of classes.
    torch.testing.assert_close(loss, squared[known].mean(), rtol=1e-5, atol=0)


def test_an_answer_for_the_image_is_not_trained_by_maps():
    """The class of its first cell would be taken for the image's."""
    image, label = samples(2, seed=0)
    made = classifier(answer="image", contrast=1.0)
    with pytest.raises(SegmillError, match=r"answer=image .* Set model\.network\.answer=cell"):
        made.losses(image, label)


def test_images_without_a_label_do_not_count():
    made = classifier(answer="image", contrast=1.0, unconditional=0.0, classes_per_image=3)
    for parameter in made.guide.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image, label = samples(2, seed=0)[0], torch.tensor([1, -1])[:, None, None]
    terms = []
    for second in (image[1], -image[1]):
        torch.manual_seed(1)
        terms.append(made.losses(torch.stack([image[0], second]), label))
    assert terms[0] == terms[1]
    assert all(each > 0 for each in terms[0].values())
    assert not any(made.losses(image, torch.full_like(label, -1)).values())


def test_with_fewer_classes_the_cells_of_the_others_do_not_count():
    made = classifier(classes_per_image=1, unconditional=0.0)
    _, label = samples(8, seed=0)
    shares = class_shares(label, CLASSES, 4)
    classes, weights, mask = made._conditions(shares)
    assert classes.shape == (8, 1)
    chosen = shares.gather(1, classes[:, :, None, None].expand(-1, -1, 4, 6))
    assert torch.equal(weights, chosen)
    assert torch.equal(mask, chosen[:, 0] == 1)
    assert mask.any(dim=(1, 2)).all()  # only classes that are there are drawn


def test_an_image_without_condition_trains_the_null_class_everywhere():
    made = classifier(unconditional=1.0)
    _, label = samples(2, seed=0)
    label[:, :8] = 255
    classes, weights, mask = made._conditions(class_shares(label, CLASSES, 4))
    assert (classes == CLASSES).all()
    assert (weights.sum(dim=1) == 1).all()
    assert mask.all()


def test_a_few_steps_lower_the_loss_and_teach_the_classes():
    made = classifier()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    image, label = samples(64, seed=0)
    torch.manual_seed(2)
    losses = []
    for step in range(100):
        part = slice(16 * step % 64, 16 * step % 64 + 16)
        loss = made.losses(image[part], label[part])["guide.loss_mse"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    image, label = samples(16, seed=1)
    with torch.no_grad():
        pred = made.eval()(image).argmax(dim=1)
    # Chance is 1 of 3.
    assert (pred == label[:, ::4, ::4]).float().mean() > 0.6


def test_answers_are_the_same_each_time_and_for_each_place_in_a_batch():
    made = classifier().eval()
    for parameter in made.guide.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image, _ = samples(3, seed=0)
    with torch.no_grad():
        logits = made(image)
        assert torch.equal(logits, made(image))
        # The same float32 sums, batched differently.
        torch.testing.assert_close(logits[1:2], made(image[1:2]), rtol=1e-4, atol=1e-3)
    assert logits.shape == (3, CLASSES, 4, 6)


def test_images_of_any_size_are_rounded_to_whole_patches():
    made = classifier().eval()
    with torch.no_grad():
        assert made(torch.zeros(1, 3, 17, 30)).shape == (1, CLASSES, 4, 8)
        assert made(torch.zeros(1, 3, 1, 5)).shape == (1, CLASSES, 1, 1)


def test_a_crop_without_whole_patches_is_refused():
    with pytest.raises(SegmillError, match=r"data\.crop is 15 x 24"):
        classifier().losses(torch.zeros(1, 3, 15, 24), torch.zeros(1, 15, 24).long())


def test_times_are_shares():
    with pytest.raises(SegmillError, match="between 0 and 1"):
        classifier(t_range=(0.0, 500.0))
    with pytest.raises(SegmillError, match="at least one"):
        classifier(read_out=ReadOut(times=(), seed=0))


def test_segmill_train_makes_a_guide_that_adaptation_can_open(tmp_path: Path):
    run = train_tiny(tmp_path, model="guide_scenes", model__network__guide__network__depth=1)
    segmenter = segmill.load(run)
    trained = segmenter.network.guide.network.state_dict()
    config = dict(segmenter.config["network"]["guide"])
    guide = build({**config, "weights": str(run)})
    guide.fill(torch.device("cpu"))
    assert all(torch.equal(trained[n], v) for n, v in guide.network.state_dict().items())
    assert not any(parameter.is_meta for parameter in guide.parameters())


@pytest.fixture
def codec_file(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    built = TinyCodec(weights="random", channels=4, mean=None, std=None)
    save_safetensors(tmp_path / "encoder.safetensors", built.state_dict(), {})
    return tmp_path / "encoder.safetensors"


def test_the_file_of_a_guide_holds_its_codec_too(tmp_path: Path, codec_file: Path):
    config = compose(
        "load",
        [
            "model=guide_camvid",
            "data.num_classes=3",
            "model.network.guide.network.in_channels=4",
            "model.network.guide.network.depth=1",
            f"model.network.guide.codec.weights={codec_file}",
            "model.network.guide.codec.channels=4",
            "model.network.guide.codec.mean=null",
            "model.network.guide.codec.std=null",
        ],
    )
    model: Discriminative = build(config.model)
    segmenter = Segmenter(
        model, default_classes(CLASSES), build(config.protocol), plain(config.model)
    )
    save_segmenter(tmp_path / "model.safetensors", segmenter)
    codec_file.unlink()
    window = torch.randint(0, 256, (1, 3, 16, 32)).byte()
    expected = model.network.guide.encode(window)
    assert torch.equal(segmill.load(tmp_path).network.guide.encode(window), expected)
    facts = plain(config.model)["network"]["guide"]
    codec = {**facts["codec"], "weights": None}
    alone = build({**facts, "weights": str(tmp_path), "codec": codec})
    alone.fill(torch.device("cpu"))
    assert torch.equal(alone.encode(window), expected)


def test_contrast_adds_the_cross_entropy_of_the_errors():
    image, label = samples(4, seed=3)
    made = classifier(unconditional=0.0, contrast=0.5)
    torch.manual_seed(0)
    terms = made.losses(image, label)
    assert set(terms) == {"guide.loss_mse", "guide.loss_ce"}
    torch.manual_seed(0)
    plain = classifier(unconditional=0.0)
    plain.load_state_dict(made.state_dict())
    torch.manual_seed(0)
    assert set(plain.losses(image, label)) == {"guide.loss_mse"}
    # A network that gives every class the same answer is worth a guess among the image's two.
    guess = 0.5 * math.log(2)
    assert terms["guide.loss_ce"].item() == pytest.approx(guess, abs=0.05)


def test_one_label_for_the_image_is_that_of_every_pixel():
    made = classifier(classes_per_image=2)
    image, _ = samples(2, seed=0)
    label = torch.tensor([2, 0])[:, None, None]
    losses = []
    for each in (label, label.expand(-1, *image.shape[2:])):
        torch.manual_seed(1)
        losses.append(made.losses(image, each)["guide.loss_mse"])
    assert torch.equal(*losses)


def test_the_answer_for_an_image_adds_up_its_cells():
    made = classifier()
    torch.nn.init.normal_(made.guide.network.final_layer.linear.weight, std=0.2)
    image, _ = samples(2, seed=0)
    with torch.no_grad():
        cells = made(image)
        made.answer = "image"
        whole = made(image)
    torch.testing.assert_close(whole, cells.sum(dim=(2, 3), keepdim=True))


def test_a_guide_learns_the_classes_of_images():
    made = classifier(classes_per_image=2, contrast=0.1, answer="image", unconditional=0.0)
    optimizer = torch.optim.Adam(made.parameters(), lr=5e-3)
    draw = torch.Generator().manual_seed(0)

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.randint(0, CLASSES, (count,), generator=draw)
        noise = 20 * torch.randn(count, 3, 16, 16, generator=draw)
        image = (COLOURS[label][:, :, None, None] + noise).clamp(0, 255)
        return image / 127.5 - 1, label[:, None, None]

    for _ in range(60):
        optimizer.zero_grad()
        sum(made.losses(*batch(16)).values()).backward()
        optimizer.step()
    image, label = batch(60)
    with torch.no_grad():
        logits = made(image)
    assert logits.shape == (60, CLASSES, 1, 1)
    assert (logits.argmax(dim=1) == label).float().mean() > 0.9
