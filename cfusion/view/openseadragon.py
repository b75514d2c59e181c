"""Fetch OpenSeadragon (deep zoom, BSD-3-Clause) once with npm, verify its digest, and load it.

It is not part of the repository.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from cfusion.errors import CfusionError, DataError
from cfusion.files import atomic_path, user_cache

VERSION = "6.1.1"

INTEGRITY = "sha512-g4iKe2q8B642SaBT3+x4ZF3/8b1TxPPydyjmtrOLgDrlYWMKd9ZXM+1Cb/xa9DVySkvs/7l6HR1nHKfD5F3Tsw=="
"""Digest of the package's tarball, as npm publishes it in `dist.integrity`."""

SCRIPT = "package/build/openseadragon/openseadragon.min.js"
LICENCE = "package/LICENSE.txt"

NPM_SECONDS = 300


def package_path() -> Path:
    """Return the path of the tarball in the user's cache."""
    return user_cache() / f"openseadragon-{VERSION}.tgz"


def fetch_package() -> Path:
    """Fetch the package with npm, unless it is in the cache; none of its scripts is executed.

    Returns:
        Path of the tarball.

    Raises:
        CfusionError: npm is not installed, or cannot fetch the package.
        DataError: The fetched package is not the pinned one.
    """
    target = package_path()
    if target.is_file() and _integrity(target.read_bytes()) == INTEGRITY:
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise CfusionError(
            "OpenSeadragon is an npm package, and npm is not installed.",
            f"Install npm, or put the package openseadragon {VERSION} at {target}.", topic="viewer",
        )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="cfusion-npm-") as folder:
        command = [
            npm,
            "pack",
            f"openseadragon@{VERSION}",
            "--ignore-scripts",
            "--silent",
            "--pack-destination",
            folder,
        ]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise CfusionError(f"npm did not finish within {NPM_SECONDS} s.", "Try again later.") from error
        packed = sorted(Path(folder).glob("*.tgz"))
        if done.returncode or not packed:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CfusionError(
                f"npm cannot fetch openseadragon {VERSION} ({last}).",
                "Check the registry that npm uses.",
                topic="viewer",
            )
        content = packed[0].read_bytes()
    _check(content, "the package that npm fetched")
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
    return target


def load() -> dict[str, bytes] | None:
    """Return the script and its licence by file name; None if the package has not been fetched.

    Raises:
        DataError: The package in the cache is not the pinned one.
    """
    path = package_path()
    if not path.is_file():
        return None
    _check(path.read_bytes(), str(path))
    with tarfile.open(path) as package:
        members = {Path(name).name: package.extractfile(name) for name in (SCRIPT, LICENCE)}
        return {name: member.read() for name, member in members.items() if member is not None}


def _check(content: bytes, what: str) -> None:
    found = _integrity(content)
    if found != INTEGRITY:
        raise DataError(
            f"{what}: is not openseadragon {VERSION} (its digest is {found[:23]}…, expected {INTEGRITY[:23]}…).",
            "Delete it and run `cfusion view --fetch` again.", topic="viewer",
        )  # fmt: skip


def _integrity(content: bytes) -> str:
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"
