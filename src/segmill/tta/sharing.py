"""Which methods may wait for further batches, and which may have other images on each process."""

from typing import Literal

from segmill.errors import SegmillError
from segmill.tta.method import Accumulates, Method, SharedImages, SharesImages


def accumulates(method: Method) -> bool:
    """Whether its step may wait for further batches."""
    return isinstance(method, Accumulates) and method.accumulates


def shared_images(method: Method) -> SharedImages:
    """What becomes of a method where every process has other images."""
    return method.shared_images if isinstance(method, SharesImages) else "together"


def check_accumulates(
    method: Method, accumulate: int, predict: Literal["before", "after"] = "before"
) -> None:
    """Refuse a method that needs every step at once, and predictions from after a later step."""
    if accumulate == 1 or not method.parameters_to_update():
        return
    name = type(method).__name__
    if not accumulates(method):
        raise SegmillError(
            f"trainer.accumulate={accumulate}: {name} as it is set takes its own "
            "steps on every batch (it looks at the weights after them, throws gradients away, or "
            "steps more than once), so gradients cannot be gathered over batches. Set "
            "trainer.accumulate=1 and a larger data.batch_size."
        )
    if predict == "after":
        raise SegmillError(
            f"tta.predict=after with trainer.accumulate={accumulate}: {name} updates after the "
            f"last of {accumulate} batches, so the others would be predicted from before their "
            "update. Set trainer.accumulate=1 and a larger data.batch_size, or tta.predict=before."
        )


def check_shares_images(method: Method, strategy: Literal["fsdp", "ddp"]) -> None:
    """Refuse a method that cannot have other images on each of several processes."""
    if not method.parameters_to_update():
        return
    name, how = type(method).__name__, shared_images(method)
    if how == "never":
        raise SegmillError(
            f"trainer.share=images: {name} with tta.method.step=window steps once a window, and "
            "processes with other images have other numbers of windows. Set tta.method.step=image, "
            "or trainer.share=classes."
        )
    if how == "unsharded" and strategy == "fsdp":
        raise SegmillError(
            f"trainer.share=images with trainer.strategy=fsdp: {name} takes windows and classes "
            "of its images in several passes (model.loss.windows_at_once, model.loss.class_chunk), "
            "of which processes with other images make other numbers, and sharded weights need as "
            "many on each. Set both to null, or trainer.strategy=ddp."
        )
    if how == "alone" and strategy == "fsdp":
        raise SegmillError(
            f"trainer.share=images with trainer.strategy=fsdp: {name} learns every image by itself "
            "from the source, so each process has weights of its own, and fsdp shares them out. "
            "Set trainer.strategy=ddp, or trainer.share=classes."
        )
