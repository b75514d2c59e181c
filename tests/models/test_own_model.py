"""Models that do not come with the program: in a user's file, or of an installed package."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from factories import CohortFiles, make_cohort

from cfusion import extensions
from cfusion.apply.ensemble import FoldEnsemble
from cfusion.config import Config
from cfusion.errors import ConfigError, DataError, RequeueError, UntrustedCodeError
from cfusion.models.registry import build_model, model_code
from cfusion.run_folder import fold_folders
from cfusion.runs import crossval
from cfusion.runs.crossval import cross_validate
from cfusion.runs.reproduction import reproduce_run
from cfusion.training.consolidation import consolidate
from cfusion.training.fitted import FittedModel
from cfusion.training.model_check import check_own_model

MAX_MIL = '''"""The riskiest tile decides."""

from torch import nn

from cfusion.models.baselines import FinestBagModel
from cfusion.types import SurvivalOutput

class MaxMIL(FinestBagModel):
    def __init__(self, *, backbone_dim, n_bins, embed_dim, magnifications, slope: float = 0.0):
        super().__init__(backbone_dim, magnifications)
        self.embed = nn.Sequential(nn.Linear(backbone_dim, embed_dim), nn.LeakyReLU(slope))
        self.head = nn.Linear(embed_dim, n_bins)

    def survival_of(self, tiles, mask):
        hidden = self.embed(tiles)
        if mask is not None:
            hidden = hidden.masked_fill(~mask[..., None], float("-inf"))
        return SurvivalOutput.from_logits(self.head(hidden.amax(dim=1)))
'''

PLAIN = """from torch import nn
from cfusion.types import SurvivalOutput

class Plain(nn.Module):
    def __init__(self, backbone_dim, n_bins):
        super().__init__()
        self.head = nn.Linear(backbone_dim, n_bins)

    def forward(self, bags):
        return SurvivalOutput.from_logits(self.head(bags.features["x20"].mean(dim=1)))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=40)


def configured(files: CohortFiles, source: str, folder: Path, name: str = "MaxMIL", **sections) -> Config:
    file = folder / "mine.py"
    file.write_text(source)
    model = {"name": f"{file}:{name}", "embed_dim": 16, "num_heads": 2, **sections.pop("model", {})}
    train = {"epochs": 2, "patience": None, "micro_batch": 4, **sections.pop("train", {})}
    return files.config(folder / "run", model=model, train=train, **sections)


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "mine.py").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("trained")
    config = configured(files, MAX_MIL, folder, tracking={
        "enabled": True, "uri": f"sqlite:///{folder / 'mlflow.db'}", "experiment": "own", "register_as": "own",
    })  # fmt: skip
    cross_validate(config)
    return config


def bag(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(n, 8)).astype(np.float32) for name, n in (("x20", 16), ("x10", 4), ("x5", 1))}


@pytest.mark.slow
def test_the_file_travels_with_every_fold_and_with_its_digest(trained):
    folder = trained.output.parent
    for fold in range(3):
        model = trained.output / f"fold_{fold}" / "model"
        assert (model / "model.py").read_text() == MAX_MIL
        card = json.loads((model / "model.json").read_text())
        assert card["code"] == {"file": "mine.py", "attribute": "MaxMIL", "sha256": digest_of(folder)}
    provenance = json.loads((trained.output / "run.json").read_text())["provenance"]
    assert provenance["model_code"]["sha256"] == digest_of(folder)


@pytest.mark.slow
def test_a_model_elsewhere_runs_only_when_its_digest_is_trusted(trained, tmp_path, monkeypatch):
    folder = trained.output.parent
    monkeypatch.chdir(tmp_path)
    digest = digest_of(folder)
    model = trained.output / "fold_0" / "model"
    with pytest.raises(UntrustedCodeError) as refused:
        FittedModel.load(model)
    assert str(model / "model.py") in refused.value.message
    assert digest in refused.value.message
    assert f"--trust-code {digest[:12]}" in refused.value.remedy
    assert refused.value.topic == "trust-code"
    with pytest.raises(UntrustedCodeError, match=rf"has SHA-256 {digest}, but --trust-code is {'0' * 64}"):
        FittedModel.load(model, trust_code="0" * 64)
    with pytest.raises(UntrustedCodeError, match="at least 12 digits"):
        FittedModel.load(model, trust_code=digest[:11])
    long, short = (FoldEnsemble.load(trained.output, trust_code=d).predict_bag(bag()) for d in (digest, digest[:12]))
    pd.testing.assert_frame_equal(long, short)


@pytest.mark.slow
def test_an_edited_copy_is_refused_whatever_is_trusted(trained, tmp_path):
    import shutil

    model = shutil.copytree(trained.output / "fold_0" / "model", tmp_path / "model")
    before = digest_of(trained.output.parent)
    (model / "model.py").write_text(MAX_MIL + "\nprint('edited')\n")
    now = hashlib.sha256((model / "model.py").read_bytes()).hexdigest()
    with pytest.raises(UntrustedCodeError, match="you trust another file"):
        FittedModel.load(model, trust_code=before)
    with pytest.raises(DataError, match=f"was edited after the model was saved: SHA-256 {now}, recorded {before}"):
        FittedModel.load(model, trust_code=now)
    (model / "model.py").unlink()
    with pytest.raises(DataError, match=r"model.py: is missing"):
        FittedModel.load(model, trust_code=before)


@pytest.mark.slow
def test_a_card_cannot_point_to_code_that_it_does_not_record(trained, tmp_path):
    import shutil

    model = shutil.copytree(trained.output / "fold_0" / "model", tmp_path / "model")
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    card = json.loads((model / "model.json").read_text())
    card["model"]["name"] = f"{tmp_path / 'evil.py'}:MaxMIL"
    del card["code"]
    (model / "model.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match="which is not one of the program, and records no code"):
        FittedModel.load(model, trust_code="0" * 64)
    assert not marker.exists()


@pytest.mark.slow
def test_an_edited_file_is_another_run(files, tmp_path):
    config = configured(files, MAX_MIL, tmp_path)
    cross_validate(config)
    before = (config.output / "predictions.csv").read_bytes()
    (tmp_path / "mine.py").write_text(MAX_MIL + "# another\n")
    with pytest.raises(ConfigError, match=r"holds a run that differs in .*model_code.sha256"):
        cross_validate(config)
    (tmp_path / "mine.py").write_text(MAX_MIL)
    for path in sorted((config.output / "fold_1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (config.output / "fold_1").rmdir()
    cross_validate(config)
    assert (config.output / "predictions.csv").read_bytes() == before


@pytest.mark.slow
def test_a_file_that_is_edited_while_its_run_trains_stops_the_next_fold(files, tmp_path, monkeypatch):
    config = configured(files, MAX_MIL, tmp_path)
    original = crossval.fit

    def edits(*arguments, **options):
        result = original(*arguments, **options)
        (tmp_path / "mine.py").write_text(MAX_MIL + "# another\n")
        return result

    monkeypatch.setattr(crossval, "fit", edits)
    with pytest.raises(ConfigError, match=r"mine\.py: was edited while the run in .* trained with it"):
        cross_validate(config)
    assert [path.name for path in fold_folders(config.output)] == ["fold_0"]
    (tmp_path / "mine.py").write_text(MAX_MIL)
    monkeypatch.undo()
    cross_validate(config)


@pytest.mark.slow
def test_a_stopped_training_resumes_only_with_the_same_file(files, tmp_path, monkeypatch):
    config = configured(files, MAX_MIL, tmp_path, train={"epochs": 3})
    steps = iter([False, False, False, False, True])
    monkeypatch.setattr("cfusion.training.loop.stop_requested", lambda: next(steps))
    with pytest.raises(RequeueError):
        cross_validate(config)
    monkeypatch.undo()
    checkpoints = config.output / "checkpoints" / "fold_0"
    digest = digest_of(tmp_path)
    with pytest.raises(UntrustedCodeError):
        consolidate(checkpoints)
    model = consolidate(checkpoints, trust_code=digest)
    model.save(tmp_path / "model")
    assert FittedModel.load(tmp_path / "model", trust_code=digest).card.code == model.card.code
    (tmp_path / "mine.py").write_text(MAX_MIL + "# another\n")
    with pytest.raises(DataError, match="was edited after the model was saved"):
        consolidate(checkpoints, trust_code=digest_of(tmp_path))
    (tmp_path / "mine.py").write_text(MAX_MIL)
    cross_validate(config)
    uninterrupted = config.model_copy(update={"output": tmp_path / "uninterrupted"})
    cross_validate(uninterrupted)
    assert (config.output / "predictions.csv").read_bytes() == (uninterrupted.output / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_folds_train_together(files, tmp_path):
    config = configured(files, MAX_MIL, tmp_path, train={"folds": "together"})
    cross_validate(config)
    assert FoldEnsemble.load(config.output, trust_code=digest_of(tmp_path)).models[2].card.fold == 2


@pytest.mark.slow
def test_a_run_is_reproduced_from_the_trusted_file(trained, tmp_path):
    with pytest.raises(UntrustedCodeError):
        reproduce_run(trained.output, tmp_path / "again")
    digest = digest_of(trained.output.parent)
    assert reproduce_run(trained.output, tmp_path / "again", trust_code=digest).largest == 0


@pytest.mark.slow
def test_the_registered_model_carries_the_file_and_serves_it_where_it_is_trusted(trained, tmp_path, monkeypatch):
    import mlflow
    from mlflow import MlflowClient

    from cfusion.tracking.model_registry import fetch_ensemble

    digest = digest_of(trained.output.parent)
    client = MlflowClient(str(trained.tracking.uri))
    assert client.get_model_version("own", "1").tags["cfusion.code_sha256"] == digest
    with pytest.raises(UntrustedCodeError, match="models:/own/1: ") as refused:
        fetch_ensemble(client, "own", "1", tmp_path / "refused")
    assert "mlflow artifacts download --run-id" in refused.value.remedy
    expected = fetch_ensemble(client, "own", "candidate", tmp_path / "fetched", trust_code=digest).predict_bag(bag())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(trained.tracking.uri))
    with pytest.raises(UntrustedCodeError):
        mlflow.pyfunc.load_model("models:/own@candidate")
    monkeypatch.setenv("CFUSION_TRUST_CODE", digest[:16])
    pd.testing.assert_frame_equal(mlflow.pyfunc.load_model("models:/own@candidate").predict(bag()), expected)


def test_only_the_digested_bytes_run(tmp_path, monkeypatch):
    """A bytecode cache next to the file, or its folder on the path, must not change which code runs."""
    import py_compile

    file = tmp_path / "mine.py"
    file.write_text("def build(*, backbone_dim, n_bins):\n    raise RuntimeError('stale bytecode')\n")
    cache = py_compile.compile(str(file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert Path(str(cache)).is_file()
    file.write_text(PLAIN)
    before = list(sys.path)
    model = build_model(f"{file}:Plain", backbone_dim=4)
    assert type(model).__name__ == "Plain"
    assert sys.path == before
    assert "mine" not in sys.modules


def test_options_of_a_model_are_its_other_arguments(files, tmp_path):
    config = configured(files, MAX_MIL, tmp_path, model={"options": {"slope": 0.5}})
    check_own_model(config, 8)
    with pytest.raises(ConfigError, match=r"model.options.slop: .* has no such option. Did you mean slope\?"):
        check_own_model(configured(files, MAX_MIL, tmp_path, model={"options": {"slop": 0.5}}), 8)


def edited(old: str, new: str, source: str = PLAIN) -> str:
    assert old in source
    return source.replace(old, new)


FORWARD = 'SurvivalOutput.from_logits(self.head(bags.features["x20"].mean(dim=1)))'

BAD = {
    "syntax": (edited("class Plain", "klass Plain"), r"mine.py:4: does not import \(SyntaxError"),
    "null byte": (PLAIN + "\0", r"mine.py.*: does not import"),
    "import fails": (PLAIN + "\nraise OSError('no such disk')\n", r"mine.py:12: does not import \(OSError: no such"),
    "exits": (PLAIN + "\nraise SystemExit(1)\n", r"mine.py:12: does not import \(SystemExit: 1"),
    "missing package": ("import no_such_package\n" + PLAIN, r"mine.py:1: does not import \(ModuleNotFoundError"),
    "relative import": ("from . import other\n" + PLAIN, r"mine.py:1: imports a module of its folder \(from"),
    "sibling": ("import sibling\n" + PLAIN, r"mine.py:1: imports a module of its folder \(import sibling\)"),
    "no such class": (edited("class Plain", "class Plane"), r"mine.py: defines no Plain. Did you mean Plane\?"),
    "no class": ("Plain = 3\n", r"mine.py: Plain is a int, not a class or function"),
    "missing argument": (
        edited("n_bins):", "n_bins, depth):"), r"its argument depth has no value. Set model.options.depth",
    ),
    "constructor fails": (
        edited("nn.Linear(backbone_dim", "nn.Linear(backbone"), r"mine.py:7: Plain cannot be built \(NameError",
    ),
    "no module": (
        "def Plain(backbone_dim):\n    return 3\n", r"mine.py:Plain: gives a int. Return a torch.nn.Module",
    ),
    "nothing to train": (
        edited("self.head = nn.Linear(backbone_dim, n_bins)", "self.head = nn.Identity()"),
        r"mine.py:9: Plain has no parameter to train",
    ),
    "no output": (edited(f"return {FORWARD}", "pass"), r"mine.py:9: Plain returned a NoneType. Return cfusion.types"),
    "a tensor": (
        edited(FORWARD, 'self.head(bags.features["x20"].mean(dim=1))'), r"mine.py:9: Plain returned a Tensor",
    ),
    "bins": (
        edited("nn.Linear(backbone_dim, n_bins)", "nn.Linear(backbone_dim, 3)"),
        r"mine.py:9: Plain returned logits of shape \[1, 3\]; expected \[1, 4\]",
    ),
    "no bags": (edited(".mean(dim=1)", ".mean(dim=(0, 1))[None]"), r"mine.py:9: Plain returned .* padded|shape"),
    "magnification": (
        edited('["x20"]', '["x40"]'), r"mine.py:10: Plain failed on a synthetic bag with x5, x10, x20 \(KeyError",
    ),
    "not finite": (edited(".mean(dim=1)", ".mean(dim=1) / 0"), r"mine.py:9: Plain returned logits that are not finite"),
    "forward fails": (edited("from_logits(", "from_logits(1 +", PLAIN).replace("self.head(", "self.neck("),
                      r"mine.py:10: Plain failed on a synthetic bag \(AttributeError"),
    "padding": (PLAIN, r"mine.py:9: Plain returned different logits for a bag when it is padded"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_model_does_wrong_is_said_with_file_and_line(files, tmp_path, case):
    source, message = BAD[case]
    (tmp_path / "sibling.py").write_text("")
    with pytest.raises(ConfigError, match=message) as refused:
        check_own_model(configured(files, source, tmp_path, "Plain"), 8)
    assert refused.value.topic in ("own-model", "config")


def test_a_model_without_masks_is_taken_one_bag_at_a_time(files, tmp_path):
    state = torch.get_rng_state()
    check_own_model(configured(files, PLAIN, tmp_path, "Plain", train={"micro_batch": 1}), 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bad_model_is_refused_before_anything_is_written(files, tmp_path):
    config = configured(files, PLAIN, tmp_path, "Plain")
    with pytest.raises(ConfigError, match="when it is padded"):
        cross_validate(config)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_model.py:Net", r"my_model.py cannot be read \(No such file or directory\). Did you mean my_models.py\?"),
        ("my_models.py", "no such model. A model in a file is named FILE.py:CLASS"),
        ("my_models:Net", "no such model. A model in a file is named FILE.py:CLASS"),
        ("amill", r"no such model. Did you mean amil\?"),
    ],
)
def test_names_that_name_nothing(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("my_models.py").write_text(PLAIN)
    with pytest.raises(ConfigError, match=message):
        model_code(name)


def install(folder: Path, source: str, *, distribution: str = "max-mil", version: str = "1.2", module: str = "max_mil"):
    """An installed distribution, as pip leaves it: a module and its metadata."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[cfusion.models]\nmax_mil = {module}:MaxMIL\n")
    (folder / f"{module}.py").write_text(source)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("max_mil", "other_mil"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_model_of_an_installed_package_trains_and_predicts_where_the_package_is(files, site, tmp_path, caplog):
    install(site, MAX_MIL)
    config = files.config(
        tmp_path / "run", model={"name": "max_mil", "embed_dim": 16, "num_heads": 2}, train={"epochs": 2}
    )
    cross_validate(config)
    model = FittedModel.load(config.output / "fold_0" / "model")
    digest = hashlib.sha256(MAX_MIL.encode()).hexdigest()
    assert model.card.code == {"distribution": "max-mil", "version": "1.2", "sha256": digest}
    assert not (config.output / "fold_0" / "model" / "model.py").exists()
    (site / "max_mil-1.2.dist-info").rename(site / "max_mil-1.3.dist-info")
    metadata = site / "max_mil-1.3.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.2", "1.3"))
    FittedModel.load(config.output / "fold_0" / "model")
    assert "was trained with max-mil 1.2; max-mil 1.3 is installed" in caplog.text
    with pytest.raises(ConfigError, match=r"holds a run that differs in .*model_code.version"):
        cross_validate(config)
    (site / "max_mil-1.3.dist-info" / "entry_points.txt").unlink()
    with pytest.raises(ConfigError, match=r"in the package max-mil 1.2, which is not installed") as refused:
        FittedModel.load(config.output / "fold_0" / "model")
    assert "pip install 'max-mil==1.2'" in refused.value.remedy


def test_packages_that_offer_what_cannot_be_used(site):
    install(site, MAX_MIL)
    with pytest.raises(ConfigError, match=r"model.name='max_mill': no such model. Did you mean max_mil\?"):
        model_code("max_mill")
    install(site, MAX_MIL, distribution="other-mil", module="other_mil")
    with pytest.raises(ConfigError, match=r"max_mil: .*other-mil 1.2.* all offer this name"):
        model_code("max_mil")
    (site / "max_mil-1.2.dist-info" / "entry_points.txt").unlink()
    (site / "other_mil.py").unlink()
    with pytest.raises(ConfigError, match=r"the entry point cfusion.models of other-mil 1.2 cannot be loaded"):
        model_code("max_mil")


def test_plain_names_are_parts_of_paths():
    assert extensions.plain_name("models/mine.py:MaxMIL") == "mine-MaxMIL"
    assert extensions.plain_name("amil") == "amil"
    assert extensions.plain_name("mes modèles/mon modèle (2).py:MaxMIL") == "mon-modele-2--MaxMIL"
    assert extensions.plain_name("_é.py:_Net") == "e-_Net"


def test_a_sweep_over_files_has_plain_names_and_is_stale_after_an_edit(files, tmp_path, monkeypatch):
    from launch.sweep.plan import SweepConfig, plan

    monkeypatch.chdir(tmp_path)
    Path("nets").mkdir()
    Path("nets/mine.py").write_text(MAX_MIL)
    base = files.config(tmp_path).model_dump(mode="json", exclude_defaults=True)
    del base["model"], base["output"]
    values = {"name": "own", "output": "sweep", "base": base, "axes": {"model": ["amil", "nets/mine.py:MaxMIL"]}}
    before = plan(SweepConfig(**values))
    assert [run.values["model"] for run in before] == ["amil", "mine-MaxMIL"]
    assert before[1].config.output.parent == Path("sweep/runs")
    Path("nets/mine.py").write_text(MAX_MIL + "# edited\n")
    after = plan(SweepConfig(**values))
    assert before[0].name == after[0].name
    assert before[1].name != after[1].name
    Path("nets/mine.py").unlink()
    assert "nets/mine.py: not found" in plan(SweepConfig(**values))[1].absent
    with pytest.raises(ValueError, match="two values get the same name"):
        SweepConfig(**{**values, "axes": {"model": ["nets/mine.py:MaxMIL", "mine.py:MaxMIL"]}})
