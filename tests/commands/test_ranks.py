"""A process that dies ends the run: with a message, a status, within seconds, and completely."""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_adaptation import start_adapt

STARTED = 120.0  # seconds until the first image, on a machine that does other things too
SECONDS = 20.0  # from the death to the end; two looks of half a second, and Python's own end


class Run:
    """Two processes with more images than anyone waits for; the output is read as it comes."""

    def __init__(self, folder: Path) -> None:
        keys = {"data__generate__test": 500, "trainer__log_every": 1, "trainer__devices": 2}
        # Nobody may be waiting out the processes' own timeout.
        self.process = start_adapt(folder, methods="[tent]", trainer__timeout=600, **keys)
        self.lines: queue.Queue[str] = queue.Queue()
        self.read: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.process.stdout.close()
        self.lines.put("")

    def wait_for(self, start: str) -> None:
        """Read until a line begins with `start`."""
        deadline = time.monotonic() + STARTED
        while not self._line(deadline).startswith(start):
            pass

    def end(self) -> tuple[int, str]:
        """Status and output; all processes hold the output open, so its end is that of all."""
        deadline = time.monotonic() + SECONDS
        while self._line(deadline):
            pass
        return self.process.wait(timeout=SECONDS), "".join(self.read)

    def close(self) -> None:
        """Whatever the test has found out."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _line(self, deadline: float) -> str:
        line = self.lines.get(timeout=max(deadline - time.monotonic(), 0.01))
        self.read.append(line)
        return line

    def child(self) -> int:
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,  # there may be none yet
        )
        (line,) = [each for each in listed.stdout.splitlines() if "segmill" in each]
        return int(line.split()[0])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    started = Run(tmp_path)
    try:
        yield started
    finally:
        started.close()


def is_running(pid: int) -> bool:
    """After a moment: a process closes its output before it is gone."""
    deadline = time.monotonic() + 5
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_when_a_started_process_is_killed_the_first_one_says_so(run: Run) -> None:
    run.wait_for("source ")
    child = run.child()
    os.kill(child, signal.SIGKILL)
    status, printed = run.end()
    assert status == 1
    (line,) = [each for each in printed.splitlines() if each.startswith("segmill:")]
    assert "Process 1" in line
    assert "SIGKILL" in line
    assert "resume=" in line
    assert not is_running(child)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_when_the_first_process_ends_the_others_end_too(run: Run, how: signal.Signals) -> None:
    run.wait_for("source ")
    child = run.child()
    os.kill(run.process.pid, how)
    status, printed = run.end()
    assert status == -how
    assert "The first process of the run has ended" in printed
    assert not is_running(child)


def test_a_process_that_dies_on_its_way_is_not_waited_for(run: Run) -> None:
    run.wait_for("Run folder")
    deadline = time.monotonic() + STARTED
    child = None
    while child is None:
        try:
            child = run.child()
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    status, printed = run.end()
    assert status == 1
    assert "Process 1" in printed


@pytest.mark.slow
def test_ctrl_c_stops_both_and_says_how_to_go_on(run: Run) -> None:
    run.wait_for("source ")
    child = run.child()
    for pid in (run.process.pid, child):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    status, printed = run.end()
    assert status == 130
    assert "segmill: Stopped." in printed
    assert "Traceback" not in printed
    assert not is_running(child)
