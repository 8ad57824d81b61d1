"""Jittor lives in the project's folder and leaves the user's home alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jittor")
pytestmark = [pytest.mark.jittor, pytest.mark.timeout(300)]

# The comment makes a kernel that no cache holds.
COMPILE = """
from segmill.jittor.environment import prepare
jt = prepare()
source = "// {key}\\n@out(0) = 3.0f;"
print(float(jt.code((1,), "float32", [], cpu_src=source).numpy()[0]))
"""


def test_compiling_a_kernel_writes_nothing_into_the_users_home(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.replace("{key}", str(tmp_path))],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["3.0"], done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_an_exception_and_no_exit():
    program = "from segmill.jittor.environment import prepare\nprepare()\n"
    program += "import os, signal, time\n"
    program += "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
    program += "except KeyboardInterrupt:\n    print('caught')\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["caught"], done.stderr[-2000:]
