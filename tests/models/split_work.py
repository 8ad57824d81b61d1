"""What the processes of test_class_split.py do, and one process alone for comparison."""

from typing import Any

import torch
from torch import distributed

from segmill.models.class_sets import class_sets
from segmill.models.class_split import ClassSplit
from segmill.tta.dusa import Dusa
from segmill.tta.dusa_u import DusaU
from tiny_adapt import adapt_once, tiny_model, tiny_views

METHODS = {"dusa": Dusa, "dusa_u": DusaU}
# A patchwork beside a plain field: windows with many classes and windows with few.
VIEWS = tiny_views(40, 152)
VIEWS.image[..., 64:] = 200
SETTINGS: dict[str, dict[str, Any]] = {
    "windows one by one": {},
    "windows together": {"windows_at_once": None, "buckets": (4, 8)},
    "chunks": {"class_chunk": 2, "topk": 3},
    "drawn sets": {"classes_threshold": 3},
    "drawn sets in chunks": {"classes_threshold": 3, "class_chunk": 1, "mask_reduction": "all"},
    "all classes": {"topk": 7},
    "frozen guide": {"update": (True, False, False)},
    "frozen model": {"update": (False, True, False)},
    "steps of windows": {"step": "window", "rate": 0.1},
}


def adapted(method: str, settings: dict[str, Any]) -> tuple[torch.Tensor, list[Any], list[Any]]:
    """Loss, gradients of every step, and the calls of the guide."""
    keys = dict(settings)
    outside = {each: keys.pop(each) for each in ("step", "rate") if each in keys}
    model = tiny_model(**keys)
    _, loss, updater = adapt_once(METHODS[method], model, VIEWS, **outside)
    return loss, updater.steps, model.generative.calls


def drawn() -> tuple[torch.Tensor, ...]:
    """Time, noise, classes and masks of windows whose class sets need a draw."""
    model = tiny_model(classes_threshold=3, timestep_range=(0.1, 0.9))
    generator = torch.Generator().manual_seed(0)
    noisy = model.noisy_windows(VIEWS.original, generator)
    windows = model.weighted_windows(model(VIEWS.image), noisy, generator)
    return windows.t, windows.noisy_latent, windows.classes, windows.mask


def at_odds() -> tuple[Any, ...]:
    """Class sets of processes that see different logits and draw different numbers."""
    split = ClassSplit.of_processes()
    generator = torch.Generator().manual_seed(split.rank)
    logits = torch.randn(2, 9, 2, 3, generator=generator)
    sets = class_sets(
        logits,
        topk=1,
        max_classes=4,
        min_classes=0,
        buckets=(),
        generator=generator,
        split=split,
    )
    return sets.classes, sets.valid, sets.mask, sets.widths


def everything() -> dict[str, Any]:
    """All of it in one go, as starting processes takes longer than the work."""
    results: dict[str, Any] = {
        f"{method}, {name}": adapted(method, settings)
        for method in METHODS
        for name, settings in SETTINGS.items()
    }
    if distributed.is_initialized():
        results["at odds"] = at_odds()
    return results | {"drawn": drawn()}
