"""Which program this is: a digest of the code that a run's numbers come from.

What decides is classified in `MODULES` and `_Normalised`; the documentation's table of a run's identity is made from
them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import sys
from pathlib import Path
from typing import NamedTuple

from cfusion.files import digest_json, user_cache, write_text

PACKAGE = Path(__file__).parent


class Modules(NamedTuple):
    """A module or package of `cfusion` and whether the numbers of a run come from it.

    Attributes:
        computes: Whether they do.
        what: What it does.
    """

    computes: bool
    what: str


MODULES = {
    "cohort": Modules(True, "reads patients and outcomes, audits them, draws the folds"),
    "config": Modules(True, "settings, their defaults, and which of them decide"),
    "data": Modules(True, "reads bags, orders and distributes them"),
    "gpu_settings": Modules(True, "whether products on a GPU use TF32, and how its memory grows"),
    "models": Modules(True, "networks"),
    "neighbours": Modules(True, "graphs of nearest tiles"),
    "runs": Modules(True, "a run, fold by fold, and its scores"),
    "runs.reproduction": Modules(False, "trains a finished run again and compares"),
    "survival": Modules(True, "time bins, losses, predictions, scores and intervals"),
    "survival.null": Modules(False, "simulated outcomes, reported with finished scores"),
    "survival.paired": Modules(False, "compares finished runs"),
    "survival.ranks": Modules(False, "ranks finished runs"),
    "training": Modules(True, "losses by step, choice of the epoch, processes, prediction of a fold"),
    "types": Modules(True, "cohorts, bags and folds as values"),
    "__init__": Modules(False, "names the public functions"),
    "__main__": Modules(False, "starts the command line"),
    "addresses": Modules(False, "keeps the secrets of addresses out of what is written"),
    "secret_text": Modules(False, "keeps the secrets of URLs out of texts"),
    "apply": Modules(False, "applies finished models to other slides"),
    "child_processes": Modules(False, "starts and ends processes of the program"),
    "cli": Modules(False, "commands"),
    "console": Modules(False, "progress on the terminal"),
    "demo": Modules(False, "the phantom cohorts of the demo"),
    "doctor": Modules(False, "checks the machine"),
    "errors": Modules(False, "errors and their texts"),
    "explanation": Modules(False, "explains finished models"),
    "extensions": Modules(False, "loads a model of your own, whose own digest decides"),
    "files": Modules(True, "writes complete files; its digests seed the first weights"),
    "interruption": Modules(False, "hears signals that ask a run to stop"),
    "locks": Modules(False, "keeps two processes from writing one folder"),
    "machine_limits": Modules(False, "counts the cores and memory that a process may use"),
    "program": Modules(False, "this digest"),
    "proposal": Modules(False, "proposes a configuration, whose values decide"),
    "recipe": Modules(False, "fills in the settings of a recipe, which decide as values of the configuration"),
    "report": Modules(False, "shows numbers"),
    "run_folder": Modules(False, "names of the files of a run's folder"),
    "study": Modules(False, "tables of the package, whose digests decide"),
    "tracking": Modules(False, "sends numbers"),
    "view": Modules(False, "shows slides and numbers"),
    "yaml_files": Modules(False, "reads the configuration, whose values decide"),
}
"""Modules below `cfusion`; the longest name that fits counts, and a module that none fits counts as computing."""

DIGITS = 10
"""Digits of the digest of the code."""

_DIGEST = re.compile(f"[0-9a-f]{{{DIGITS}}}")

TEXTS = (
    "comments, docstrings and layout",
    "texts in a `raise`, and of any call of an error or warning",
    "texts that are logged or shown as progress",
    "bodies of `__repr__`, `_repr_html_` and `describe`",
)
"""What of a computing module does not count, in words; `_Normalised` removes it."""

_SHOWN_METHODS = ("__repr__", "_repr_html_", "describe")
_SPEAKERS = ("logger", "logging", "warnings", "typer")
"""Objects whose methods say something."""
_SPOKEN = ("Error", "Warning", "progress", "Aside")
"""How the names of other functions end that say something."""


@functools.cache
def program_digest() -> str:
    """Digest of the code that computes, as it was at the first call, and of the version of torch."""
    import torch

    return digest_json([torch.__version__, code_digest()])


@functools.cache
def code_digest() -> str:
    """Digest of the code that a run's numbers come from: numbers, operators and names count, texts do not.

    Computing it takes longer than to start a small run, so it is kept in the user's cache by the bytes it comes from.
    """
    names = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    sources = {str(name): (PACKAGE / name).read_text(encoding="utf-8") for name in names if computes(name)}
    rules = Path(__file__).read_text(encoding="utf-8")
    kept = user_cache() / "code" / digest_json([sources, rules, sys.version_info[:2]])
    with contextlib.suppress(OSError):
        if _DIGEST.fullmatch(known := kept.read_text(encoding="ascii", errors="replace")):
            return known
    digest = digest_json([[name, _code(source)] for name, source in sources.items()])[:DIGITS]
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, digest)
    return digest


def computes(module: Path) -> bool:
    """Return whether the numbers of a run come from a module, given by its path below `cfusion`."""
    parts = module.with_suffix("").parts
    for length in range(len(parts), 0, -1):
        found = MODULES.get(".".join(parts[:length]))
        if found is not None:
            return found.computes
    return True


def _code(source: str) -> str:
    return ast.unparse(_Normalised().visit(ast.parse(source)))


class _Normalised(ast.NodeTransformer):
    """Removes from a module what only a reader sees: docstrings, messages, and what describes an object."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Also the text behind an attribute or a constant, which documents it.
            node.body = [part for part in node.body if not _is_text(part)]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.name in _SHOWN_METHODS:
            node.body = []
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return _Textless().visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return _Textless().visit(node) if _speaks(node.func) else self.generic_visit(node)


class _Textless(ast.NodeTransformer):
    """Empties every text, with what stands in its placeholders."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")


def _speaks(function: ast.expr) -> bool:
    """Whether a called function only says something: an error, a warning, a logger's method, the progress bar."""
    if isinstance(function, ast.Attribute):
        return isinstance(function.value, ast.Name) and function.value.id in _SPEAKERS
    return isinstance(function, ast.Name) and function.id.endswith(_SPOKEN)


def _is_text(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
