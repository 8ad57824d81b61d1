"""Model folders in diffusers' layout: where they are, what they lack, and networks of their sizes.

A folder is here, or in the hub's cache, or is downloaded into it. Networks are built on the meta
device: shapes without memory, to be filled after sharding.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import torch
from torch import nn

from segmill.checkpoint.load import choose_rules, load_arrays, looks_like_hub_id
from segmill.checkpoint.read import read_checkpoint
from segmill.checkpoint.sharded import Draws, shards_of
from segmill.errors import SegmillError
from segmill.models.generative.codec import KLCodec
from segmill.models.guide_view import GuideView

RANDOM = "random"  # in the place of a folder: values are drawn, for tests of speed
CONFIG = "config.json"
UNWANTED = ("*.fp16*",)  # the same weights again
STEM = "diffusion_pytorch_model"  # of files of weights, text encoders excepted


@dataclass(frozen=True)
class Part:
    """Files of one subfolder (empty: of the folder itself); of each group one file is enough.

    `patterns` are what to download of it.
    """

    folder: str
    groups: tuple[tuple[str, ...], ...]
    patterns: tuple[str, ...]

    def lacking(self, folder: Path) -> list[str]:
        """What is not there, the preferred file of each group."""
        place = folder / self.folder
        lacking = [
            group[0] for group in self.groups if not any((place / name).is_file() for name in group)
        ]
        indices = [place / name for group in self.groups for name in group if "index" in name]
        shards = [file for index in indices if index.is_file() for file in shards_of(index)]
        lacking += [file.name for file in shards if not file.is_file()]
        return [str(Path(self.folder) / name) for name in lacking]


def network_part(folder: str, stem: str = STEM) -> Part:
    """A network: its sizes, and its weights in one file or several."""
    return Part(folder, ((CONFIG,), weight_names(stem)), (CONFIG, f"{stem}*.safetensors*"))


def weight_names(stem: str) -> tuple[str, ...]:
    """The names under which weights are kept, the preferred one first."""
    return (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.fp16.safetensors",
    )


def weights_file(folder: Path) -> Path:
    """The weights in a folder that is complete."""
    return next(folder / name for name in weight_names(STEM) if (folder / name).is_file())


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model's folder: `weights` names it here or on the hub; `parts` are what is needed of it.

    `about` says to someone who lacks it what it is, how to get it and which key names it.
    """

    weights: str
    revision: str | None
    parts: tuple[Part, ...]
    about: str

    def __post_init__(self) -> None:
        if self._is_own and self.revision is not None:
            raise SegmillError(
                f"revision={self.revision} is for repositories on the hub, and {self.weights} is a "
                "folder here. Set revision=null."
            )

    def problem(self) -> str | None:
        """Why it cannot be used, in one paragraph; takes no time and downloads a few bytes."""
        folder = self.here()
        lacking = self._lacking(folder)
        if not lacking:
            return None
        if self._is_own:
            return self._paragraph(f"{self.weights} lacks {', '.join(lacking)}.")
        return self._unless_reached(lambda: self._download(files_only=True))

    def path(self) -> Path:
        """The complete folder; what is missing of a hub repository is downloaded."""
        folder = self.here()
        if self._lacking(folder):
            if problem := self.problem():
                raise SegmillError(problem)
            if problem := self._unless_reached(lambda: self._download(files_only=False)):
                raise SegmillError(problem)
            folder = self.here()
            if lacking := self._lacking(folder):
                lines = f"{self.weights} on the hub lacks {', '.join(lacking)}."
                raise SegmillError(self._paragraph(lines))
        assert folder is not None
        return folder

    @property
    def patterns(self) -> tuple[str, ...]:
        """What is downloaded of a repository, but for `UNWANTED`."""
        return tuple(str(Path(part.folder) / each) for part in self.parts for each in part.patterns)

    @property
    def _is_own(self) -> bool:
        """Whether it is a folder here, not a repository on the hub."""
        return Path(self.weights).expanduser().is_dir()

    def here(self) -> Path | None:
        """The folder, or the hub's cached copy of it, complete or not."""
        if self._is_own:
            return Path(self.weights).expanduser()
        if not looks_like_hub_id(self.weights):
            return None
        for part in self.parts:
            name = str(Path(part.folder) / part.groups[0][0])
            found = huggingface_hub.try_to_load_from_cache(
                self.weights, name, revision=self.revision
            )
            if isinstance(found, str):
                return Path(found).parents[len(Path(part.folder).parts)]
        return None

    def _lacking(self, folder: Path | None) -> list[str]:
        # A folder that exists nowhere lacks everything.
        place = Path("/nowhere") if folder is None else folder
        return [name for part in self.parts for name in part.lacking(place)]

    def _download(self, *, files_only: bool) -> None:
        """Everything that is needed, or one small file to see whether the hub gives it."""
        first = self.parts[0]
        if files_only:
            name = str(Path(first.folder) / first.groups[0][0])
            huggingface_hub.hf_hub_download(self.weights, name, revision=self.revision)
            return
        huggingface_hub.snapshot_download(
            self.weights,
            revision=self.revision,
            allow_patterns=list(self.patterns),
            ignore_patterns=list(UNWANTED),
        )

    def _unless_reached(self, download: Any) -> str | None:
        """Why `download` cannot be done; None when it was."""
        # Its import of timm takes seconds, and folders that are here need none of it.
        from segmill.checkpoint.pretrained import reachable

        if not looks_like_hub_id(self.weights):
            return self._paragraph(f"{self.weights} is neither a folder here nor a hub id.")
        here = f"{self.weights} is no folder here and not complete in the hub's cache"
        if huggingface_hub.constants.HF_HUB_OFFLINE or not reachable():
            return self._paragraph(f"{here}, and the hub cannot be reached from here.")
        try:
            download()
        except huggingface_hub.errors.LocalEntryNotFoundError:
            return self._paragraph(f"{here}, and the download failed.")
        except huggingface_hub.errors.HfHubHTTPError as error:
            return self._paragraph(f"{here}, and the hub refused it ({error!s:.160}).")
        return None

    def _paragraph(self, found: str) -> str:
        names = ", ".join(
            str(Path(part.folder) / group[0]) for part in self.parts for group in part.groups
        )
        return f"{found} {self.about} Files needed of it: {names}."


def sizes_of(
    given: Mapping[str, Any] | None, network: type[nn.Module], folder: Path | None, *, key: str
) -> dict[str, Any]:
    """A network's sizes: `given`, which those of a model folder must not contradict.

    `key` is the configuration's name for them; null there takes the folder's own.
    """
    known = inspect.signature(network.__init__).parameters
    unknown = sorted(set(given or ()) - set(known))
    if unknown:
        raise SegmillError(
            f"{key}.{unknown[0]}: {network.__name__} has no such size. It has: "
            f"{', '.join(name for name in known if name != 'self')}."
        )
    if folder is None:
        if given is None:
            raise SegmillError(f"{key}=null takes the sizes of a model folder: give them, or one.")
        return dict(given)
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    wrong = [
        f"{key}.{name}={value} ({found[name]} there)"
        for name, value in (given or {}).items()
        if name in found and _plain(found[name]) != _plain(value)
    ]
    if wrong:
        raise SegmillError(
            f"The sizes in {folder / CONFIG} are others than the configuration's: "
            f"{', '.join(wrong)}. Set these keys to the folder's values, or {key}=null to take all "
            "of them."
        )
    return {name: value for name, value in found.items() if name in known}


def built_on_meta(network: Any, sizes: Mapping[str, Any]) -> Any:
    """The network in eval mode, without memory."""
    with torch.device("meta"):
        return network(**sizes).eval()


def from_diffusers(name: str) -> Any:
    """A class of diffusers."""
    try:
        import diffusers
    except ImportError as error:
        raise SegmillError(
            'This guide is a model of diffusers, which is not installed: pip install "'
            'segmill[tta]".'
        ) from error
    return getattr(diffusers, name)


def identity(folder: Path) -> str:
    """What tells a model from others: the commit of the hub's copy, else the folder's place.

    A folder whose text encoders are exchanged needs another `text.cache`.
    """
    return folder.name if folder.parent.name == "snapshots" else str(folder.resolve())


def check_view(view: GuideView, unit: int) -> None:
    """Refuse windows that are no whole number of `unit` pixels, which the network needs."""
    wrong = view.short % unit if view.window else view.multiple % unit
    if wrong:
        raise SegmillError(
            f"model.generative.view: short={view.short} and multiple={view.multiple}, but this "
            f"guide needs windows of whole patches of {unit} pixels. Set "
            f"{'short and window' if view.window else 'multiple'} to a multiple of {unit}."
        )


def fill_codec(codec: KLCodec, folder: Path | None) -> None:
    """Values for a codec without weights of its own: those of the model's folder, or drawn."""
    state = codec.state_dict()
    if not any(bool(value.isnan().any()) for value in state.values()):
        return
    if folder is None:
        for name, value in state.items():
            everything = tuple(slice(0, size) for size in value.shape)
            value.copy_(Draws().read(name, tuple(value.shape), everything, value.device))
        return
    arrays = read_checkpoint(weights_file(folder))
    _, rules = choose_rules(codec, arrays)
    load_arrays(codec, arrays, rules=rules)
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    shift, scale = found.get("shift_factor") or 0.0, found["scaling_factor"]
    if (codec.shift, codec.scale) != (shift, scale):
        raise SegmillError(
            f"model.generative.codec has shift={codec.shift}, scale={codec.scale}; "
            f"{folder / CONFIG} says shift={shift}, scale={scale}. Set the folder's values."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
