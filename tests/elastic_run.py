"""Runs on nodes that a test may lose: agents on loopback whose processes save at every step and take their time."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml
from factories import CohortFiles

from launch.cluster.cluster_plan import LaunchPlan, LaunchResources, make_plan

WORKER = Path(__file__).with_name("elastic_worker.py")
PATIENCE = 180.0
"""Seconds after which a test gives up waiting; no test's result hangs on how long something takes."""

Agent = subprocess.Popen[bytes]


def planned(
    files: CohortFiles, output: Path, *, nodes: int, global_batch: int = 4, pause: float = 0.05, stop_at: int = 0
) -> LaunchPlan:
    """A run of two folds, about 50 steps each, one process a node."""
    config = files.config(
        output,
        splits={"folds": 2},
        train={"epochs": 12, "micro_batch": 1},
        parallel={"global_batch": global_batch},
        evaluation={"protocol": "fixed-epoch", "bootstrap": 0},
    )
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    plan = make_plan(path, [], LaunchResources(nodes=nodes, gpus=0, cpus=1), python=sys.executable)
    return dataclasses.replace(plan, command=(str(WORKER), str(path), str(pause), str(stop_at)))


def step_of(output: Path) -> int:
    """Step of the checkpoint of the first fold, 0 before the first one."""
    found = 0
    for path in sorted(output.glob("checkpoints/fold_0/**/state.json")):
        with path.open() as stream:
            found = max(found, json.load(stream)["state"]["step"])
    return found


def wait_for(condition: Callable[[], bool], what: str, agent: Agent) -> None:
    """Wait as long as `agent` lives, which has to bring the condition about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s for {what}"
        assert agent.poll() is None, f"left with {agent.poll()} while the test waited for {what}"
        time.sleep(0.02)


def read_step(output: Path) -> int:
    """Like `step_of`, between the writes of a process that may be writing."""
    try:
        return step_of(output)
    except (OSError, ValueError):
        return 0


def kill(agent: Agent) -> None:
    """SIGKILL of an agent and all that it started, as a node loses its power."""
    family = [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]
    for process in family:
        process.kill()
    agent.wait()


@contextmanager
def running(agents: list[Agent]) -> Iterator[list[Agent]]:
    """Agents that are gone when the block ends, whatever happens in it."""
    try:
        yield agents
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill(agent)


def workers_of(agent: Agent) -> list[psutil.Process]:
    children = psutil.Process(agent.pid).children()
    return [child for child in children if str(WORKER) in " ".join(child.cmdline())]


def lose(agents: list[Agent], lost: int, output: Path) -> tuple[int, float]:
    """Kill a node in mid-training; returns the step of the last checkpoint and the time of the kill."""
    survivor = agents[1 - lost]
    wait_for(lambda: read_step(output) >= 8, "the first steps", survivor)
    left = workers_of(survivor)
    kill(agents[lost])
    killed = time.monotonic()
    wait_for(lambda: not any(w.is_running() and w.status() != "zombie" for w in left), "the other to notice", survivor)
    return step_of(output), killed


def numbers(output: Path) -> dict[str, bytes]:
    """What a run leaves behind that has to be the same."""
    paths = [output / "predictions.csv", *sorted(output.glob("fold_*/model/model.safetensors"))]
    assert len(paths) == 3
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}
