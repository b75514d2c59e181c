"""A node is lost: training goes on from the last checkpoint, with the numbers of an undisturbed run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from factories import CohortFiles, make_cohort

from launch.cluster import REQUEUE, LaunchPlan, Resources, make_plan
from launch.cluster_local import run_here, start_agents

WORKER = Path(__file__).with_name("elastic_worker.py")
PATIENCE = 180.0
"""Seconds after which a test gives up waiting; no test's result hangs on how long something takes."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=36)


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
    plan = make_plan(path, [], Resources(nodes=nodes, gpus=0, cpus=1), python=sys.executable)
    return dataclasses.replace(plan, command=(str(WORKER), str(path), str(pause), str(stop_at)))


def step_of(output: Path) -> int:
    """Step of the checkpoint of the first fold, 0 before the first one."""
    found = 0
    for path in sorted(output.glob("checkpoints/fold_0/**/state.json")):
        with path.open() as stream:
            found = max(found, json.load(stream)["state"]["step"])
    return found


def wait_for(condition: Callable[[], bool], what: str, agent: "subprocess.Popen[bytes]") -> None:
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


def kill(agent: "subprocess.Popen[bytes]") -> None:
    """SIGKILL of an agent and all that it started, as a node loses its power."""
    family = [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]
    for process in family:
        process.kill()
    agent.wait()


@contextmanager
def running(agents: list["subprocess.Popen[bytes]"]) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Agents that are gone when the block ends, whatever happens in it."""
    try:
        yield agents
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill(agent)


def workers_of(agent: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    children = psutil.Process(agent.pid).children()
    return [child for child in children if str(WORKER) in " ".join(child.cmdline())]


def lose(agents: list["subprocess.Popen[bytes]"], lost: int, output: Path) -> tuple[int, float]:
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


@pytest.mark.slow
def test_a_run_goes_on_with_the_nodes_that_are_left(files, tmp_path):
    disturbed = planned(files, tmp_path / "disturbed", nodes=2)
    assert disturbed.nnodes == "1:2"
    with running(start_agents(disturbed)) as agents:
        step, killed = lose(agents, 1, disturbed.output)
        wait_for(lambda: read_step(disturbed.output) > step, "training to go on", agents[0])
        print(f"{time.monotonic() - killed:.1f} s from the kill to the next step")
        assert agents[0].wait(PATIENCE) == 0

    # The same history of world sizes, undisturbed: two nodes to that step, then one.
    assert run_here(planned(files, tmp_path / "calm", nodes=2, pause=0, stop_at=step)) == REQUEUE
    assert step_of(tmp_path / "calm") == step
    assert run_here(planned(files, tmp_path / "calm", nodes=1, pause=0)) == 0
    assert numbers(disturbed.output) == numbers(tmp_path / "calm")


@pytest.mark.slow
def test_a_run_waits_for_a_replacement_where_fewer_nodes_cannot_share_the_batch(files, tmp_path):
    disturbed = dataclasses.replace(planned(files, tmp_path / "disturbed", nodes=2), least_nodes=2)
    assert disturbed.nnodes == "2"
    with running(start_agents(disturbed)) as agents:
        step, killed = lose(agents, 1, disturbed.output)
        environment = {**os.environ, **disturbed.environment(), "NODE_RANK": "1"}
        agents.append(subprocess.Popen(agents[0].args, env=environment, start_new_session=True))
        wait_for(lambda: read_step(disturbed.output) > step, "training to go on", agents[0])
        print(f"{time.monotonic() - killed:.1f} s from the kill to the next step")
        assert [agents[0].wait(PATIENCE), agents[2].wait(PATIENCE)] == [0, 0]
    assert run_here(planned(files, tmp_path / "calm", nodes=2, pause=0)) == 0
    assert numbers(disturbed.output) == numbers(tmp_path / "calm")


@pytest.mark.slow
def test_the_first_node_is_not_survived_but_the_same_command_goes_on(files, tmp_path):
    plan = planned(files, tmp_path / "run", nodes=2)
    with running(start_agents(plan)) as agents:
        step, _ = lose(agents, 0, plan.output)
        assert agents[1].wait(PATIENCE) == 1
    assert step_of(plan.output) == step, "the checkpoint is as it was"
    assert run_here(plan) == 0


@pytest.mark.slow
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(files, tmp_path):
    plan = planned(files, tmp_path / "stopped", nodes=2)
    with running(start_agents(plan)) as agents:
        wait_for(lambda: read_step(plan.output) >= 8, "the first steps", agents[0])
        for agent in agents:  # as SLURM warns: every process of every node at once
            for process in [*psutil.Process(agent.pid).children(), psutil.Process(agent.pid)]:
                process.send_signal(signal.SIGUSR1)
        assert [agent.wait(PATIENCE) for agent in agents] == [REQUEUE, REQUEUE]
    assert not (plan.output / "done.json").exists()
    assert run_here(plan) == 0
    assert run_here(planned(files, tmp_path / "calm", nodes=2, pause=0)) == 0
    assert numbers(plan.output) == numbers(tmp_path / "calm")


def test_bad_input_is_told_once_and_not_tried_again(files, tmp_path, capfd):
    plan = planned(files, tmp_path / "run", nodes=1)
    path = plan.output.with_suffix(".yaml")
    path.write_text(path.read_text().replace("encoder: made-up", "encoder: another"))
    assert run_here(plan) == 2
    assert capfd.readouterr().err.count("not of data.encoder=another") == 1
