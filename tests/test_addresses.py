"""A secret in an address is used and written nowhere."""

import logging
import pickle

import pytest
import yaml
from factories import make_cohort
from range_server import serving
from typer.testing import CliRunner

from cfusion.addresses import Address
from cfusion.cli.main import app
from cfusion.config import Config, load_config
from cfusion.errors import ConfigError
from cfusion.secret_text import SecretsLeftOut, hide_in, without_secrets
from cfusion.tracking.sender_process import end_sender
from launch.sweep.execute import Execution, run_all
from launch.sweep.markers import read_failure, write_failure
from launch.sweep.plan import SweepConfig, plan

SECRET = "s3cret"
ADDRESSES = (
    f"https://joe:{SECRET}@host/shards",
    f"https://{SECRET}@host:8443/shards/",
    f"https://host/shards?sv=1&sig={SECRET}%2B",
    f"s3://key:{SECRET}@bucket/shards",
    f"simplecache::https://joe:{SECRET}@host/shards",
    f"postgresql+psycopg://joe:{SECRET}@host/db?sslkey={SECRET}",
    f"HTTPS://joe:{SECRET}@host",
)


@pytest.mark.parametrize("text", ADDRESSES)
def test_no_form_of_an_address_shows_its_secret(text):
    address = Address.of(text)
    config = Config(data={"shards": text}, tracking={"uri": text})
    shown = [str(address), f"{address}", repr(address), repr(config), str(config), config.model_dump_json(),
             yaml.safe_dump(config.model_dump(mode="json")), str(config.deciding())]  # fmt: skip
    several = Config(data={"shards": ["shards", text]})
    shown += [repr(several), str(several), several.model_dump_json(), several.data.where, str(several.deciding())]
    assert not [form for form in shown if SECRET in form]
    assert "host" in str(address) or "bucket" in str(address)
    assert address.has_secret
    assert config.data.shards.reveal() == pickle.loads(pickle.dumps(config)).data.shards.reveal() == text


@pytest.mark.parametrize(
    "text", ["shards", "/data/a b/shards", "C:/x", "https://host/a@b/c", "abfss://box@account.dfs.core.windows.net/a"]
)
def test_an_address_without_a_secret_is_shown_as_it_is(text):
    assert str(Address.of(text)) == text
    assert not Address.of(text).has_secret


@pytest.mark.parametrize(
    "override",
    [f"data.shards={{a: https://joe:{SECRET}@host}}", f"data=https://joe:{SECRET}@host", f"data.sharsd=https://a:{SECRET}@h",
     f"tracking.uri={{a: 'https://joe:{SECRET}@host?b={SECRET}'}}", f"data.shards=https://joe:p@{SECRET}@h/x@y/z"],
)  # fmt: skip
def test_a_refused_setting_does_not_show_it(override):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert SECRET not in str(caught.value)


def test_texts_of_libraries_lose_it_too(tmp_path):
    error = f"ClientResponseError: 401, url='https://joe:{SECRET}@host/a?sig={SECRET}' (https://h/?k={SECRET})"
    assert without_secrets(error) == "ClientResponseError: 401, url='https://host/a' (https://h/"
    assert hide_in({"a": [f"https://{SECRET}@h", 3]}) == {"a": ["https://h", 3]}
    write_failure(tmp_path, error)
    assert SECRET not in str(read_failure(tmp_path))
    record = logging.LogRecord("cfusion", logging.INFO, "", 0, "asked %s", (f"http://a:{SECRET}@h",), None)
    assert SecretsLeftOut("%(message)s").format(record) == "asked http://h"


def test_a_sweep_refuses_to_write_it_for_other_processes(tmp_path):
    files = make_cohort(tmp_path / "data", patients=8)
    with serving(files.shards) as server:
        server.user = ("joe", SECRET)
        url = server.url.replace("//", f"//joe:{SECRET}@")
        base = {"cohort": {"table": str(files.table)}, "data": {"shards": url}}
        runs = plan(SweepConfig(name="s", output=tmp_path / "runs", base=base))
    assert not runs[0].absent
    assert SECRET not in str(runs)
    for execution in (Execution("slurm"), Execution(processes=2)):
        with pytest.raises(ConfigError, match=r"data\.shards=http://127.*netrc"):
            run_all(runs, execution, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_no_file_of_a_run_and_no_line_of_its_log_holds_it(tmp_path):
    files = make_cohort(tmp_path / "data", patients=24)
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(files.config(tmp_path / "runs" / "one").model_dump(mode="json")))
    with serving(files.shards) as server, serving(tmp_path / "nothing") as tracking:
        server.user, tracking.user = ("joe", SECRET), ("joe", SECRET)
        url, uri = (s.url.replace("//", f"//joe:{SECRET}@") for s in (server, tracking))
        overrides = [f"data.shards={url}", f"data.cache_directory={tmp_path / 'cache'}", "splits.folds=2",
                     "train.epochs=1", "tracking.enabled=true"]  # fmt: skip
        done = CliRunner().invoke(app, ["-v", "train", str(study), *overrides])
        assert done.exit_code == 0, done.output
        refused = CliRunner().invoke(
            app, ["-v", "train", str(study), *overrides, f"tracking.uri={uri}", f"output={tmp_path / 'runs' / 'two'}"]
        )
        end_sender()
    assert refused.exit_code == 0, refused.output
    assert "records of this run are unsent" in refused.output
    assert SECRET not in done.output + refused.output
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"report/index.html", "run.json", "config.yaml", "tracking.jsonl"} <= {
        str(path.relative_to(tmp_path / "runs" / "one")) for path in written if "one" in path.parts
    }
    assert any(path.suffix == ".db" for path in written)
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
