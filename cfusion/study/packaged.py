"""Files shipped with the package, named `package:PATH`, the shipped configurations and published tables.

`package:tcga/clinical/tcga_blca.csv` means the same file in a clone and in an installed wheel. A setting of type
`DataPath` is resolved when the configuration is read and written back under that name, so that a run's
`config.yaml` holds no path of the machine that wrote it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, SerializerFunctionWrapHandler, WrapSerializer

from cfusion.errors import ConfigError, nearest, similar

PREFIX = "package:"
FOLDER = Path(__file__).parent
"""Folder that `package:` stands for."""

_IN_WHEEL = FOLDER.parent / "configs"


def find_data(path: Path) -> Path:
    """Resolve a path that begins with `package:`; any other path is returned as it is.

    Raises:
        ConfigError: The package has no such file or folder.
    """
    if not str(path).startswith(PREFIX):
        return path
    inside = str(path).removeprefix(PREFIX)
    found = FOLDER / inside
    if not found.resolve().is_relative_to(FOLDER) or not found.exists():
        known = [p.relative_to(FOLDER).as_posix() for p in sorted(FOLDER.glob("tcga/*/*"))]
        raise ConfigError(f"{path}: the package holds no {inside}.", nearest(inside, known))
    return found


def data_name(path: Path) -> str:
    """Name a path in files that travel: `package:PATH` for the package's own, else the path."""
    return f"{PREFIX}{path.relative_to(FOLDER).as_posix()}" if path.is_relative_to(FOLDER) else str(path)


def _write(path: Any, handler: SerializerFunctionWrapHandler) -> Any:
    return data_name(path) if isinstance(path, Path) and path.is_relative_to(FOLDER) else handler(path)


DataPath = Annotated[Path, AfterValidator(find_data), WrapSerializer(_write)]
"""A path of a setting; `package:PATH` names a file or folder of the package."""


def shipped_tables() -> dict[str, Path]:
    """The shipped tables of published results by name, such as `crossfusion-midl2026`."""
    return {path.stem: path for path in sorted((FOLDER / "published").glob("*.csv"))}


def shipped_configs() -> dict[str, Path]:
    """The shipped configurations by name, such as `tcga_blca` and `sweeps/published`."""
    folder = _IN_WHEEL if _IN_WHEEL.is_dir() else FOLDER.parents[1] / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def shipped_config(name: str) -> Path:
    """The file of a shipped configuration.

    Raises:
        ConfigError: There is none of this name.
    """
    known = shipped_configs()
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    if wanted not in known:
        raise ConfigError(f"{name}: no such shipped configuration.", nearest(wanted, known))
    return known[wanted]


def refuse_missing_config(path: Path) -> None:
    """Refuse the path of a configuration where nothing lies, and name the shipped one that may be meant.

    Raises:
        ConfigError: There is no such file.
    """
    if path.exists():
        return
    meant = similar(path.with_suffix("").as_posix().lower().removeprefix("configs/"), list(shipped_configs()))
    copy = f", or copy a shipped one: cfusion configs copy {meant}" if meant else ""
    raise ConfigError(f"{path}: no such file.", f"Give the path of a configuration{copy}.")
