"""A node is lost: training goes on from the last checkpoint, with the numbers of an undisturbed run."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from elastic_run import PATIENCE, Agent, lose, numbers, planned, read_step, running, step_of, wait_for, workers_of
from factories import CohortFiles, make_cohort

from launch.cluster.cluster_plan import REQUEUE, LaunchPlan
from launch.cluster.local_agents import run_here, start_agents


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=36)


@pytest.mark.slow
def test_a_run_goes_on_with_the_nodes_that_are_left(files, tmp_path):
    disturbed = planned(files, tmp_path / "disturbed", nodes=2)
    assert disturbed.nnodes == "1:2"
    with running(start_agents(disturbed)) as agents:
        step, killed = lose(agents, 1, disturbed.output)
        wait_for(lambda: read_step(disturbed.output) > step, "training to go on", agents[0])
        print(f"{time.monotonic() - killed:.1f} s from the kill to the next step")
        assert agents[0].wait(PATIENCE) == 0
    assert numbers(disturbed.output) == undisturbed(files, tmp_path / "calm", step)


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Network namespaces with an address each, 10.77.0.1 and 10.77.0.2, joined by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (package iproute2)")
    names = [f"cf{os.getpid()}{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
    except subprocess.CalledProcessError as error:
        remove(names)
        pytest.skip(f"network namespaces cannot be made here ({error.stderr.decode().strip()})")
    for number, name in enumerate(names, start=1):
        ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", name)
        ip("-n", name, "link", "set", name, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names
    remove(names)


def remove(namespaces: list[str]) -> None:
    for name in namespaces:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def start_on(hosts: list[str], plan: LaunchPlan) -> list[Agent]:
    agents = []
    for node, host in enumerate(hosts):
        own = plan.agent(endpoint="10.77.0.1:29400", run_id="hosts", local_address=f"10.77.0.{node + 1}")
        variables = {**os.environ, **plan.environment(), "NODE_RANK": str(node), "GLOO_SOCKET_IFNAME": host}
        agents.append(subprocess.Popen(["ip", "netns", "exec", host, *own], env=variables, start_new_session=True))
    return agents


@pytest.mark.long
def test_a_run_goes_on_when_a_host_of_a_network_is_lost(files, tmp_path, two_hosts):
    disturbed = planned(files, tmp_path / "disturbed", nodes=2)
    with running(start_on(two_hosts, disturbed)) as agents:
        step, killed = lose(agents, 1, disturbed.output)
        wait_for(lambda: read_step(disturbed.output) > step, "training to go on", agents[0])
        print(f"{time.monotonic() - killed:.1f} s from the kill to the next step")
        assert agents[0].wait(PATIENCE) == 0
    assert numbers(disturbed.output) == undisturbed(files, tmp_path / "calm", step)


def undisturbed(files: CohortFiles, output: Path, step: int) -> dict[str, bytes]:
    """The numbers of a run of the same history of world sizes: two nodes to that step, then one."""
    assert run_here(planned(files, output, nodes=2, pause=0, stop_at=step)) == REQUEUE
    assert step_of(output) == step
    assert run_here(planned(files, output, nodes=1, pause=0)) == 0
    return numbers(output)


@pytest.mark.long
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


@pytest.mark.long
def test_a_single_process_that_dies_is_restarted_also_by_torchrun_without_a_plan(files, tmp_path):
    run = planned(files, tmp_path / "run", nodes=1)
    standalone = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", *run.command]
    agent = subprocess.Popen([sys.executable, "-m", "launch.torchrun", *standalone], start_new_session=True)
    with running([agent]):
        wait_for(lambda: read_step(run.output) >= 8, "the first steps", agent)
        workers_of(agent)[1].kill()
        assert agent.wait(PATIENCE) == 0
    assert len(numbers(run.output)) == 3


@pytest.mark.long
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


@pytest.mark.slow
def test_bad_input_is_reported_once_and_not_retried(files, tmp_path, capfd):
    plan = planned(files, tmp_path / "run", nodes=1)
    path = plan.output.with_suffix(".yaml")
    path.write_text(path.read_text().replace("encoder: made-up", "encoder: another"))
    assert run_here(plan) == 2
    assert capfd.readouterr().err.count("expected data.encoder=another") == 1
