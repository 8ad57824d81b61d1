"""Weights from the hub: `owner/name`, and the pretrained weights of a timm backbone.

A file that is in the local cache is used without asking the network.
"""

import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import timm
import timm.models
import torch
from jaxtyping import Shaped
from torch import nn

from segmill.checkpoint.read import CheckpointError, read_checkpoint

Array = Shaped[np.ndarray, "..."]
FILES = ("model.safetensors", "pytorch_model.bin")


@runtime_checkable
class TimmBackbone(Protocol):
    """A network or its backbone that is a model of timm, or has one's weights: `name` is timm's."""

    name: str
    in_channels: int


def hub_file(repository: str, names: Sequence[str] = FILES, *, key: str = "weights") -> Path:
    """The weights' file of a hub repository, from the cache or downloaded into it.

    `names` are the paths in the repository that it may have, the preferred one first. `key` is the
    setting that takes a file instead.
    """
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    if huggingface_hub.constants.HF_HUB_OFFLINE or not reachable():
        reason = "the hub cannot be reached from here"
        raise CheckpointError(_how_to_copy(repository, names, reason, key))
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name))
        except huggingface_hub.errors.LocalEntryNotFoundError as error:
            reason = "the download failed"
            raise CheckpointError(_how_to_copy(repository, names, reason, key)) from error
        except huggingface_hub.errors.EntryNotFoundError:
            continue
        except huggingface_hub.errors.HfHubHTTPError as error:
            reason = f"the hub refused it ({error!s:.160})"
            raise CheckpointError(_how_to_copy(repository, names, reason, key)) from error
    raise CheckpointError(f"{repository} on the hub has neither {' nor '.join(names)}.")


def timm_weights(module: nn.Module) -> dict[str, Array]:
    """timm's pretrained weights for `module.backbone` (or a classifier), under timm's names.

    The first convolution is adapted to the backbone's channels by timm's own rule (for RGB-D: the
    RGB filters repeated and scaled).
    """
    backbone: object = dict(module.named_children()).get("backbone")
    if isinstance(module, TimmBackbone):
        backbone = module
    if not isinstance(backbone, TimmBackbone):
        raise CheckpointError(
            "weights=timm is for networks whose backbone is a model of timm, and this one's is "
            f"{type(backbone).__name__}. Name a checkpoint instead."
        )
    arrays = read_checkpoint(timm_file(backbone.name))
    config = timm.get_pretrained_cfg(backbone.name)
    first = None if config is None else config.first_conv
    for name in (first,) if isinstance(first, str) else first or ():
        weight = torch.from_numpy(arrays[f"{name}.weight"])
        adapted = timm.models.adapt_input_conv(backbone.in_channels, weight)
        arrays[f"{name}.weight"] = adapted.numpy()
    return arrays


def timm_file(name: str) -> Path:
    """The file of timm's pretrained weights of a model, from the cache or downloaded into it."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise CheckpointError(f"timm {timm.__version__} has no pretrained weights for {name}.")
    return hub_file(str(config.hf_hub_id))


def reachable() -> bool:
    """Whether the hub's name resolves; without this the hub's client retries for minutes."""
    if urllib.request.getproxies():
        return True  # names are resolved behind the proxy
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _how_to_copy(repository: str, names: Sequence[str], reason: str, key: str) -> str:
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    folder = cache / f"models--{repository.replace('/', '--')}"
    return (
        f"{repository} is no file or folder here and not in the hub's cache, and {reason}. On a "
        f"machine with network, download {' or '.join(names)} of the hub repository "
        f"{repository}, copy it here and pass {key}=THAT_FILE; or copy the whole cache folder "
        f"to {folder}."
    )
