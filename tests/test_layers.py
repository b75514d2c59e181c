"""A lower layer never imports a higher one, and each heavy dependency has one door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p for top in ("cfusion", "preprocess", "launch") for p in (ROOT / top).rglob("*.py"))

LAYERS = (
    ("cfusion.errors", "cfusion.interruption", "cfusion.machine_limits"),
    ("cfusion.files", "cfusion.console", "cfusion.secret_text", "cfusion.child_processes", "cfusion.gpu_settings"),
    ("cfusion.addresses",),
    ("cfusion.locks", "cfusion.yaml_files", "cfusion.program", "cfusion.extensions", "cfusion.study"),
    ("cfusion.types", "cfusion.recipe", "cfusion.neighbours"),
    ("cfusion.config",),
    ("cfusion.run_folder", "cfusion.survival.bins"),
    ("cfusion.cohort", "cfusion.data", "cfusion.models"),
    ("cfusion.survival",),
    (
        "preprocess.settings", "preprocess.outcome", "preprocess.grid", "preprocess.names",
        "preprocess.descriptor", "preprocess.samples", "preprocess.tensor_files",
        "preprocess.inspection", "preprocess.gdc", "preprocess.phantom", "preprocess.pieces",
    ),
    ("preprocess.resolution", "preprocess.slide_headers", "preprocess.feature_files"),
    ("preprocess.slide_files", "preprocess.layouts", "preprocess.dicom_slides"),
    (
        "preprocess.slides", "preprocess.resample", "preprocess.encoders", "preprocess.packing", "preprocess.derive",
        "preprocess.slide_embeddings",
    ),
    (
        "preprocess.overview", "preprocess.import_levels", "preprocess.import_checks", "preprocess.ink",
        "preprocess.artefacts", "preprocess.plain_files",
    ),
    (
        "preprocess.importers", "preprocess.tissue", "preprocess.annotation", "preprocess.readers",
        "preprocess.regions", "preprocess.deepzoom",
    ),
    ("preprocess.slide_plan", "preprocess.withdrawal", "preprocess.merging"),
    ("preprocess.pipeline",),
    ("preprocess.extraction",),
    ("cfusion.training",),
    ("cfusion.training.group",),
    ("cfusion.apply", "cfusion.report"),
    ("cfusion.explanation", "cfusion.tracking", "cfusion.report.comparison"),
    ("cfusion.apply.loading", "cfusion.runs"),
    ("cfusion.apply.explain", "cfusion.apply.prediction"),
    ("cfusion.view", "cfusion.runs.external"),
    ("launch.tasks",),
    ("launch.cluster", "launch.sweep", "launch.extract"),
    ("launch.torchrun", "cfusion.doctor", "cfusion.demo", "cfusion.proposal"),
    ("cfusion.cli",),
    ("cfusion.__main__",),
)  # fmt: skip
"""A package or module imports itself and what stands in the lines above its own; the longest name that fits counts."""

ROOTS = ("cfusion", "cfusion.__version__", "preprocess", "launch")
"""The packages themselves, which hold the version and nothing that is imported with them."""

PREPROCESS_MAY_IMPORT = (
    "cfusion.errors", "cfusion.files", "cfusion.console", "cfusion.types", "cfusion.config", "cfusion.extensions",
    "cfusion.locks", "cfusion.machine_limits", "cfusion.gpu_settings",
    "cfusion.data.store", "cfusion.data.shard_index", "cfusion.data.tile_places", "cfusion.data.encoder_names",
    "cfusion.__version__",
)  # fmt: skip
DOORS = {
    "openslide": ("preprocess.slides", "preprocess.deepzoom", "preprocess.dicom_slides"),
    "wsidicom": ("preprocess.dicom_slides",),
    "starlette": ("cfusion.view",),
    "uvicorn": ("cfusion.view",),
    "webdataset": ("cfusion.data",),
    "sksurv": ("cfusion.survival",),
    "lifelines": ("cfusion.survival.regression",),
    "accelerate": ("cfusion.training.runtime", "cfusion.training.zero"),
    "deepspeed": ("cfusion.training.zero",),
    "mlflow": ("cfusion.tracking", "cfusion.apply.serving"),
    "timm": ("preprocess.encoders",),
    "triton": ("cfusion.models.depthwise_triton",),
    "huggingface_hub": ("preprocess.encoders",),
    "typer": ("cfusion.cli",),
    "optuna": ("cfusion.runs.search",),
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


def place(name: str) -> tuple[int, str] | None:
    """Line of LAYERS and entry there that a module, or a name in one, belongs to."""
    fitting = [(i, entry) for i, group in enumerate(LAYERS) for entry in group if within(name, entry)]
    return max(fitting, key=lambda found: len(found[1]), default=None)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    """At the top of a module and inside its functions."""
    name = module_name(path)
    if name in ROOTS:
        assert not list(imports(path)) or name == "cfusion", f"{name} is imported with each of its modules"
        return
    own = place(name)
    assert own is not None, f"{name} stands in no line of LAYERS"
    for imported in imports(path):
        if within(name, "preprocess") and within(imported, "cfusion"):
            assert imported == "cfusion" or within(imported, *PREPROCESS_MAY_IMPORT), imported
        if not within(imported, "cfusion", "preprocess", "launch") or imported in ROOTS:
            continue
        other = place(imported)
        assert other is not None, f"{imported} stands in no line of LAYERS"
        assert other[0] < own[0] or other == own, f"{name} imports {imported}, which is not below it"


def test_no_layer_is_out_of_date():
    names = [module_name(path) for path in MODULES]
    assert [entry for group in LAYERS for entry in group if not any(within(name, entry) for name in names)] == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_dependency_has_one_door(path):
    name = module_name(path)
    for imported in imports(path):
        for dependency, doors in DOORS.items():
            if within(imported, dependency):
                assert within(name, *doors), f"{name} imports {imported}; its door is {doors}"


def test_every_module_is_known_to_the_layers():
    names = map(module_name, MODULES)
    assert [name for name in names if name not in ROOTS and place(name) is None] == []
