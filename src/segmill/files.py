"""Writing a file whole or not at all."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so that a reader or a crash never meets half a file."""
    with whole_file(path) as scratch:
        scratch.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`, which takes its place at the end; after an error it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
