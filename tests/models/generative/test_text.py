"""Text is encoded once, as diffusers does it, and never again while the cache is there."""

import gc
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from safetensors import safe_open
from tiny_pipelines import classes_file, guide

from segmill.errors import SegmillError
from segmill.models.generative import text as module
from segmill.models.generative.text import ClassText, TextCache, encode_sd3

FACTS = {"encoders": "sd3", "model": "m", "prompts": ("a", "b"), "t5_tokens": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny_pipelines.sd3_pipeline(place, t5=False)
    return place


def class_text(folder: Path, **changes: Any) -> ClassText:
    settings: dict[str, Any] = {
        "classes": str(classes_file(folder)),
        "template": "a photo of a {}",
        "prompts": {},
        "cache": str(folder / "cache"),
    }
    return ClassText(**settings | changes)


def test_prompts_take_the_classes_words_and_end_with_the_null_prompt(tmp_path):
    prompts = class_text(tmp_path, prompts={"sky": "clouds"}).all_prompts()
    assert prompts == ("a photo of a wall", "clouds", "a photo of a red ball", "")


def keys_for(folder: Path, place: Path) -> list[str]:
    return [
        f"weights={folder}",
        f"text.classes={classes_file(place)}",
        f"text.cache={place / 'cache'}",
    ]


def test_the_second_guide_reads_the_cache(folder, tmp_path, monkeypatch):
    first = guide("sd3_tiny", *keys_for(folder, tmp_path))
    assert first.tokens.shape == (4, 77, 20)

    def refused(name: str) -> None:
        raise AssertionError(f"{name} was asked for")

    monkeypatch.setattr(module, "_transformers", refused)
    second = guide("sd3_tiny", *keys_for(folder, tmp_path))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pooled, second.pooled)
    with pytest.raises(AssertionError, match="CLIPTokenizer was asked for"):
        guide("sd3_tiny", *keys_for(folder, tmp_path), "text.template='a picture of a {}'")


def test_with_the_cache_no_text_model_is_imported(folder, tmp_path):
    guide("sd3_tiny", *keys_for(folder, tmp_path))
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("transformers.models.clip.mod", "transformers.models.t5.mod")):
            raise ImportError(name + " is blocked here")
sys.meta_path.insert(0, Blocked())
sys.path[:0] = {sys.path!r}
from tiny_pipelines import guide
print(guide("sd3_tiny", *{keys_for(folder, tmp_path)!r}).num_classes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


def test_encoders_are_freed(folder, tmp_path, monkeypatch):
    alive = []
    original = module._transformers

    def watched(name: str) -> Any:
        kind = original(name)
        if "Tokenizer" in name:
            return kind

        class Watched(kind):
            def __init__(self, *arguments: Any, **keys: Any):
                super().__init__(*arguments, **keys)
                alive.append(weakref.ref(self))

        return Watched

    monkeypatch.setattr(module, "_transformers", watched)
    encode_sd3(folder, ("a",), t5_tokens=0)
    gc.collect()
    assert len(alive) == 2
    assert [each() for each in alive] == [None, None]


def test_a_prompt_that_is_too_long_is_refused(folder):
    with pytest.raises(SegmillError, match="has 82 tokens and the text encoder takes 77"):
        encode_sd3(folder, ("a" * 80,), t5_tokens=0)


def test_halved_files_are_read_too(folder, tmp_path):
    """Whoever saved disk space has `model.fp16.safetensors` only."""
    half = tmp_path / "half"
    tiny_pipelines.sd3_pipeline(half, t5=False)
    for number in ("", "_2"):
        file = half / f"text_encoder{number}" / "model.safetensors"
        file.rename(file.with_name("model.fp16.safetensors"))
    ours, theirs = (encode_sd3(each, ("wall",), t5_tokens=0) for each in (half, folder))
    assert torch.equal(ours["tokens"], theirs["tokens"])
    assert ours["tokens"].dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [{"model": "n"}, {"prompts": ("a",)}, {"t5_tokens": 256}, {"encoders": "sd15"}, {"more": 1}],
)
def test_the_key_depends_on_every_fact(tmp_path, change):
    one, other = (TextCache(str(tmp_path), facts) for facts in (FACTS, FACTS | change))
    assert one.file != other.file
    assert one.file == TextCache(str(tmp_path), dict(reversed(FACTS.items()))).file


def test_an_entry_says_what_it_depends_on(tmp_path):
    entry = TextCache(str(tmp_path), FACTS)
    assert not entry.filled
    entry.read(lambda: {"tokens": torch.ones(2, 3)})
    assert entry.filled
    with safe_open(entry.file, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts == {"format": 1, "dtype": "float32", **FACTS, "prompts": ["a", "b"]}


def test_a_crash_while_encoding_leaves_no_entry(tmp_path):
    entry = TextCache(str(tmp_path), FACTS)

    def crash() -> dict[str, torch.Tensor]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        entry.read(crash)
    assert not entry.filled
    entry.read(lambda: {"tokens": torch.ones(1)})
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_one_encodes_while_the_others_wait(tmp_path):
    calls, results = [], []
    started = threading.Barrier(4)

    def encode() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"tokens": torch.full((1,), float(len(calls)))}

    def work() -> None:
        entry = TextCache(str(tmp_path), FACTS)
        started.wait()
        results.append(entry.read(encode)["tokens"].item())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert calls == [1]
    assert results == [1.0] * 4


def test_the_cache_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TextCache("~/text", FACTS).file.parent == tmp_path / "text"
