"""One plan, three renderings: each is what its scheduler takes, and the SLURM script is run for real on loopback."""

import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import kubernetes_validate
import psutil
import pytest
import yaml
from elastic_run import PATIENCE, numbers, planned, read_step, running, wait_for
from factories import CohortFiles, make_cohort
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.errors import CfusionError, CohortError, ConfigError
from launch.cluster.cluster_plan import MONITOR_SECONDS, RENDEZVOUS, LaunchPlan, LaunchResources, least_nodes, make_plan
from launch.cluster.kubernetes_job import K8sOptions, k8s_manifest
from launch.cluster.local_agents import run_code, run_here
from launch.cluster.slurm_job import SlurmOptions, slurm_script, submit_slurm

ROOT = Path(__file__).parents[2]
SBATCH_OPTIONS = set(
    re.findall(
        r"[a-z0-9-]+",
        """
        account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
        container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
        dependency distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid
        gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs
        input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu
        mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core
        ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable
        partition power prefer priority profile propagate qos quiet reboot requeue reservation resv-ports segment
        signal sockets-per-node spread-job stepmgr switches test-only thread-spec threads-per-core time time-min
        tmp tres-bind tres-per-task uid usage use-min-nodes verbose wait wait-all-nodes wckey wrap
        """,
    )
)
"""Long options of sbatch, from its manual page (SLURM 24.11)."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("cohort: {name: tcga_blca}\noutput: runs/blca\n")
    return path


def plan(config: Path, *overrides: str, engine: str | None = None, **resources) -> LaunchPlan:
    return make_plan(
        config, overrides, LaunchResources(**{"nodes": 2, "gpus": 8, **resources}), python="python", engine=engine
    )


@given(nodes=st.integers(1, 32), processes=st.integers(1, 8), share=st.integers(1, 8))
@settings(deadline=None)
def test_every_number_of_nodes_that_a_run_may_go_on_with_shares_the_batch(nodes, processes, share):
    batch = nodes * processes * share
    least = least_nodes(nodes, processes, batch)
    assert 1 <= least <= nodes
    assert all(batch % (m * processes) == 0 for m in range(least, nodes + 1))
    assert least == 1 or batch % ((least - 1) * processes)


def test_two_nodes_may_lose_one_and_four_may_not(config):
    assert plan(config).nnodes == "1:2"
    assert plan(config, nodes=4).nnodes == "4", "3 nodes of 8 cannot share 32"


@pytest.mark.parametrize(
    ("overrides", "resources", "message"),
    [
        (["train.epoch=3"], {}, r"unknown key train\.epoch\. Did you mean train\.epochs"),
        ([], {"nodes": 3}, r"global_batch=32 cannot be shared by 24 processes.*global_batch=24"),
        (["parallel.global_batch=16"], {"processes": 5}, r"cannot be shared by 10 processes"),
        (["tracking.uri=https://me:word@host"], {}, "holds a password"),
    ],
)
def test_what_a_process_would_refuse_is_refused_before_anything_is_submitted(config, overrides, resources, message):
    with pytest.raises(ConfigError, match=message):
        plan(config, *overrides, **resources)


def test_the_engine_and_the_tracking_server_reach_the_processes(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    made = plan(config, engine="zero2")
    assert made.command[-1] == "parallel.engine=zero2"
    assert made.environment()["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    with pytest.raises(ConfigError, match=r"parallel\.engine"):
        plan(config, engine="zero9")


def test_without_gpus_the_cpu_computes_where_there_are_some_too(config):
    assert plan(config, gpus=0).environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in plan(config).environment()


def directives(script: str) -> dict[str, str]:
    found = [
        line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if line.startswith("#SBATCH")
    ]
    return {key: value for key, _, value in found}


def test_the_sbatch_script_asks_for_what_the_plan_says(config, tmp_path):
    extra = {"mem": "0", "constraint": "a100"}
    options = SlurmOptions("gpu", "lab", extra, ("module load cuda",), "a.sqsh", ("/data",))
    script = slurm_script(plan(config, "cohort.name=it's", hours=1.5), options)
    asked = directives(script)
    assert set(asked) <= SBATCH_OPTIONS
    assert asked | {"output": ""} == {
        "job-name": "cfusion-it-s-crossfusion", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8",
        "cpus-per-task": "64", "time": "01:30:00", "signal": "USR1@120", "requeue": "", "no-kill": "",
        "open-mode": "append", "output": "", "partition": "gpu", "account": "lab", "mem": "0", "constraint": "a100",
    }  # fmt: skip
    assert "array" not in asked
    assert '--container-image=a.sqsh "--container-mounts=$PWD:$PWD,/data:/data" "--container-workdir=$PWD"' in script
    assert re.search(r"^srun .*--cpus-per-task=64", script, re.M), "srun does not take it from sbatch"
    path = tmp_path / "job.sbatch"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_job_that_cannot_lose_a_node_is_ended_and_requeued_by_slurm_itself(config):
    assert "no-kill" not in slurm_script(plan(config, nodes=4), SlurmOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SlurmOptions(extra={"mem": "0\n#SBATCH --wrap=x"}), "holds a line break"),
        (SlurmOptions(setup=("true\nrm -r x",)), "holds a line break"),
        (SlurmOptions(extra={"nodes": "9"}), "nodes follows from the plan"),
        (SlurmOptions(extra={"mem 4": "9"}), "not an option of sbatch"),
        (SlurmOptions(image="a", mounts=('/x" --uid=0 "',)), "expected a folder or FOLDER:WHERE"),
        (SlurmOptions(image="a", mounts=("data",)), "expected a folder or FOLDER:WHERE"),
        (SlurmOptions(mounts=("/data",)), "--mount needs the --image"),
    ],
)
def test_an_option_that_breaks_out_of_its_line_is_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        slurm_script(plan(config), options)


FAKES = {
    "sbatch": """
        text = open(sys.argv[1]).read()
        own = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
        log = open(own["output"].replace("%x", own["job-name"]).replace("%j", "4711"), "a")
        environment = {**os.environ, "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[0-1]"}
        for start in range(3):
            environment |= {"SLURM_NNODES": own["nodes"], "SLURM_RESTART_COUNT": str(start)}
            code = subprocess.run(["bash", sys.argv[1]], env=environment, stdout=log, stderr=log).returncode
            print("Submitted batch job 4711, left with", code)
            if not os.path.exists("requeued"):
                break
            os.remove("requeued")
        """,
    "srun": """
        command = sys.argv[1:]
        while command[0].startswith("--"):
            command.pop(0)
        nodes = [
            subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)})
            for node in range(int(os.environ["SLURM_NNODES"]))
        ]
        codes = [node.wait() for node in nodes]
        sys.exit(max(code if code >= 0 else 128 - code for code in codes))
        """,
    "scontrol": """
        if sys.argv[1] == "requeue":
            open("requeued", "w").close()
        else:
            assert sys.argv[1:] == ["show", "hostnames", "n[0-1]"]
            print("localhost\\nlocalhost")
        """,
}
"""A SLURM of this machine: two tasks are two nodes, and a job that is queued again starts at once."""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in FAKES.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\nimport os, re, subprocess, sys\n{textwrap.dedent(body)}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=36)


@pytest.mark.slow
def test_a_job_that_is_warned_saves_queues_itself_again_and_ends_as_if_undisturbed(files, tmp_path, slurm):
    job = planned(files, tmp_path / "job", nodes=2)
    (tmp_path / "job.sbatch").write_text(slurm_script(job, SlurmOptions()))
    job.output.mkdir()
    submitted = subprocess.Popen([str(slurm / "sbatch"), "job.sbatch"], stdout=subprocess.PIPE)
    with running([submitted]):
        wait_for(lambda: read_step(job.output) >= 8, "the first steps", submitted)
        (srun,) = [p for p in psutil.Process(submitted.pid).children(recursive=True) if p.name() == "srun"]
        for process in srun.children(recursive=True):  # SLURM signals every process of the step
            process.send_signal(signal.SIGUSR1)
        log, _ = submitted.communicate(timeout=PATIENCE)
    assert re.findall(r"left with (\d+)", log.decode()) == ["75", "0"], (job.output / "slurm-4711.out").read_text()
    assert (job.output / "done.json").exists()
    assert run_here(planned(files, tmp_path / "calm", nodes=2, pause=0)) == 0
    assert numbers(job.output) == numbers(tmp_path / "calm")


@pytest.mark.slow
def test_a_job_whose_input_is_bad_is_not_queued_again(files, tmp_path, slurm):
    job = planned(files, tmp_path / "job", nodes=2)
    Path(job.command[1]).write_text("data: {shards: nowhere}\n")
    job.output.mkdir(parents=True)
    (job.output / "done.json").write_text("{}")  # of another run
    log = submit_slurm(slurm_script(job, SlurmOptions()), tmp_path / "job.sbatch")
    assert re.findall(r"left with (\d+)", log) == ["2"], (job.output / "slurm-4711.out").read_text()


def test_sbatch_that_is_missing_or_refuses_is_reported(config, slurm, monkeypatch):
    script = slurm_script(plan(config), SlurmOptions())
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'Invalid account' >&2\nexit 1\n")
    with pytest.raises(CfusionError, match=r"sbatch refused job\.sbatch: Invalid account"):
        submit_slurm(script, Path("job.sbatch"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch is not on the PATH"):
        submit_slurm(script, Path("other.sbatch"))
    assert not Path("other.sbatch").exists()


@pytest.mark.parametrize(("state", "refused"), [("PENDING", True), ("RUNNING", True), ("COMPLETED", False)])
def test_a_run_that_is_queued_or_running_is_not_submitted_again(config, slurm, tmp_path, state, refused):
    (slurm / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 12\n")
    (slurm / "squeue").write_text(f"#!/bin/sh\necho '11|{state}|{tmp_path}/job.sbatch'; echo '10|RUNNING|other'\n")
    (slurm / "squeue").chmod(0o755)
    script = slurm_script(plan(config), SlurmOptions())
    if refused:
        with pytest.raises(CfusionError, match=rf"queue already: job 11 \({state}\)\. .*scancel 11\."):
            submit_slurm(script, Path("job.sbatch"))
        assert not Path("job.sbatch").exists()
    else:
        assert submit_slurm(script, Path("job.sbatch")) == "Submitted batch job 12"


def test_the_command_says_where_the_log_and_the_script_of_the_job_are(files, slurm, tmp_path):
    (slurm / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 12\n")
    folder, written = tmp_path / "job", tmp_path / "job.yaml"
    written.write_text(yaml.safe_dump(files.config(folder).model_dump(mode="json")))
    done = CliRunner().invoke(app, ["launch", "slurm", str(written), "--gpus", "0", "--name", "mine"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "Submitted batch job 12", f"script: {folder}/mine.sbatch", f"log: {folder}/slurm-12.out"
    ]  # fmt: skip


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("options", [K8sOptions("cfusion:1", "data"), K8sOptions("cfusion:1", "d", "/data", "mlflow")])
def test_the_manifest_fits_the_schema_of_kubernetes(config, nodes, options):
    service, job = yaml.safe_load_all(k8s_manifest(plan(config, nodes=nodes), options))
    for document in (service, job):
        kubernetes_validate.validate(document, "1.33", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": {**job["spec"], "completion": 2}}, "1.33", strict=True)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == nodes
    assert pod["subdomain"] == service["metadata"]["name"], "pods find each other by the service's name"
    endpoint = pod["containers"][0]["command"][pod["containers"][0]["command"].index("--rdzv-endpoint") + 1]
    assert endpoint.split(":")[0] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_kubernetes_starts_again_what_wants_it_and_nothing_else(config):
    job = list(yaml.safe_load_all(k8s_manifest(plan(config), K8sOptions("cfusion:1", "data"))))[1]
    rules = {
        rule["action"]: rule.get("onExitCodes", {}).get("values")
        for rule in job["spec"]["podFailurePolicy"]["rules"][:2]
    }
    assert rules == {"FailJob": [2, 3], "Ignore": [75]}
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never", "as podFailurePolicy needs it"


def test_kubernetes_ends_a_job_only_after_hours_that_were_given(config):
    def deadline(**resources: float) -> int | None:
        manifest = k8s_manifest(plan(config, **resources), K8sOptions("cfusion:1", "data"))
        return list(yaml.safe_load_all(manifest))[1]["spec"].get("activeDeadlineSeconds")

    assert [deadline(hours=1.5), deadline(hours=0.0)] == [5400, None]


def test_a_lost_node_is_noticed_and_no_longer_waited_for_within_ten_seconds():
    """With the start of Python and the last checkpoint that is within 15 s of it; torch's own settings take 46."""
    silent = RENDEZVOUS["keep_alive_interval"] * RENDEZVOUS["keep_alive_max_attempt"]
    assert silent + MONITOR_SECONDS + RENDEZVOUS["last_call_timeout"] <= 10


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([0, -9], 0), ([75, 75], 75), ([75, 2], 2), ([1, -9], 1), ([-9, -9], 1)]
)
def test_the_nodes_codes_make_one(codes, code):
    assert run_code(codes) == code


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["slurm", "--gpus", "8", "--partition", "gpu"], "#SBATCH --partition=gpu"),
        (["k8s", "--image", "cfusion:1", "--claim", "data"], "kind: Job"),
        (["slurm", "--image", "a.sqsh"], "\n    python -P -m launch.torchrun"),
        (["local", "--processes", "2"], "--nproc-per-node 2"),
    ],
)
def test_a_dry_run_shows_and_writes_what_would_be_started(files, tmp_path, arguments, expected):
    config = tmp_path / "run.yaml"
    values = files.config(Path("runs/blca"), parallel={"global_batch": 32}).model_dump(mode="json")
    config.write_text(yaml.safe_dump(values))
    out = tmp_path / "out" / "job"
    result = CliRunner().invoke(
        app, ["launch", *arguments, str(config), "train.epochs=2", "--nodes", "2", "--dry-run", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert expected in result.output
    assert out.read_text() == result.stdout
    assert "train.epochs=2" in result.output


def test_a_job_whose_data_would_be_refused_is_shown_and_not_submitted(config, slurm, tmp_path):
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(app, ["launch", "slurm", str(config), *more])
        assert isinstance(result.exception, CohortError)
        assert ("#SBATCH --output=runs/blca/slurm-%j.out" in result.output) == bool(more)
    assert not (tmp_path / "runs").exists()


def test_the_options_of_a_site_hold_for_every_job(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profile = tmp_path / "cfusion" / "cluster.yaml"
    profile.parent.mkdir()
    profile.write_text("account: lab\npartition: cpu\nsetup: [module load a]\nsbatch: {mail-type: END, no-kill: }\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(files.config(tmp_path / "run").model_dump(mode="json")))
    given = ["--partition", "gpu", "--qos", "long", "--constraint", "a100", "--exclusive", "--mem", "64", "--setup",
             "module load b", "--sbatch", "mail-type=FAIL", "--sbatch", "--contiguous"]  # fmt: skip
    arguments = ["launch", "slurm", str(tmp_path / "run.yaml"), "--gpus", "0", *given, "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    asked = directives(result.stdout)
    assert asked.items() >= {
        "account": "lab", "partition": "gpu", "qos": "long", "constraint": "a100", "exclusive": "", "mem": "64G",
        "mail-type": "FAIL", "no-kill": "", "contiguous": "",
    }.items()  # fmt: skip
    assert result.stdout.index("module load a") < result.stdout.index("module load b")
    profile.write_text("acount: lab\n")
    result = CliRunner().invoke(app, arguments)
    assert "cluster.yaml: unknown key acount. Did you mean account?" in str(result.exception)
