"""What the demo puts side by side."""

from segmill.commands.demo import ADAPTATIONS, COMPARED, depth_table
from segmill.configuration import compose


def test_both_models_stand_side_by_side_clean_and_corrupted() -> None:
    rgb = {"source": 0.2, "bn": 0.9, "tent": 0.3}
    table = depth_table(
        {"RGB": 0.6, "RGB-D": 0.7}, {"RGB": rgb, "RGB-D": {"source": 0.4, "tent": 0.5}}
    )
    assert table.header == ["model", "not corrupted", "corrupted, source", "corrupted, tent"]
    assert table.rows == [
        ["RGB", "60.00", "20.00", "30.00"],
        ["RGB-D", "70.00", "40.00", "50.00"],
    ]


def test_both_adaptations_of_the_demo_show_the_same_images_and_have_the_same_tent() -> None:
    one, other = (compose("adapt", [f"experiment={each}"]) for each in ADAPTATIONS.values())
    for key in ("corruptions", "severities", "split", "image", "data_root"):
        assert one.data[key] == other.data[key]
    assert one.seed == other.seed
    assert one.methods.tent == other.methods.tent
    assert {"source", *other.methods} == set(COMPARED)
    assert (one.data.channels, other.data.channels) == (3, 4)
    assert other.model.generative is None
