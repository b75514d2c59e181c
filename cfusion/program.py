"""Which program this is: digests of its source."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from cfusion.files import digest_file, digest_json

PACKAGE = Path(__file__).parent

SHOWS = ("cli", "explanation", "report", "tracking", "view")
"""Folders of what shows or sends numbers, and makes none."""


@functools.cache
def program_digest() -> str:
    """Digest of all source files, as they were at the first call, and of the version of torch."""
    import torch

    files = sorted(path for path in PACKAGE.rglob("*.py"))
    return digest_json([torch.__version__, [[str(f.relative_to(PACKAGE)), digest_file(f)] for f in files]])


@functools.cache
def code_digest() -> str:
    """Digest of the code that a run's numbers come from; comments, docstrings and layout are left out."""
    files = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
    return digest_json([[str(name), _code(path)] for name, path in files.items() if name.parts[0] not in SHOWS])[:10]


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Also the text behind an attribute or a constant, which documents it.
            node.body = [part for part in node.body if not _is_text(part)]
    return ast.unparse(tree)


def _is_text(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
