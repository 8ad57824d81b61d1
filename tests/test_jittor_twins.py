"""One YAML serves both runtimes: what has a twin for Jittor is told from what has none."""

import pytest

from segmill.errors import SegmillError
from segmill.twins import require_twins, twin_of


@pytest.mark.parametrize(
    ("target", "twin"),
    [
        ("segmill.optim.AdamW", "segmill.jittor.optim.AdamW"),
        ("segmill.optim.SGD", "segmill.optim.SGD"),
        ("segmill.models.families.dformer.LightHamHead", None),
        ("segmill.models.families.pspnet.PSPNet", "segmill.models.families.pspnet.PSPNet"),
        ("segmill.schedules.Poly", "segmill.schedules.Poly"),
        ("torch.optim.AdamW", "torch.optim.AdamW"),
    ],
)
def test_a_twin_is_a_class_of_the_same_name_in_the_mirrored_module(target: str, twin: str | None):
    mirrored = target.replace("segmill.", "segmill.jittor.", 1)
    assert twin_of(target) == (mirrored if twin is None else twin)


@pytest.mark.parametrize("target", ["segmill.optim.SGD", "segmill.data.image_datamodule.ImageData"])
def test_what_only_torch_has_is_refused_with_what_there_is(target: str):
    with pytest.raises(SegmillError, match=rf"runtime=jittor has no {target}\. .*dformer-tiny"):
        require_twins({"part": [{"_target_": target}]})
