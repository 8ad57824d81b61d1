"""The import direction of the design: never upwards, and the portable files need no torch."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "segmill"
PORTABLE_LIBRARIES = {"numpy", "cv2", "PIL", "scipy", "jaxtyping"}
REPORT_LIBRARIES = PORTABLE_LIBRARIES | {"jinja2", "matplotlib", "rich"}
TORCH_LIBRARIES = PORTABLE_LIBRARIES | {
    "diffusers",
    "huggingface_hub",
    "safetensors",
    "timm",
    "torch",
    "transformers",
    "triton",
}
JITTOR_LIBRARIES = PORTABLE_LIBRARIES | {"jittor"}
LIGHTNING_LIBRARIES = TORCH_LIBRARIES | {"lightning", "torchmetrics"}

# First match wins: pattern, rank, third-party libraries (None: any). `ops`, `losses` and
# `photometric` know only tensors, so families may use them.
LAYERS: list[tuple[str, int, set[str] | None]] = [
    *((f"data.{name}", 6, LIGHTNING_LIBRARIES) for name in ("datamodule", "loader", "task_data")),
    *(
        (f"data.{name}", 6, LIGHTNING_LIBRARIES)
        for name in ("classification_data", "image_datamodule")
    ),
    ("data.digits", 0, PORTABLE_LIBRARIES | {"sklearn"}),
    *((f"checkpoint.{name}", 2, TORCH_LIBRARIES) for name in ("load", "inspect", "pretrained")),
    ("checkpoint.sharded", 2, TORCH_LIBRARIES),
    ("checkpoint.lightning_state", 6, LIGHTNING_LIBRARIES),
    ("data.*", 0, PORTABLE_LIBRARIES),
    ("checkpoint.*", 0, PORTABLE_LIBRARIES),
    ("convert.*", 0, PORTABLE_LIBRARIES),
    *((name, 0, PORTABLE_LIBRARIES) for name in ("errors", "files", "metrics", "paths")),
    *((name, 0, PORTABLE_LIBRARIES) for name in ("protocol", "views", "windows")),
    *(
        (name, 0, PORTABLE_LIBRARIES)
        for name in ("parameter_rules", "seeds", "schedules", "validation")
    ),
    *((name, 0, PORTABLE_LIBRARIES) for name in ("bootstrap", "tta.counts", "tta.results")),
    ("model_file", 1, PORTABLE_LIBRARIES),
    ("report.*", 1, REPORT_LIBRARIES),
    *((name, 2, TORCH_LIBRARIES) for name in ("ops.*", "losses", "photometric")),
    ("models.layers", 2, TORCH_LIBRARIES),
    ("models.non_local", 2, TORCH_LIBRARIES),
    ("models.hamburger", 2, TORCH_LIBRARIES),
    ("models.backbones.*", 2, TORCH_LIBRARIES),
    *((f"models.{name}", 2, TORCH_LIBRARIES) for name in ("matching", "mask_losses")),
    *((f"models.{name}", 2, TORCH_LIBRARIES) for name in ("pixel_decoder", "query_decoder")),
    ("models.deformable", 2, TORCH_LIBRARIES),
    ("models.families.*", 3, TORCH_LIBRARIES),
    ("models.guide_view", 3, TORCH_LIBRARIES),
    ("models.discriminative", 4, TORCH_LIBRARIES),
    ("models.generative.*", 4, TORCH_LIBRARIES),
    *(
        (name, 5, TORCH_LIBRARIES)
        for name in ("models.*", "inference", "draws", "optim", "cost", "measure")
    ),
    *((name, 6, LIGHTNING_LIBRARIES) for name in ("training", "evaluation", "callbacks", "tta.*")),
    ("evidence", 1, PORTABLE_LIBRARIES),
    ("jittor.*", 1, JITTOR_LIBRARIES),
    ("*", 7, None),
]
HEAVY = ("torch", "lightning", "hydra", "omegaconf", "torchmetrics", "timm", "transformers", "rich")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
INITS = [name for name in MODULES if name.rpartition(".")[2] == "__init__"]
CODE = [name for name in MODULES if name not in INITS]


def layer_of(name: str) -> tuple[int, set[str] | None]:
    return next((rank, libraries) for pattern, rank, libraries in LAYERS if fnmatch(name, pattern))


def imports_of(path: Path) -> list[str]:
    """Dotted names of everything that the file imports, at the top or inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.append(node.module or "")
            found += [f"{node.module}.{each.name}" for each in node.names]
    return found


@pytest.mark.parametrize("name", CODE)
def test_a_module_imports_only_from_its_own_layer_and_below(name):
    rank, _ = layer_of(name)
    inner = {each.removeprefix("segmill.") for each in imports_of(MODULES[name])} & set(CODE)
    upwards = {each for each in inner if layer_of(each)[0] > rank}
    assert not upwards, f"segmill.{name} imports {upwards} from a layer above"


@pytest.mark.parametrize("name", CODE)
def test_a_layer_uses_only_its_own_libraries(name):
    _, libraries = layer_of(name)
    if libraries is None:
        return
    used = {each.partition(".")[0] for each in imports_of(MODULES[name])}
    foreign = used - libraries - set(sys.stdlib_module_names) - {"segmill"}
    assert not foreign, f"segmill.{name} imports {foreign}"


def test_one_family_never_imports_another():
    families = {name for name in CODE if name.startswith("models.families.")}
    for name in families:
        inner = {each.removeprefix("segmill.") for each in imports_of(MODULES[name])}
        assert not inner & (families - {name}), name


@pytest.mark.parametrize("name", [each for each in INITS if each != "__init__"])
def test_init_files_import_nothing(name):
    assert imports_of(MODULES[name]) == []


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_portable_modules_import_without_torch_and_hydra():
    portable = [f"segmill.{name}" for name in CODE if layer_of(name)[0] == 0]
    assert "segmill.metrics" in portable
    run_python(f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ImportError(f"{{name}} is blocked here")
sys.meta_path.insert(0, Blocked())
for name in {portable}:
    importlib.import_module(name)
""")


HEAVY_IN_MODULES = f"print(sorted(set(sys.modules) & {set(HEAVY) | {'numpy'}}))"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    printed = run_python(
        f"import sys; from segmill.cli import main; main({arguments}); {HEAVY_IN_MODULES}"
    )
    assert printed.splitlines()[-1] == "[]"


def test_importing_segmill_imports_nothing_heavy():
    assert run_python(f"import sys, segmill; {HEAVY_IN_MODULES}").strip() == "[]"
