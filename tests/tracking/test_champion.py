"""Test the rule of the registry: which version becomes champion, and the reasons it reports."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner
from untrained_models import cfusion, files, untrained  # noqa: F401 - fixtures

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.apply.sources import ShardSource
from cfusion.cli.main import app
from cfusion.cohort.slide_owners import SlideOwners
from cfusion.config import DataConfig, ParallelConfig
from cfusion.errors import CfusionError, ConfigError, DataError
from cfusion.tracking.address import connect
from cfusion.tracking.champion import compare_with_champion
from cfusion.tracking.model_registry import Contract, check_name, list_versions, model_address, register_ensemble
from cfusion.training.world import join_world


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch):
    """Undo the logging set-up of the command line, which here runs in the process of the tests."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return connect(f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}")


def predictions(noise: float, *, patients: int = 60, protocol: str = "strict", cohort: str = "made_up", seed: int = 0):
    """Make out-of-fold predictions whose risk is the log-hazard with noise."""
    rng = np.random.default_rng(11)
    hazard = rng.normal(size=patients)
    time = np.round(rng.exponential(size=patients) * 20 * np.exp(-hazard), 3) + 0.1
    risk = hazard + noise * np.random.default_rng(seed).normal(size=patients)
    return pd.DataFrame({
        "model": "amil", "cohort": cohort, "protocol": protocol, "seed": seed, "fold": np.arange(patients) % 3,
        "case_id": [f"PT-{i:03d}" for i in range(patients)], "risk": risk, "survival_months": time, "event": 1,
    })  # fmt: skip


@pytest.fixture
def version(client, tmp_path) -> Callable[..., str]:
    """Add a version with the given predictions; the newest is the candidate."""

    def add(name: str, table: pd.DataFrame, **tags: str) -> str:
        run = client.create_run("0")
        table.to_csv(tmp_path / "predictions.csv", index=False)
        client.log_artifact(run.info.run_id, str(tmp_path / "predictions.csv"))
        if not client.search_registered_models(f"name='{name}'"):
            client.create_registered_model(name)
        labels = {f"cfusion.{k}": v for k, v in {"contract": "made-up", **tags}.items()}
        made = client.create_model_version(name, run.info.artifact_uri, run.info.run_id, tags=labels)
        client.set_registered_model_alias(name, "candidate", made.version)
        return str(made.version)

    return add


def champion(client: MlflowClient, name: str) -> str | None:
    found = client.get_registered_model(name).aliases.get("champion")
    return None if found is None else str(found)


def call(client: MlflowClient, *arguments: str, **options: object):
    return CliRunner().invoke(app, [*arguments, "--uri", client.tracking_uri], **options)


@pytest.mark.slow
def test_a_better_version_on_the_same_patients_becomes_champion_and_says_why(client, version):
    version("rule", predictions(1.0, patients=200))
    first = call(client, "registry", "promote", "rule", "--yes")
    assert first.exit_code == 0, first.output
    assert "There is no champion to compare it with" in first.stdout
    assert "Its interval is above .5." in first.stdout
    assert champion(client, "rule") == "1"
    version("rule", predictions(0.3, patients=200, seed=1))
    output = call(client, "registry", "promote", "rule", "--yes").stdout
    lines = output.splitlines()
    assert lines[0].startswith("Version 2: strict C within folds 0.")
    assert lines[1].startswith("Champion 1: strict C within folds 0.")
    assert "on 200 patients of made_up with 200 events" in lines[1]
    assert lines[2].startswith("Higher: +0.")
    assert lines[3].startswith("Paired, within folds: +0.")
    assert lines[3].endswith(", statistically significant.")
    assert champion(client, "rule") == "2"
    assert client.get_model_version("rule", "2").tags["cfusion.promoted"] == " ".join(lines[:4])


@pytest.mark.slow
def test_the_difference_equals_that_of_the_two_scores(client, version):
    from cfusion.survival.score import score

    tables = [predictions(0.5), predictions(1.0, seed=3)]
    expected = [float(score(table, bootstrap=0).summary["cindex_within"].iloc[0]) for table in tables]
    version("scores", tables[0])
    call(client, "registry", "promote", "scores", "--yes")
    version("scores", tables[1])
    verdict = compare_with_champion(client, "scores", replicates=20)
    assert not verdict.passes
    assert f"strict C within folds {expected[1]:.3f} [" in verdict.reasons[0]
    assert verdict.reasons[2] == f"Not higher: {expected[1] - expected[0]:+.3f}."


def test_the_first_champion_is_better_than_chance(client, version):
    version("chance", predictions(30.0))
    result = call(client, "registry", "promote", "chance", "--yes")
    assert "Its interval is not above .5: not better than chance." in result.stdout
    assert isinstance(result.exception, ConfigError)
    assert champion(client, "chance") is None


@pytest.mark.parametrize(
    ("table", "tags", "reason"),
    [
        (predictions(0.1, protocol="published"), {}, "was scored under published, not strict"),
        (predictions(0.1), {"outcomes": "permuted"}, "was trained on permuted outcomes"),
        (predictions(0.1, cohort="other"), {}, "Not comparable: it was scored on other, champion 1 on made_up"),
        (predictions(0.1, patients=59), {}, "Not comparable: its patients are not those of champion 1"),
        (predictions(3.0, seed=5), {}, "Not higher"),
    ],
    ids=["protocol", "permuted", "cohort", "patients", "lower"],
)
def test_a_version_that_fails_the_rule_stays_a_candidate(client, version, request, table, tags, reason):
    name = f"claim-{request.node.callspec.id}"
    version(name, predictions(0.5))
    call(client, "registry", "promote", name, "--yes")
    version(name, table, **tags)
    result = call(client, "registry", "promote", name, "--yes")
    assert reason in result.stdout
    assert isinstance(result.exception, ConfigError)
    assert "version 2 does not become champion" in str(result.exception)
    assert champion(client, name) == "1"


def test_nothing_is_promoted_without_an_answer(client, version):
    version("asked", predictions(0.5))
    assert call(client, "registry", "promote", "asked", input="n\n").exit_code == 0
    assert champion(client, "asked") is None
    assert call(client, "registry", "promote", "asked", input="").exit_code != 0
    assert champion(client, "asked") is None
    assert call(client, "registry", "promote", "asked", input="y\n").exit_code == 0
    assert champion(client, "asked") == "1"
    assert "is already the champion" in call(client, "registry", "promote", "asked", "--yes").stdout


@pytest.mark.slow
def test_a_registered_ensemble_predicts_as_the_folder_it_came_from(client, cfusion, files, tmp_path):  # noqa: F811
    folder = untrained(tmp_path / "run")
    (folder / "predictions.csv").write_text("not a part of the model\n")
    run_id = client.create_run("0").info.run_id
    for _ in range(2):
        assert register_ensemble(client, run_id, folder, "complete", {"cohort": "made_up"}) == "1"
    (found,) = (v for v in list_versions(client) if v.name == "complete")
    assert found.aliases == ("candidate",)
    assert found.tags["contract"] == "made-up, 8 wide, at x20, x10, x5"
    out = tmp_path / "out.csv"
    model = ("--model", "models:/complete@candidate", "--uri", client.tracking_uri)
    cfusion("predict", files.shards, *model, "--out", out)
    source = ShardSource(DataConfig(shards=str(files.shards)))
    direct = FoldEnsemble.load(folder).predict(
        source, SlideOwners(lambda name: None).group(source.slide_ids), join_world(ParallelConfig())
    )
    np.testing.assert_allclose(pd.read_csv(out)["risk"], direct["risk"], rtol=1e-12)
    listed = call(client, "registry", "list").stdout
    assert "candidate" in listed
    assert "made-up, 8 wide, at x20, x10, x5" in listed
    with pytest.raises(DataError, match="has no version champion of a model complete"):
        cfusion("predict", files.shards, "--model", "models:/complete@champion", "--uri", client.tracking_uri, "--json")


def test_the_served_model_has_signature_example_encoder_and_time_bins(client, tmp_path, recwarn):
    import mlflow

    folder = untrained(tmp_path / "run", grid="file")
    run_id = client.create_run("0").info.run_id
    register_ensemble(client, run_id, folder, "described", {})
    assert not [warned for warned in recwarn if "type hints" in str(warned.message)]
    local = client.download_artifacts(run_id, "model", str(tmp_path))
    info = mlflow.models.get_model_info(local)
    assert [(i.name, i.shape, str(i.type)) for i in info.signature.inputs] == [
        (name, (-1, 8), "float32") for name in ("x20", "x10", "x5")
    ]
    assert [c.name for c in info.signature.outputs] == ["months", "survival", "risk", "risk_sd", "unseen_folds"]
    assert info.metadata["encoder"]["name"] == "made-up"
    assert info.metadata["edges_months"]["fold_0"] == [0.0, 6.0, 14.0, 30.0, 200.0]
    model = mlflow.pyfunc.load_model(local)
    answer = model.predict(model.input_example)
    assert answer["months"].tolist() == [6.0, 14.0, 15.0, 30.0, 31.0, 200.0]
    assert not list(Path(local).rglob("*.pkl")), "nothing is pickled"


def test_a_served_model_that_needs_positions_takes_them(tmp_path):
    from cfusion.apply.serving import ServedEnsemble

    folder = untrained(tmp_path / "run", grid="spatial")
    served = ServedEnsemble()
    served.load_context(SimpleNamespace(artifacts={"folds": str(folder)}))
    rng = np.random.default_rng(0)
    bag = {name: rng.normal(size=(n, 8)).astype(np.float32) for name, n in (("x20", 16), ("x10", 4), ("x5", 1))}
    square = {"x20": [[i % 4, i // 4] for i in range(16)], "x10": [[i % 2, i // 2] for i in range(4)], "x5": [[0, 0]]}
    moved = {**square, "x10": [[1, 1], [0, 1], [1, 0], [0, 0]]}
    risks = [
        served.predict(None, bag, {"positions": json.dumps(positions)})["risk"].iloc[0] for positions in (square, moved)
    ]
    assert risks[0] == FoldEnsemble.load(folder).predict_bag(bag, square)["risk"].iloc[0]
    assert risks[0] != risks[1], "where the tiles lie matters"
    damaged = {**bag, "x10": np.where(np.arange(4)[:, None] == 3, np.nan, bag["x10"]).astype(np.float32)}
    for given, where, message in (
        (bag, {**square, "x5": []}, "positions of x5: expected 1 pairs"),
        (bag, None, "grid: spatial needs the position"),
        (damaged, square, "features of x10: row 3, counted from 0, holds a value that is not finite"),
    ):
        with pytest.raises(MlflowException, match=message) as refused:
            served.predict(None, given, {"positions": json.dumps(where)})
        assert refused.value.get_http_status_code() == 400


def test_a_name_with_other_inputs_is_refused_and_both_are_named(client, version):
    version("taken", predictions(0.5), contract="uni, 1024 wide, at x20, x10, x5")
    with pytest.raises(ConfigError, match=r"reads uni, 1024 wide, at x20, x10, x5; this one reads made-up, 8 wide"):
        check_name(client, "taken", Contract("made-up", 8, ("x20", "x10", "x5")))
    client.create_registered_model("foreign")
    client.create_model_version("foreign", f"{client.get_experiment('0').artifact_location}/x")
    with pytest.raises(ConfigError, match="a model that cfusion did not register"):
        check_name(client, "foreign", Contract("made-up", 8, ("x20",)))
    check_name(client, "free", Contract("made-up", 8, ("x20",)))


@pytest.mark.parametrize("text", ["models:/a", "models:/a/b", "models:/@champion", "models:/a@b@c", "runs:/a/model"])
def test_an_address_that_names_no_version_is_refused(text):
    with pytest.raises(ConfigError, match="expected models:/NAME@ALIAS"):
        model_address(text)


def test_missing_registries_are_reported_and_not_created(client, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    errors = {
        ("registry", "list"): "No model registry is given",
        ("registry", "list", "--uri", f"sqlite:///{tmp_path / 'none.db'}"): "none.db: database file not found",
        ("registry", "promote", "nobody", "--uri", client.tracking_uri): "no version candidate of a model nobody",
        ("registry", "list", "--uri", "http://127.0.0.1:9"): "does not answer",
    }
    for arguments, words in errors.items():
        result = CliRunner().invoke(app, list(arguments))
        assert isinstance(result.exception, CfusionError), result.output
        assert words in str(result.exception)
    assert not (tmp_path / "none.db").exists()
