"""`cfusion mcp`, asked by a client of the same protocol."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import CohortFiles, make_cohort

from cfusion.cli.cmd_mcp import make_server
from cfusion.runs.crossval import cross_validate

mcp = pytest.importorskip("mcp")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


def asked(calls: dict[str, dict[str, Any]], server: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """The tools of a server, and what it answers to calls of them."""

    async def ask() -> tuple[list[Any], list[dict[str, Any]]]:
        async with asyncio.timeout(120), mcp.Client(server) as client:
            tools = (await client.list_tools()).tools
            answers = [await client.call_tool(name, arguments) for name, arguments in calls.items()]
            return tools, [json.loads(answer.content[0].text) for answer in answers]

    return asyncio.run(ask())


def test_each_tool_reads_what_its_command_shows(files, tmp_path):
    config = files.config(tmp_path / "runs" / "one", train={"epochs": 1})
    cross_validate(config)
    values = config.model_dump(mode="json", exclude_defaults=True)
    study, sweep = tmp_path / "study.yaml", tmp_path / "sweep.yaml"
    study.write_text(yaml.safe_dump(values))
    del values["output"]
    sweep.write_text(yaml.safe_dump({
        "name": "two", "output": str(tmp_path / "sweep"), "base": values, "axes": {"seed": [1, 2]},
    }))  # fmt: skip
    before = sorted(path for path in (tmp_path / "runs").rglob("*"))
    tools, (audit, plan, status, report) = asked({
        "audit": {"config": str(study)},
        "sweep_plan": {"file": str(sweep)},
        "sweep_status": {"file": str(sweep)},
        "read_report": {"runs": [str(config.output)]},
    }, make_server())  # fmt: skip
    assert {tool.name for tool in tools} >= {"inspect_store", "audit", "sweep_plan", "sweep_status", "read_report"}
    assert all(tool.annotations.read_only_hint and tool.description for tool in tools)
    assert audit["flow"][0]["patients"] == 48
    assert plan["counts"]["open"] == plan["runs"]["total"] == 2
    assert plan["missing"] == {}
    assert plan["estimate"]["runs"] == 2
    assert plan["estimate"]["steps"] > 0
    assert plan["estimate"]["hours"] is None, "no run is finished that would tell the time of a step"
    assert status["runs"] == {"total": 0, "shown": []}, "none has failed or runs"
    assert 0 < report[str(config.output)][0]["cindex_within"] < 1
    assert sorted(path for path in (tmp_path / "runs").rglob("*")) == before


def test_bad_input_is_answered_with_its_remedy(tmp_path):
    _, (store, report) = asked(
        {"inspect_store": {"folder": str(tmp_path / "nowhere")}, "read_report": {"runs": [str(tmp_path)]}},
        make_server(),
    )
    assert "nowhere" in store["error"]
    assert "is not the folder of a finished run. Give output folders" in report["error"]


@pytest.mark.slow
def test_the_command_speaks_the_protocol_on_standard_output(tmp_path: Path):
    from mcp.client.stdio import StdioServerParameters, stdio_client

    parameters = StdioServerParameters(command=sys.executable, args=["-m", "cfusion", "mcp"])
    tools, (answer,) = asked({"inspect_store": {"folder": str(tmp_path / "x")}}, stdio_client(parameters))
    assert len(tools) == 5
    assert "error" in answer
