"""Import Jittor offline, with its compiled code in the project's own folder.

Left alone, `import jittor` downloads oneDNN, cub and cutlass, remembers its home for every other
program of the user, and compiles in RAM / 3 GiB processes. What the user has set stays as it is.

    python -m segmill.jittor.environment    # what `make jittor` runs: link oneDNN, compile, report
"""

import ctypes
import functools
import importlib
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger("segmill.jittor")

# The name under which Jittor 1.3.11 looks for oneDNN below its home.
ONEDNN = Path(".cache/jittor/mkl/dnnl_lnx_2.2.0_cpu_gomp")
# Debian's packages libdnnl-dev and ocl-icd-libopencl1.
DEBIAN = Path("/usr")


def prepare() -> ModuleType:
    """Import Jittor; the first time compiles for minutes, later ones take seconds."""
    if "jittor" in sys.modules:
        return sys.modules["jittor"]
    home = jittor_home()
    onednn = home / ONEDNN / "lib"
    found = (onednn / "libmkldnn.so").is_file()
    defaults = {
        "nvcc_path": "",
        "use_cutlass": "0",
        "use_mkl": str(int(found)),
        "log_silent": "1",
        "use_parallel_op_compiler": str(os.cpu_count() or 1),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["JITTOR_HOME"] = str(home)
    if os.environ["use_mkl"] == "1" and found:  # noqa: SIM112  (Jittor's own spelling)
        for library in ("libOpenCL.so.1", "libdnnl.so.2"):
            ctypes.CDLL(str(onednn / library), ctypes.RTLD_GLOBAL)
    with _user_home(home):  # Jittor writes its home into ~/.cache/jittor/config.json
        utilities = importlib.import_module("jittor_utils")
        utilities.home()
    # Jittor's -Ofast makes the processor flush subnormal numbers, which numpy notices.
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")
    # At most one compiler a core, whatever the memory.
    pool = functools.partial(_small_pool, multiprocessing.Pool)
    utilities.Pool = pool  # pyright: ignore[reportAttributeAccessIssue]
    with _own_interrupt():
        jittor = importlib.import_module("jittor")
    jittor.flags.python_path = str(_python_at_home(home))
    return jittor


def jittor_home() -> Path:
    """JITTOR_HOME; else `home` beside the environment of `make jittor`; else the user's home."""
    if "JITTOR_HOME" in os.environ:
        return Path(os.environ["JITTOR_HOME"]).resolve()
    own = Path(sys.prefix).parent / "home"
    return own if own.is_dir() else Path.home()


def link_onednn(home: Path, system: Path = DEBIAN) -> bool:
    """Place Debian's oneDNN where Jittor looks for it; False when it is not installed."""
    libraries = next(system.glob("lib/*-linux-gnu/libdnnl.so.2"), None)
    header = system / "include" / "dnnl.hpp"
    opencl = None if libraries is None else libraries.with_name("libOpenCL.so.1")
    if libraries is None or opencl is None or not (header.is_file() and opencl.exists()):
        return False
    target = home / ONEDNN
    (target / "lib").mkdir(parents=True, exist_ok=True)
    links = {
        "include": system / "include",
        "lib/libdnnl.so.2": libraries,
        "lib/libmkldnn.so": libraries,
        "lib/libOpenCL.so.1": opencl,
    }
    for name, source in links.items():
        (target / name).unlink(missing_ok=True)
        (target / name).symlink_to(source.resolve())
    return True


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ctrl-C stays Python's afterwards: at Jittor's the process exits with nothing written."""
    before = signal.getsignal(signal.SIGINT)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, before)


@contextmanager
def _user_home(folder: Path) -> Iterator[None]:
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = before


def _python_at_home(home: Path) -> Path:
    """Python as a script that sets HOME; every compilation starts one, several at a time.

    Each would read and write ~/.cache/jittor/config.json, and now and then reads half of it.
    """
    script = home / ".cache" / "jittor" / "python"
    text = f'#!/bin/sh\nHOME={shlex.quote(str(home))} exec {shlex.quote(sys.executable)} "$@"\n'
    if not script.is_file() or script.read_text() != text:
        part = script.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.chmod(0o755)
        part.replace(script)
    return script


def _small_pool(pool: Callable[..., Any], processes: int, **keywords: Any) -> Any:
    return pool(min(processes, os.cpu_count() or 1), **keywords)


def main() -> None:
    """Build the environment's compiled part and say what it is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    home = jittor_home()
    system = Path(os.environ.get("DNNL_ROOT", DEBIAN))
    if link_onednn(home, system):
        log.info("oneDNN of %s is linked: convolutions use it.", system)
    else:
        log.info(
            "oneDNN is not installed (Debian: libdnnl-dev, ocl-icd-libopencl1): Jittor's own "
            "convolutions are used, several times slower. Its numbers are the same to rounding."
        )
    log.info("Compiling Jittor into %s; the first time takes minutes ...", home)
    jittor = prepare()
    total = float(jittor.array([1.0, 2.0]).sum().numpy()[0])
    if total != 3.0:
        raise SystemExit(f"Jittor adds 1 and 2 to {total}: this build cannot be trusted.")
    log.info("Jittor %s works.", jittor.__version__)


if __name__ == "__main__":
    main()
