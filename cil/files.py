"""Files that are whole or not there, and what made them: every writer of the house goes through here."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import json
import os
import platform
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_waiting: contextvars.ContextVar[list[tuple[Path, Path]] | None] = contextvars.ContextVar("waiting", default=None)


def atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """write(part), then give the file its name: a reader sees the old file or the whole new one, also after a crash.

    write: is given a path beside `path`, and writes there. Nothing stays behind when it raises. Inside `together` the file
    gets its name with the others.
    """
    # Named by process and thread: of two writers at once the later one wins, and neither sees half a file.
    part = path.with_name(f".{path.name[:200]}.{os.getpid()}-{threading.get_ident()}.part")
    waiting, kept = _waiting.get(), False
    try:
        write(part)
        with open(part, "rb") as file:  # also after a power cut
            os.fsync(file.fileno())
        if waiting is None:
            os.replace(part, path)
        else:
            waiting.append((part, path))
            kept = True
    except OSError as error:  # "File too large" alone would not say which
        raise OSError(error.errno, error.strerror or str(error), error.filename2 or str(path)) from None
    finally:
        if not kept:
            part.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Files that the body writes `atomically` get their names when all are written; where one cannot be, none does.

    Raises IsADirectoryError, before any has its name, where a folder has that name.
    """
    waiting: list[tuple[Path, Path]] = []
    token = _waiting.set(waiting)
    try:
        yield
        for _, path in waiting:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for part, path in waiting:
            os.replace(part, path)
    finally:
        _waiting.reset(token)
        for part, _ in waiting:
            part.unlink(missing_ok=True)


def regular(path: str | Path) -> Path:
    """A file that ends. Raises ValueError for a pipe, a device, a folder, a link that leads nowhere, and where nothing is:
    every file that a user names is opened through here."""
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
        kind = next((words for test, words in kinds.items() if test(mode)), "a device")
        raise ValueError(f"{path} is {kind}, not a file")
    return path


def reason_of(error: Exception) -> str:
    """What an error says, without Python's and the system's ways to number errors."""
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


MOST_JSON = 16 * 2**20  # bytes


def read_json(path: Path) -> Any:
    """Raises ValueError for what is no JSON file, or one of more than 16 MiB."""
    if regular(path).stat().st_size > MOST_JSON:
        raise ValueError(f"{path} is larger than the {MOST_JSON // 2**20} MiB of any JSON file here")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({reason_of(error)})") from None


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
    if not (path / "run.json").exists():
        raise ValueError(f"{path} holds no run.json, so it is no run directory" + _neighbours(path / "*"))
    return path


def _neighbours(path: Path) -> str:
    runs = sorted(p.parent.name for p in path.parent.glob("*/run.json"))
    return f"; there: {', '.join(runs)}" if runs else ""
