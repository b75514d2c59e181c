"""Code that does not come with the program: a model in a user's file, and models and encoders of installed packages.

Code in a file is imported from the same bytes that its digest is computed from, under a private module name. Its folder
is not put on `sys.path` and no bytecode cache is read, so the digest says exactly which code runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.util
import re
import shlex
import sys
import traceback
import unicodedata
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from cfusion.errors import ConfigError, UntrustedCodeError, nearest
from cfusion.files import digest_file, digest_json

Group = Literal["cfusion.models", "cfusion.encoders"]

SHORTEST_PREFIX = 12
"""Number of digits of a SHA-256 that identify a file."""

_FILE = re.compile(r"(?P<path>.+\.py):(?P<attribute>[A-Za-z_]\w*)")
_OURS = ("cfusion", "preprocess", "launch")


@dataclass(frozen=True)
class OwnCode:
    """A class or function outside the program, and the code it is in.

    Attributes:
        name: Name in the configuration.
        attribute: Name of the class or function in its module.
        path: File of the module.
        digest: SHA-256 of that file.
        source: Its bytes; None for a module of an installed package, which is not saved with a model.
        package: Name and version of the installed distribution; empty for a file.
        module: Module of the installed package; empty for a file.
    """

    name: str
    attribute: str
    path: Path
    digest: str
    source: bytes | None = None
    package: tuple[str, str] | None = None
    module: str = ""

    @property
    def identity(self) -> dict[str, str]:
        """The record of this code in a run and in a model."""
        if self.package is None:
            return {"file": self.path.name, "attribute": self.attribute, "sha256": self.digest}
        distribution, version = self.package
        return {"distribution": distribution, "version": version, "sha256": self.digest}

    def load(self) -> Any:
        """Import the module and return the class or function.

        Raises:
            ConfigError: The module does not import or has no such attribute; the file and line are named.
        """
        try:
            module = self._imported()
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"{self.where(error)}: does not import ({type(error).__name__}: {error}).",
                "Correct the file; it must import without starting a training.",
                topic="own-model",
            ) from error
        found: Any = module
        for part in self.attribute.split("."):
            if not hasattr(found, part):
                known = [k for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
                raise ConfigError(f"{self.path}: defines no {self.attribute}.", nearest(self.attribute, known))
            found = getattr(found, part)
        if not callable(found):
            raise ConfigError(f"{self.path}: {self.attribute} is a {type(found).__name__}, not a class or function.")
        return found

    def where(self, error: BaseException) -> str:
        """File and line of an error: the innermost line of this file that it passed through, or only the file."""
        if isinstance(error, SyntaxError) and error.filename == str(self.path):
            return f"{self.path}:{error.lineno}"
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.path)]
        return f"{self.path}:{lines[-1]}" if lines else str(self.path)

    def _imported(self) -> ModuleType:
        if self.source is None:
            return importlib.import_module(self.module)
        name = f"_cfusion_own_{digest_json([str(self.path), self.digest])[:16]}"
        if name in sys.modules:
            return sys.modules[name]
        tree = ast.parse(self.source, filename=str(self.path))
        _refuse_siblings(self.path, tree)
        spec = importlib.util.spec_from_file_location(name, self.path, loader=_OneSource(self.path, self.source))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up while it is imported
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


class _OneSource(importlib.abc.SourceLoader):
    """Imports the bytes it was given; without a modification time, importlib neither reads nor writes bytecode."""

    def __init__(self, path: Path, source: bytes) -> None:
        self._path, self._source = str(path), source

    def get_filename(self, fullname: str) -> str:
        return self._path

    def get_data(self, path: str | bytes) -> bytes:
        return self._source


def _refuse_siblings(path: Path, tree: ast.Module) -> None:
    """Refuse imports of modules in the same folder: they are not in the digest and are not saved with the model."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = ["." if node.level else str(node.module)]
        for name in names:
            if name == "." or _is_in_folder(path, name.partition(".")[0]):
                raise ConfigError(
                    f"{path}:{node.lineno}: imports a module of its folder ({ast.unparse(node)}), which would not be "
                    "saved with the model.",
                    "Put the code into this one file, or into an installed package (entry point cfusion.models).",
                    topic="own-model",
                )


def _is_in_folder(path: Path, name: str) -> bool:
    folder = path.resolve().parent
    if name in _OURS or not ((folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()):
        return False
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return spec is None or any(place and folder in Path(place).resolve().parents for place in places)


def names_file(name: str) -> bool:
    """Return whether a name has the form `FILE.py:CLASS`."""
    return _FILE.fullmatch(name) is not None


def plain_name(name: str) -> str:
    """Return a name that can be part of a folder's name: `models/mine.py:MaxMIL` → `mine-MaxMIL`; others unchanged.

    Accents are dropped, and a hyphen stands for any other sign that folders of runs do not have.
    """
    match = _FILE.fullmatch(name)
    if match is None:
        return name
    text = unicodedata.normalize("NFKD", f"{Path(match['path']).stem}-{match['attribute']}")
    plain = re.sub(r"[^A-Za-z0-9._+=-]+", "-", text.encode("ascii", "ignore").decode())
    return plain.lstrip("._+=-")


def file_of(name: str) -> Path:
    """Return the file of a name `FILE.py:CLASS`, relative to the working folder like all paths of a configuration."""
    match = _FILE.fullmatch(name)
    assert match is not None
    return Path(match["path"])


def file_code(name: str, path: Path | None = None) -> OwnCode:
    """Read the code of a name `FILE.py:CLASS`.

    Args:
        name: The name.
        path: Read this file instead, such as the copy that was saved with a model.

    Raises:
        ConfigError: The file cannot be read.
    """
    match = _FILE.fullmatch(name)
    assert match is not None
    path = path or Path(match["path"])
    try:
        source = path.read_bytes()
    except OSError as error:
        neighbours = [p.name for p in sorted(path.parent.glob("*.py"))]
        hint = nearest(path.name, neighbours) if neighbours else ""
        raise ConfigError(
            f"model.name={name}: {path} cannot be read ({error.strerror}).",
            f"{hint} Give its path relative to the working folder.".strip(),
            topic="own-model",
        ) from error
    return OwnCode(name, match["attribute"], path, hashlib.sha256(source).hexdigest(), source)


def package_names(group: Group) -> list[str]:
    """Return the names that installed packages offer."""
    return sorted({entry.name for entry in entry_points(group=group)})


def package_code(group: Group, name: str) -> OwnCode | None:
    """Find the code of an entry point; None if no installed package offers the name.

    Raises:
        ConfigError: Two distributions offer the name, or the module of the entry point is missing.
    """
    found = list(entry_points(group=group, name=name))
    if not found:
        return None
    owners = [_distribution(entry) for entry in found]
    if len(found) > 1:
        raise ConfigError(
            f"{name}: {', '.join(f'{d} {v}' for d, v in owners)} all offer this name (entry point {group}).",
            "Uninstall all but one of them.",
            topic="own-model",
        )
    entry = found[0]
    try:
        spec = importlib.util.find_spec(entry.module)
    except Exception as error:  # a package's own __init__ may raise anything
        raise _broken(group, entry, f"{type(error).__name__}: {error}") from error
    if spec is None or spec.origin is None:
        raise _broken(group, entry, f"there is no module {entry.module}")
    path = Path(spec.origin)
    return OwnCode(name, entry.attr, path, digest_file(path), package=owners[0], module=entry.module)


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    dist = entry.dist
    return ("unknown", "unknown") if dist is None else (dist.name, dist.version)


def _broken(group: str, entry: EntryPoint, why: str) -> ConfigError:
    return ConfigError(
        f"{entry.name}: the entry point {group} of {' '.join(_distribution(entry))} cannot be loaded ({why}).",
        f"Install {_distribution(entry)[0]} again.",
        topic="own-model",
    )


def check_trusted(path: Path, digest: str, trust_code: str | None) -> None:
    """Refuse to run code that came with a model unless the user named its digest.

    Args:
        path: The file.
        digest: Its SHA-256.
        trust_code: The SHA-256 that the user trusts, or at least its first 12 digits.

    Raises:
        UntrustedCodeError: Nothing is trusted, or another digest is.
    """
    look = f"Read it (less {shlex.quote(str(path))}); if you trust it, add --trust-code {digest[:SHORTEST_PREFIX]}."
    if not trust_code:
        raise UntrustedCodeError(
            f"{path}: this model comes with its code, which runs only if you trust it (SHA-256 {digest}).",
            look,
        )
    if len(trust_code) < SHORTEST_PREFIX or not digest.startswith(trust_code.lower()):
        short = len(trust_code) < SHORTEST_PREFIX
        why = f"expected at least {SHORTEST_PREFIX} digits of it" if short else "you trust another file"
        raise UntrustedCodeError(f"{path}: has SHA-256 {digest}, but --trust-code is {trust_code}: {why}.", look)
