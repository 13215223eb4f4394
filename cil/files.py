"""Files that are whole or not there, and what made them: every writer of the house goes through here."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path


def atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """write(part), then give the file its name: a reader sees the old file or the whole new one, also after a crash.

    write: is given a path beside `path`, and writes there. Nothing stays behind when it raises.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with open(part, "rb") as file:  # also after a power cut
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """A text file, atomically."""
    return atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> Path:
    """A JSON file for people, atomically."""
    return write_text(path, json.dumps(content, indent=1) + "\n")


def write_provenance(path: Path, what: Mapping[str, object]) -> Path:
    """A JSON file that says what a measurement was made on, by which versions and which commit."""
    return write_json(path, {**what, "versions": versions(), "git": git_state()})


def versions() -> dict[str, str]:
    """Python and the libraries that numbers depend on."""
    names = ("locality-probe", "torch", "timm", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state() -> str | None:
    """Commit of the code, with `-dirty` if it is changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_run(path: str | Path) -> Path:
    """The run directory `path`. Raises ValueError where it is not there or holds no run, naming the runs near it.

    Asks the file system alone, so that a wrong path is told before torch is loaded.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no run directory {path}" + _neighbours(path))
    if not (path / "run.json").is_file():
        raise ValueError(f"{path} holds no run.json, so it is no run directory" + _neighbours(path / "*"))
    return path


def _neighbours(path: Path) -> str:
    runs = sorted(p.parent.name for p in path.parent.glob("*/run.json"))
    return f"; there: {', '.join(runs)}" if runs else ""
