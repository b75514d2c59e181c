"""Test that OpenSeadragon is fetched with npm, and that only the pinned package is served."""

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from cfusion.errors import CfusionError, DataError
from cfusion.view import openseadragon
from cfusion.view.api import Viewer, load_deep_zoom


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def package(script: bytes = b"var OpenSeadragon;") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in ((openseadragon.SCRIPT, script), (openseadragon.LICENCE, b"BSD-3-Clause")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a fake npm first in PATH."""
    folder.mkdir()
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_package_of_npm_is_cached_and_loaded(tmp_path, cache, monkeypatch):
    content = package()
    (tmp_path / "packed.tgz").write_bytes(content)
    monkeypatch.setattr(openseadragon, "INTEGRITY", openseadragon._integrity(content))
    assert openseadragon.load() is None
    script = f'echo "$@" > {tmp_path}/called; for last; do :; done; cp {tmp_path}/packed.tgz "$last/openseadragon.tgz"'
    npm(tmp_path / "bin", script, monkeypatch)
    target = openseadragon.fetch_package()
    assert target.is_relative_to(cache)
    called = (tmp_path / "called").read_text().split()
    assert called[:3] == ["pack", f"openseadragon@{openseadragon.VERSION}", "--ignore-scripts"]
    loaded = openseadragon.load()
    assert loaded == {"openseadragon.min.js": b"var OpenSeadragon;", "LICENSE.txt": b"BSD-3-Clause"}
    (tmp_path / "called").unlink()
    assert openseadragon.fetch_package() == target
    assert not (tmp_path / "called").exists(), "a cached package is not fetched again"


def test_another_package_is_refused_and_leaves_nothing(tmp_path, cache, monkeypatch):
    (tmp_path / "packed.tgz").write_bytes(package(b"alert(1)"))
    npm(tmp_path / "bin", f'for last; do :; done; cp {tmp_path}/packed.tgz "$last/openseadragon.tgz"', monkeypatch)
    with pytest.raises(DataError, match=r"is not openseadragon .* digest"):
        openseadragon.fetch_package()
    assert not list(cache.rglob("*.tgz"))


def test_a_changed_cache_is_not_served(cache):
    openseadragon.package_path().parent.mkdir(parents=True)
    openseadragon.package_path().write_bytes(package(b"alert(1)"))
    with pytest.raises(DataError, match="cfusion view --fetch"):
        openseadragon.load()
    viewer = Viewer(None, None)
    load_deep_zoom(viewer)
    assert viewer.deep_zoom == {}
    assert "digest" in viewer.deep_zoom_trouble


def test_a_failing_or_missing_npm_is_reported(tmp_path, cache, monkeypatch):
    npm(tmp_path / "bin", "echo 'E404 not found' >&2; exit 1", monkeypatch)
    with pytest.raises(CfusionError, match="E404 not found"):
        openseadragon.fetch_package()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(CfusionError, match="npm is not installed"):
        openseadragon.fetch_package()
    assert not cache.exists() or not list(cache.rglob("*.tgz"))
