"""`mlflow models serve` as a process on loopback: a bag in, risk and survival curve out."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow_server import wait_for
from spawn import free_port
from untrained_models import untrained

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.tracking.address import connect
from cfusion.tracking.model_registry import _signature, register_ensemble
from cfusion.training.seen import Seen, digest_case


def ask(url: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def grid(columns: int, rows: int) -> list[list[int]]:
    return [[column, row] for row in range(rows) for column in range(columns)]


def test_a_served_model_of_several_cohorts_needs_the_patients(tmp_path):
    from cfusion.apply.serving import ServedEnsemble

    folder = untrained(tmp_path / "run", grid="file", strata={"short": 1.0, "long": 3.0})
    served = ServedEnsemble()
    served.load_context(SimpleNamespace(artifacts={"folds": str(folder)}))
    rng = np.random.default_rng(0)
    bag = {name: rng.normal(size=(n, 8)).astype(np.float32) for name, n in (("x20", 32), ("x10", 8), ("x5", 2))}
    for name, times in (("short", 1.0), ("long", 3.0)):
        answer = served.predict(None, bag, {"cohort": name})
        expected = FoldEnsemble.load(folder).of_cohort(name).predict_bag(bag)
        np.testing.assert_array_equal(answer["survival"], expected["survival"])
        assert answer["months"].iloc[-1] == 200 * times
    with pytest.raises(MlflowException, match=r"the parameter cohort names none\. Give one of long, short\."):
        served.predict(None, bag)
    with pytest.raises(MlflowException, match=r"lng: the model was not trained on this cohort; it has long, short"):
        served.predict(None, bag, {"cohort": "lng"})


def test_a_served_patient_of_the_training_is_predicted_by_the_folds_that_have_not_seen_them(tmp_path):
    from cfusion.apply.serving import ServedEnsemble

    folder = untrained(tmp_path / "run", grid="file")
    first, second = FoldEnsemble.load(folder).models
    for model, patients in ((first, ("p-7", "p-8")), (second, ("p-8",))):
        seen = Seen(frozenset(map(digest_case, patients)), None)
        dataclasses.replace(model, seen=seen).save(tmp_path / "seen" / f"fold_{model.card.fold}" / "model")
    served = ServedEnsemble()
    served.load_context(SimpleNamespace(artifacts={"folds": str(tmp_path / "seen")}))
    rng = np.random.default_rng(0)
    bag = {name: rng.normal(size=(n, 8)).astype(np.float32) for name, n in (("x20", 32), ("x10", 8), ("x5", 2))}
    both, single = (FoldEnsemble(models).predict_bag(bag)["risk"].iloc[0] for models in ((first, second), (second,)))
    for slide, risk, unseen in (("p-7_a", single, 1), ("p-8", both, 0), ("p-70", both, 2), ("", both, 2)):
        answer = served.predict(None, bag, {"slide": slide})
        assert (answer["risk"].iloc[0], answer["unseen_folds"].iloc[0]) == (risk, unseen)


def test_only_a_served_model_of_several_cohorts_takes_a_cohort(tmp_path):
    joint, one = (
        FoldEnsemble.load(untrained(tmp_path / name, strata=strata)).models[0].card
        for name, strata in (("joint", {"short": 1.0, "long": 3.0}), ("one", {}))
    )
    assert [param.name for param in _signature(joint).params] == ["positions", "slide", "cohort"]
    assert [param.name for param in _signature(one).params] == ["positions", "slide"]


@pytest.mark.slow
def test_a_served_candidate_answers_a_bag_as_its_fold_models_do(tmp_path):
    folder = untrained(tmp_path / "run", grid="spatial")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    register_ensemble(client, client.create_run("0").info.run_id, folder, "served", {})
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/served@candidate", "--env-manager",
        "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # noqa: PTH120
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path}
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/ping", process, tmp_path / "serve.log")
        rng = np.random.default_rng(0)
        bag = {name: rng.normal(size=(n, 8)).astype(np.float32) for name, n in (("x20", 32), ("x10", 8), ("x5", 2))}
        positions = {"x20": grid(8, 4), "x10": grid(4, 2), "x5": grid(2, 1)}
        inputs = {name: values.tolist() for name, values in bag.items()}
        status, answer = ask(url, {"inputs": inputs, "params": {"positions": json.dumps(positions)}})
        assert status == 200, answer
        expected = FoldEnsemble.load(folder).predict_bag(bag, positions)
        rows = answer["predictions"]
        assert [row["months"] for row in rows] == expected["months"].tolist()
        np.testing.assert_allclose([row["survival"] for row in rows], expected["survival"], rtol=1e-6)
        assert rows[0]["risk"] == pytest.approx(expected["risk"].iloc[0], rel=1e-6)
        assert rows[0]["risk_sd"] == pytest.approx(expected["risk_sd"].iloc[0], rel=1e-6)
        lacking = {name: values.tolist() for name, values in bag.items() if name != "x5"}
        status, answer = ask(url, {"inputs": lacking})
        assert status == 400
        assert "x5" in json.dumps(answer)
        bag["x10"][3, 0] = np.nan
        damaged = {name: values.tolist() for name, values in bag.items()}
        status, answer = ask(url, {"inputs": damaged, "params": {"positions": json.dumps(positions)}})
        assert status == 400
        assert "features of x10: row 3, counted from 0, holds a value that is not finite" in answer["message"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
