"""Lower never imports higher, and each heavy dependency has one door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p for top in ("cfusion", "preprocess", "launch") for p in (ROOT / top).rglob("*.py"))

LAYERS = (
    ("cfusion.errors",),
    ("cfusion.files", "cfusion.console", "cfusion.yaml_files"),
    ("cfusion.program",),
    ("cfusion.types",),
    ("cfusion.config",),
    ("cfusion.cohort", "cfusion.survival"),
    ("cfusion.data", "cfusion.models"),
    ("cfusion.training",),
    ("cfusion.tracking", "cfusion.apply", "cfusion.explanation", "cfusion.report", "cfusion.runs"),
    ("cfusion.view",),
    ("launch",),
    ("cfusion.doctor", "cfusion.demo"),
    ("cfusion.cli",),
)
PREPROCESS_MAY_IMPORT = (
    "cfusion.errors", "cfusion.files", "cfusion.console", "cfusion.types", "cfusion.config",
    "cfusion.data.store", "cfusion.data.shard_index", "cfusion.__version__",
)  # fmt: skip
DOORS = {
    "openslide": ("preprocess.slides", "preprocess.deepzoom"),
    "starlette": ("cfusion.view",),
    "uvicorn": ("cfusion.view",),
    "webdataset": ("cfusion.data",),
    "sksurv": ("cfusion.survival",),
    "accelerate": ("cfusion.training.runtime", "cfusion.training.zero"),
    "deepspeed": ("cfusion.training.zero",),
    "mlflow": ("cfusion.tracking", "cfusion.apply.serving"),
    "timm": ("preprocess.encoders",),
    "huggingface_hub": ("preprocess.encoders",),
    "typer": ("cfusion.cli",),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def layer(name: str) -> int | None:
    return next((i for i, group in enumerate(LAYERS) if within(name, *group)), None)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    own = layer(name)
    for imported in imports(path):
        if within(name, "preprocess"):
            if within(imported, "cfusion"):
                assert imported == "cfusion" or within(imported, *PREPROCESS_MAY_IMPORT), imported
        elif own is not None and (other := layer(imported)) is not None:
            assert other <= own, f"{name} imports {imported}, which is higher"
        if within(name, "cfusion.data"):
            assert not within(imported, "cfusion.models"), imported
        if within(name, "cfusion.models"):
            assert not within(imported, "cfusion.data"), imported


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_dependency_has_one_door(path):
    name = module_name(path)
    for imported in imports(path):
        for dependency, doors in DOORS.items():
            if within(imported, dependency):
                assert within(name, *doors), f"{name} imports {imported}; its door is {doors}"


def test_every_module_is_known_to_the_layers():
    known = ("cfusion", "cfusion.__main__")
    unknown = [
        n for n in map(module_name, MODULES) if n not in known and not within(n, "preprocess") and layer(n) is None
    ]
    assert not unknown
