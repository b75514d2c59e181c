"""Fixtures that every part of the tests may use."""

import gc
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_marker import asks_for_a_gpu
from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)
MATERIAL = Path(__file__).parent / "material"
TCGA = Path(__file__).parents[1] / "cfusion" / "study" / "tcga"
SHAPES_CHECKED = ("models", "data", "survival")
install_import_hook([f"cfusion.{package}" for package in SHAPES_CHECKED], "typechecker.check")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless their tests are asked for: several processes of one test cannot share one."""
    if not asks_for_a_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(FailuresAtOnce(config))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left with one of them at the end."""
    weights: Counter[Path] = Counter()
    for item in items:
        weights[item.path] += 60 if item.get_closest_marker("slow") or item.get_closest_marker("long") else 1
    items.sort(key=lambda item: (-weights[item.path], item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: tests of servers and of several processes wait a fifth of their time."""
    from cfusion.machine_limits import usable_cores

    return usable_cores() + 1


class FailuresAtOnce:
    """Names a failed test when it fails: a run that is ended from outside prints no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and (terminal := self.config.pluginmanager.get_plugin("terminalreporter")):
            terminal.write_line(f"\n{report.nodeid}: failed in {report.when}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check types and shapes in the tests of these packages; training with the checks takes three times as long."""
    shape_checks.update("jaxtyping_disable", item.path.parent.name not in SHAPES_CHECKED)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: each trained fold runs a full one."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End the run with what was skipped, one line a reason."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skipped")
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count:4}  {reason}")


@pytest.fixture(scope="session")
def tcga() -> Path:
    """The package's tables, folds and manifests of TCGA."""
    return TCGA


@pytest.fixture(scope="session")
def material() -> Path:
    """What the tests compare with: figures of the published program, published predictions. Its README has sources."""
    return MATERIAL


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of what is too large to travel with the repository: weights of the published program, real slides."""
    folder = Path(os.environ.get("CFUSION_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"shared material is not at {folder}; set CFUSION_SHARED to its folder")
    return folder


@pytest.fixture(autouse=True)
def _logging_stays_as_it_was() -> Iterator[None]:
    """A command run within a test logs to that test's output, which is closed when it ends, as loudly as asked."""
    yield
    from cfusion.console import ToTerminal

    for name in ("cfusion", "preprocess", "launch"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    for handler in logging.root.handlers[:]:
        if isinstance(handler, ToTerminal) or type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _environment_and_threads_stay_as_they_were() -> Iterator[None]:
    """MLflow sets its address, DeepSpeed a world of one, a sweep's worker its threads, and processes inherit it."""
    before = dict(os.environ)
    yield
    after = {name for name in os.environ | before if os.environ.get(name) != before.get(name)}
    for name in after - {"PYTEST_CURRENT_TEST"}:
        os.environ.pop(name, None)
        os.environ.update({name: before[name]} if name in before else {})
    if "torch" in sys.modules and (torch := sys.modules["torch"]).get_num_threads() != 1:
        torch.set_num_threads(1)
