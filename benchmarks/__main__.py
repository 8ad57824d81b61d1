"""Run every benchmark of this folder, each in a process of its own: python -m benchmarks."""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Exit status 1 when any of them failed."""
    folder = Path(__file__).parent
    modules = [f"{folder.name}.{script.stem}" for script in sorted(folder.glob("[!_]*.py"))]
    failed = [
        module
        for module in modules
        if subprocess.run([sys.executable, "-m", module], check=False, cwd=folder.parent).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
