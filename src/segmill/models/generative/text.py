"""Text embeddings of the classes: encoded once, kept on disk, read from there ever after.

The encoders are loaded only when the cache lacks an entry, and freed after it is written; one
process encodes and the others wait for it. An entry is a .safetensors file whose metadata holds
everything that it depends on, and whose name is the hash of that.
"""

import fcntl
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from segmill.checkpoint.load import save_safetensors
from segmill.data.classes import read_classes
from segmill.errors import SegmillError
from segmill.models.generative.model_folder import Part, network_part

FORMAT = 1  # another one makes older entries unused
NULL_PROMPT = ""  # of the class `num_classes`, "no condition"
DTYPE = "float32"  # in which encoders run
CLIP_FILES = (
    ("tokenizer_config.json",),
    ("vocab.json", "tokenizer.json"),
    ("merges.txt", "tokenizer.json"),
)
EVERYTHING = ("*",)
T5_FILES = (("tokenizer_config.json",), ("spiece.model", "tokenizer.json"))

Tensors = dict[str, Float[Tensor, "..."]]


@dataclass(frozen=True, kw_only=True)
class ClassText:
    """What the classes are called.

    `template` has `{}` where the class's name goes (the column `prompt` of `classes`, where the
    file has one); `prompts` are whole prompts for some classes instead, by name. `cache` is the
    folder in which embeddings are kept.
    """

    classes: str
    template: str
    prompts: Mapping[str, str]
    cache: str

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise SegmillError(
                f"text.template={self.template!r} should have {{}} once, where the class goes."
            )
        unknown = sorted(set(self.prompts) - set(read_classes(self.classes).names))
        if unknown:
            raise SegmillError(
                f"text.prompts has {unknown[0]!r}, which is no class of {self.classes}. Its "
                "classes are the column `name` of that file."
            )

    def all_prompts(self) -> tuple[str, ...]:
        """One prompt for each class, and the null prompt last."""
        known = read_classes(self.classes)
        return (
            *(
                self.prompts.get(name, self.template.format(word))
                for name, word in zip(known.names, known.prompts, strict=True)
            ),
            NULL_PROMPT,
        )

    def facts(self) -> dict[str, Any]:
        """What an entry of the cache depends on here."""
        return {"template": self.template, "prompts": self.all_prompts()}


@dataclass(frozen=True)
class TextCache:
    """One entry: what it depends on, and where it lies."""

    folder: str
    facts: Mapping[str, Any]

    @property
    def file(self) -> Path:
        """Where the entry is or will be."""
        return Path(self.folder).expanduser() / f"{self._key}.safetensors"

    @property
    def filled(self) -> bool:
        """Whether the entry is there, so that no encoder is needed."""
        return self.file.is_file()

    def read(self, encode: Callable[[], Tensors]) -> Tensors:
        """The entry; `encode` makes it when it is not there yet."""
        if not self.filled:
            with self._alone():
                if not self.filled:
                    self._write(encode())
        return safetensors.torch.load_file(self.file)

    @property
    def _text(self) -> str:
        facts = {"format": FORMAT, "dtype": DTYPE, **self.facts}
        return json.dumps(facts, sort_keys=True, ensure_ascii=False)

    @property
    def _key(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()[:32]

    def _write(self, tensors: Tensors) -> None:
        save_safetensors(self.file, tensors, {"facts": self._text})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time; the lock goes with the process that holds it."""
        lock = self.file.with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        lock.unlink(missing_ok=True)


def sd3_parts(*, t5: bool) -> tuple[Part, ...]:
    """What encoding for Stable Diffusion 3 needs of its folder."""
    clip = [
        part
        for number in ("", "_2")
        for part in (
            Part(f"tokenizer{number}", CLIP_FILES, EVERYTHING),
            network_part(f"text_encoder{number}", "model"),
        )
    ]
    if not t5:
        return tuple(clip)
    return (
        *clip,
        Part("tokenizer_3", T5_FILES, EVERYTHING),
        network_part("text_encoder_3", "model"),
    )


def sd15_parts() -> tuple[Part, ...]:
    """What encoding for Stable Diffusion 1.5 needs of its folder."""
    return Part("tokenizer", CLIP_FILES, EVERYTHING), network_part("text_encoder", "model")


def encode_sd3(folder: Path, prompts: tuple[str, ...], *, t5_tokens: int) -> Tensors:
    """`tokens` and `pooled` as diffusers' pipeline computes them.

    Tokens are the last but one hidden states of both CLIPs, side by side; with T5 (`t5_tokens`
    is not 0), filled up with zeros to its width and followed by its tokens.
    """
    tokens, pooled = [], []
    for number in ("", "_2"):
        ids = _clip_ids(folder, f"tokenizer{number}", prompts)
        output = _run(folder, f"text_encoder{number}", "CLIPTextModelWithProjection", ids)
        tokens.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    clip = torch.cat(tokens, dim=2)
    if t5_tokens:
        ids = _t5_ids(folder, prompts, t5_tokens)
        long = _run(folder, "text_encoder_3", "T5EncoderModel", ids).last_hidden_state
        widened = torch.nn.functional.pad(clip, (0, long.shape[2] - clip.shape[2]))
        clip = torch.cat([widened, long], dim=1)
    return {"tokens": clip, "pooled": torch.cat(pooled, dim=1)}


def encode_sd15(folder: Path, prompts: tuple[str, ...]) -> Tensors:
    """`tokens`: the last hidden states of CLIP."""
    ids = _clip_ids(folder, "tokenizer", prompts)
    return {"tokens": _run(folder, "text_encoder", "CLIPTextModel", ids).last_hidden_state}


def _clip_ids(folder: Path, part: str, prompts: tuple[str, ...]) -> Int64[Tensor, "K T"]:
    tokenizer = _transformers("CLIPTokenizer").from_pretrained(folder / part)
    return _ids(tokenizer, prompts, tokenizer.model_max_length)


def _t5_ids(folder: Path, prompts: tuple[str, ...], length: int) -> Int64[Tensor, "K T"]:
    tokenizer = _transformers("T5TokenizerFast").from_pretrained(folder / "tokenizer_3")
    return _ids(tokenizer, prompts, length)


def _ids(tokenizer: Any, prompts: tuple[str, ...], length: int) -> Int64[Tensor, "K T"]:
    """Filled up to `length`; a prompt that is longer is refused, not cut."""
    for prompt in prompts:
        count = len(tokenizer(prompt).input_ids)
        if count > length:
            raise SegmillError(
                f"The prompt {prompt!r} has {count} tokens and the text encoder takes {length}. "
                "Shorten it: text.template, or text.prompts for this class."
            )
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
    return ids.input_ids


@torch.no_grad()
def _run(folder: Path, part: str, kind: str, ids: Int64[Tensor, "K T"]) -> Any:
    """An encoder's outputs, on the host, prompts a few at a time; the encoder is freed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variant = None if (folder / part / "model.safetensors").is_file() else _variant(folder / part)
    loaded = _transformers(kind).from_pretrained(
        folder / part, dtype=torch.float32, variant=variant, use_safetensors=True
    )
    encoder = loaded.eval().to(device)
    outputs = [encoder(each.to(device), output_hidden_states=True) for each in ids.split(16)]
    joined = _joined(outputs)
    del encoder, loaded, outputs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return joined


def _variant(folder: Path) -> str | None:
    return "fp16" if (folder / "model.fp16.safetensors").is_file() else None


def _joined(outputs: list[Any]) -> Any:
    """The batches' outputs as one; hidden states are tuples of tensors."""
    first = outputs[0]
    return type(first)(
        **{
            name: tuple(torch.cat(layer).cpu() for layer in zip(*values, strict=True))
            if isinstance(first[name], tuple)
            else torch.cat(values).cpu()
            for name in first
            for values in [[each[name] for each in outputs]]
        }
    )


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise SegmillError(
            'Text encoders come from transformers, which is not installed: pip install "'
            'segmill[tta]".'
        ) from error
    return getattr(transformers, name)
