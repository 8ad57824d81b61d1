"""Model folders are found here, in the hub's cache or on the hub; what is missing is said."""

import shutil
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import tiny_pipelines
from huggingface_hub.utils import filter_repo_objects
from tiny_pipelines import classes_file, guide, node

from segmill.checkpoint import pretrained
from segmill.errors import SegmillError
from segmill.models.generative import sd3, sd15_controlnet
from segmill.models.generative.model_folder import UNWANTED

HUB_ID = "stabilityai/stable-diffusion-3-medium-diffusers"
COMMIT = "0" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache on a machine without network."""

    def unknown(*_arguments: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(pretrained.urllib.request, "getproxies", dict)
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    tiny_pipelines.sd3_pipeline(folder, t5=False)
    return folder


def put(cache: Path, model: Path) -> Path:
    """The folder as the hub's client leaves it in its cache."""
    place = cache / f"models--{HUB_ID.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(model, place / "snapshots" / COMMIT))


def missing(name: str, *overrides: str) -> list[str]:
    settings: Any = node(name, *overrides)
    target = {"sd3": sd3.SD3Guide, "sd15": sd15_controlnet.SD15ControlNetGuide}
    kind: Any = target[name.partition("_")[0]]
    return kind.missing(**{key: each for key, each in settings.items() if key != "_target_"})


def test_random_weights_miss_nothing():
    assert missing("sd3_tiny") == []
    assert missing("sd15_tiny") == []


def test_without_a_network_one_paragraph_says_what_to_get(hub_cache, tmp_path):
    (paragraph,) = missing("sd3", f"text.cache={tmp_path}")
    for words in (
        HUB_ID,
        "cannot be reached",
        "licence",
        "log in",
        "model.generative.weights=",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder_2/model.safetensors",
    ):
        assert words in paragraph
    assert "text_encoder_3" not in paragraph
    assert "\n" not in paragraph
    with pytest.raises(SegmillError, match="cannot be reached"):
        guide("sd3", f"text.cache={tmp_path}")
    (paragraph,) = missing("sd3", f"text.cache={tmp_path}", "t5=true")
    assert "text_encoder_3/model.safetensors" in paragraph


def test_the_published_guide_needs_two_folders(hub_cache, tmp_path):
    main, control = missing("sd15_controlnet", f"text.cache={tmp_path}")
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in main
    assert "lllyasviel/control_v11p_sd15_seg" in control
    assert "control_weights=" in control


def test_a_cached_repository_needs_no_network(hub_cache, model, tmp_path):
    keys = [f"text.cache={tmp_path / 'text'}", f"weights={HUB_ID}"]
    put(hub_cache, model)
    assert missing("sd3_tiny", *keys) == []
    assert guide("sd3_tiny", *keys).folder.name == COMMIT


def test_text_encoders_are_needed_only_while_their_output_is_not_kept(hub_cache, model, tmp_path):
    keys = [f"text.cache={tmp_path / 'text'}", f"weights={HUB_ID}"]
    place = put(hub_cache, model)
    guide("sd3_tiny", *keys)
    for each in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(place / each)
    assert missing("sd3_tiny", *keys) == []
    guide("sd3_tiny", *keys)
    (paragraph,) = missing("sd3_tiny", *keys, "text.template='a {}'")
    assert "text_encoder/model.safetensors" in paragraph


def test_a_folder_that_lacks_files_says_which(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    keys = [f"text.cache={tmp_path}", f"weights={folder}"]
    (paragraph,) = missing("sd3_tiny", *keys)
    assert f"{folder} lacks vae/diffusion_pytorch_model.safetensors." in paragraph
    with pytest.raises(SegmillError, match="lacks vae"):
        guide("sd3_tiny", *keys)


def test_shards_that_an_index_lists_are_needed(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    (paragraph,) = missing("sd3_tiny", f"text.cache={tmp_path}", f"weights={folder}")
    assert "lacks transformer/part-1.safetensors." in paragraph


def test_neither_a_folder_nor_a_hub_id(tmp_path):
    (paragraph,) = missing("sd3", f"weights={tmp_path}/none", f"text.cache={tmp_path}")
    assert "neither a folder here nor a hub id" in paragraph


def test_a_gated_repository_is_refused_with_its_reason(hub_cache, tmp_path, monkeypatch):
    def refused(*_arguments: object, **_keys: object) -> None:
        raise huggingface_hub.errors.GatedRepoError("Access is restricted.", response=Mock())

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments: [])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    (paragraph,) = missing("sd3", f"text.cache={tmp_path}")
    assert "the hub refused it (Access is restricted.)" in paragraph
    assert "accept its licence" in paragraph


def test_what_is_missing_is_downloaded_and_nothing_twice(hub_cache, model, tmp_path, monkeypatch):
    asked: dict[str, Any] = {}

    def download(repository: str, **keys: Any) -> None:
        asked.update(keys, repository=repository)
        put(hub_cache, model)

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments: [])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_names, **_keys: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    text = f"text.classes={classes_file(tmp_path)}"
    guide("sd3_tiny", f"text.cache={tmp_path / 'text'}", text, f"weights={HUB_ID}")
    assert asked["repository"] == HUB_ID
    repository = [
        "sd3_medium.safetensors",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_3/config.json",
        "text_encoder_3/model-00001-of-00002.safetensors",
    ]
    assert asked["ignore_patterns"] == list(UNWANTED)
    wanted = filter_repo_objects(
        repository,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(wanted) == [
        name
        for name in repository[1:]
        if "fp16" not in name and not name.startswith("text_encoder_3")
    ]


def test_a_folder_has_no_revision(model, tmp_path):
    with pytest.raises(SegmillError, match="revision=main is for repositories on the hub"):
        guide("sd3_tiny", f"text.cache={tmp_path}", f"weights={model}", "revision=main")
