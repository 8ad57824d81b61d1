"""Run every benchmark of this folder, each in a process of its own: python -m benchmarks."""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Exit status 1 when any of them failed."""
    scripts = sorted(Path(__file__).parent.glob("[!_]*.py"))
    failed = [
        script.name
        for script in scripts
        if subprocess.run([sys.executable, str(script)], check=False).returncode != 0
    ]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
