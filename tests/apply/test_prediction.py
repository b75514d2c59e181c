"""A fold ensemble on new patients: the same from shards, a store or many processes, and refused where it must be."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factories import ENCODER, CohortFiles, slide_features
from spawn import run_world
from untrained_models import EDGES, untrained

from cfusion.apply.ensemble import FoldEnsemble, predict
from cfusion.apply.sources import Embeddings, ShardSource, StoreSource
from cfusion.cohort.identifiers import Names
from cfusion.cohort.slide_owners import SlideOwners, read_owners
from cfusion.config import DataConfig, ParallelConfig
from cfusion.data.shards import ShardDataset
from cfusion.data.slide_means import slide_means
from cfusion.data.store import write_slide
from cfusion.errors import CfusionError, CohortError, ConfigError, DataError, PartialResultError, StoreError
from cfusion.run_folder import fold_models
from cfusion.survival.metrics import concordance
from cfusion.survival.patients import score_patients
from cfusion.training.folds import fit
from cfusion.training.seen import EmbeddingRegion, Seen, digest_case
from cfusion.training.world import join_world
from cfusion.types import SlideFeatures
from preprocess.descriptor import DIM

NAMES = ("x20", "x10", "x5")


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch):
    """The command line sets up logging for its process; here the process is the tests'."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


@pytest.fixture(scope="module")
def ensemble_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module")
def store(files: CohortFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort's slides as a feature store."""
    root = tmp_path_factory.mktemp("features")
    dataset = ShardDataset.open(files.shards)
    for slide in dataset.slide_ids:
        features = dataset.read(slide, NAMES)
        coords = {n: dataset.read(slide, [f"coords_{n}"])[f"coords_{n}"] for n in NAMES}
        attrs = {"encoder": ENCODER, "tile_px_level0": dataset.sample(slide).tile_px_level0}
        write_slide(root, SlideFeatures(slide, features, coords, {}, attrs))
    return root


def _nobody(_: str) -> None:
    """There is no known patient."""


@pytest.fixture(scope="module")
def cases(files: CohortFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cases") / "cases.csv"
    rows = pd.read_csv(files.table).rename(columns={"patient": "case_id", "slide": "slide_id"})
    rows["slide_id"] += ".svs"
    rows[["slide_id", "case_id"]].to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_shards_and_the_store_they_were_packed_from_give_the_same(
    cfusion, files, store, cases, ensemble_folder, tmp_path
):
    for source, name in ((files.shards, "shards.csv"), (store, "store.csv")):
        output = cfusion("predict", source, "--model", ensemble_folder, "--cases", cases, "--out", tmp_path / name)
        assert output.startswith("30 patients, ")
    one, other = (
        pd.read_csv(tmp_path / name).set_index("case_id").sort_index() for name in ("shards.csv", "store.csv")
    )
    assert one["slides"].tolist() == [2] * 3 + [1] * 27
    assert one["group"].tolist() == other["group"].tolist()
    numbers = one.columns.drop("group")
    assert one["survival_1y"].between(0, 1).all()
    np.testing.assert_allclose(one[numbers], other[numbers], rtol=1e-6)


def test_a_row_is_the_mean_over_the_folds_and_its_curve_holds_every_edge(files, cases, ensemble_folder):
    source = ShardSource(DataConfig(shards=str(files.shards)))
    slides = SlideOwners(_nobody, read_owners(cases)).group(source.slide_ids)
    ensemble = FoldEnsemble.load(ensemble_folder)
    table = ensemble.predict(source, slides, join_world(ParallelConfig())).set_index("case_id")
    separate = [predict(m, DataConfig(shards=str(files.shards)), slides).set_index("case_id") for m in ensemble.models]
    risks = np.stack([frame.loc[table.index, "risk"] for frame in separate])
    np.testing.assert_allclose(table["risk"], risks.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(table["risk_sd"], risks.std(axis=0), rtol=1e-9)
    assert ensemble.risk_cutoff == pytest.approx(-2.15)
    assert ((table["group"] == "high") == (table["risk"] >= -2.15)).all()
    months = sorted({edge for edges in EDGES for edge in edges[1:]})
    assert [table[f"edge_{k + 1}"].iloc[0] for k in range(len(months))] == months
    curves = table[[f"survival_{k + 1}" for k in range(len(months))]].to_numpy()
    assert (np.diff(curves, axis=1) <= 0).all()
    at_14 = (separate[0].loc[table.index, "survival_2"] + separate[1].loc[table.index, "survival_1"]) / 2
    np.testing.assert_allclose(curves[:, months.index(14.0)], at_14, rtol=1e-12)


@pytest.mark.parametrize("unit", ["case", "slide"])
def test_patients_of_the_training_are_predicted_by_the_folds_that_have_not_seen_them(files, cases, tmp_path, unit):
    source = ShardSource(DataConfig(shards=str(files.shards)))
    slides = SlideOwners(_nobody, read_owners(cases)).group(source.slide_ids)
    names = list(slides)
    models = FoldEnsemble.load(untrained(tmp_path)).models
    known = (names[:10] + names[20:22], names[10:22])
    ensemble = FoldEnsemble(
        tuple(
            dataclasses.replace(
                model, card=dataclasses.replace(model.card, unit=unit),
                seen=Seen(frozenset(map(digest_case, of_fold)), None),
            )
            for model, of_fold in zip(models, known, strict=True)
        )
    )  # fmt: skip
    runtime = join_world(ParallelConfig())
    table = ensemble.predict(source, slides, runtime).set_index("case_id")
    first, second = (
        FoldEnsemble((model,)).predict(source, slides, runtime).set_index("case_id") for model in ensemble.models
    )
    for mine, group in ((second, names[:10]), (first, names[10:20])):
        assert (table.loc[group, "unseen_folds"] == 1).all()
        for column in ("risk", "group", "survival_1y"):
            assert table.loc[group, column].tolist() == mine.loc[group, column].tolist()
        assert (table.loc[group, "risk_sd"] == 0).all()
    both = (first["risk"] + second["risk"]) / 2
    assert table.loc[names[20:22], "unseen_folds"].tolist() == [0, 0]
    assert (table.loc[names[22:], "unseen_folds"] == 2).all()
    np.testing.assert_allclose(table.loc[names[20:], "risk"], both[names[20:]], rtol=1e-12)


def test_the_command_says_how_many_patients_were_in_the_training(cfusion, files, cases, tmp_path, caplog):
    names = sorted(set(pd.read_csv(cases)["case_id"]))
    for model, of_fold in zip(FoldEnsemble.load(untrained(tmp_path / "a")).models, (names[:5], names[:2]), strict=True):
        seen = Seen(frozenset(map(digest_case, of_fold)), None)
        dataclasses.replace(model, seen=seen).save(tmp_path / "b" / f"fold_{model.card.fold}" / "model")
    out = tmp_path / "risks.csv"
    cfusion("predict", files.shards, "--model", tmp_path / "b", "--cases", cases, "--out", out)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "5 of 30 patients were in the model's training: 3 are predicted only by the folds that have not seen them; 2 "
        "have been seen by every fold, so their risk is no prediction. The column unseen_folds counts the folds."
    ]
    assert pd.read_csv(out).set_index("case_id").loc[names[:6], "unseen_folds"].tolist() == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("unit", ["case", "slide"])
def test_one_fold_predicts_its_test_patients_as_its_training_did(files, tmp_path, unit):
    from cfusion import make_splits, read_cohort

    sections = {"train": {"epochs": 1}, "splits": {"folds": 2}, "model": {"name": "amil"}, "data": {"unit": unit}}
    config = files.config(tmp_path / "run", **sections)
    cohort = read_cohort(config.cohort)
    split = make_splits(cohort, config.splits)[0]
    run = fit(config, cohort, split)
    run.model.save(tmp_path / "fold_0" / "model")
    source = ShardSource(config.data)
    slides = cohort.slides_of(split.test)
    assert max(map(len, slides.values())) == 2
    table = FoldEnsemble.load(tmp_path / "fold_0").predict(source, slides, join_world(ParallelConfig()))
    expected = run.predictions.set_index("case_id").loc[table["case_id"]]
    np.testing.assert_allclose(table["risk"], expected["risk"], rtol=1e-6)
    assert (table["group"] == "high").tolist() == (expected["risk"] >= expected["risk_cutoff"]).tolist()
    assert (table["risk_sd"] == 0).all()
    assert run.model.seen is not None
    known = predict(run.model, config.data, cohort.slides_of(split.train)).set_index("case_id")["risk"]
    place = [(known < risk).mean() * 100 + (known == risk).mean() * 50 for risk in table["risk"]]
    np.testing.assert_allclose(table["risk_percentile"], place, atol=200 / len(known))
    assert run.model.seen.digests == {digest_case(case) for case in (*split.train, *split.validation)}


def test_neither_the_rows_of_a_table_nor_the_order_of_shards_change_the_risk_of_a_patient(files, tmp_path):
    """CrossFusion lays the tiles of all slides of a patient on one square, so their order counts."""
    from cfusion import make_splits, read_cohort

    rows = pd.read_csv(files.table)
    rows.iloc[::-1].to_csv(tmp_path / "reversed.csv", index=False)
    sections = {"train": {"epochs": 1}, "splits": {"folds": 2}, "model": {"name": "crossfusion"}}
    config = files.config(tmp_path / "run", **sections)
    split = make_splits(read_cohort(config.cohort), config.splits)[0]
    sections["cohort"] = {"table": str(tmp_path / "reversed.csv")}
    backwards = files.config(tmp_path / "run", **sections)
    run = fit(backwards, read_cohort(backwards.cohort), split)
    source = ShardSource(config.data)
    expected = run.predictions.set_index("case_id")["risk"]
    for slide_ids in (source.slide_ids, source.slide_ids[::-1]):
        slides = SlideOwners(Names(split.test).find, read_owners(files.table)).group(slide_ids)
        slides = {case: slides[case] for case in split.test}
        assert max(map(len, slides.values())) == 2
        found = predict(run.model, config.data, slides).set_index("case_id")["risk"]
        np.testing.assert_allclose(found, expected.loc[found.index], rtol=1e-6)


def test_a_patient_at_the_cutoff_is_in_the_high_risk_group_of_prediction_and_report(files, cases, ensemble_folder):
    source = ShardSource(DataConfig(shards=str(files.shards)))
    slides = SlideOwners(_nobody, read_owners(cases)).group(source.slide_ids)
    first = FoldEnsemble.load(ensemble_folder).models[0]
    risks = FoldEnsemble((first,)).predict(source, slides, join_world(ParallelConfig()))["risk"]
    cutoff = float(risks.sort_values().iloc[len(risks) // 2])
    at_cutoff = FoldEnsemble((dataclasses.replace(first, card=dataclasses.replace(first.card, risk_cutoff=cutoff)),))
    table = at_cutoff.predict(source, slides, join_world(ParallelConfig()))
    assert (table["risk"] == cutoff).sum() == 1
    assert table.loc[table["risk"] == cutoff, "group"].tolist() == ["high"]
    outcomes = {"survival_months": np.arange(1.0, len(table) + 1), "event": True, "fold": 0, "seed": 0, "repeat": 0}
    rows = table[["case_id", "risk"]].assign(risk_cutoff=cutoff, **outcomes)
    report = score_patients(rows, (), np.zeros(0), np.zeros((1, 0)))
    assert report.high is not None
    assert report.high.size == (table["group"] == "high").sum()


def test_json_has_the_curve_of_each_patient(cfusion, files, ensemble_folder):
    rows = json.loads(cfusion("predict", files.shards, "--model", ensemble_folder, "--json"))
    assert len(rows) == 33, "without a table of cases a slide stands for itself"
    after_years = {"survival_1y", "survival_3y", "survival_5y"}
    assert set(rows[0]) == {"case_id", "slides", "risk", "risk_sd", "group", "curve", *after_years}
    assert rows[0]["survival_5y"] == rows[0]["curve"]["survival"][rows[0]["curve"]["months"].index(31.0)]
    assert rows[0]["curve"]["months"] == sorted({edge for edges in EDGES for edge in edges[1:]})
    assert len(rows[0]["curve"]["survival"]) == len(rows[0]["curve"]["months"])


def test_slides_taken_for_patients_are_reported_and_counted_as_slides(
    cfusion, files, cases, ensemble_folder, tmp_path, caplog
):
    source = (files.shards, "--model", ensemble_folder, "--out", tmp_path / "out.csv")
    assert cfusion("predict", *source).startswith("33 slides, ")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "33 of 33 slides name no known patient, such as PT-0003-1: each counts as a patient. --cases TABLE groups them."
    ]
    caplog.clear()
    assert cfusion("predict", *source, "--cases", cases).startswith("30 patients, ")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_slides_with_and_without_barcode_are_counted_apart(cfusion, ensemble_folder, tmp_path, caplog):
    rng = np.random.default_rng(0)
    for name in ("TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX2", "other"):
        write_slide(tmp_path / "store", slide_features(name, 2, 8, rng))
    output = cfusion("predict", tmp_path / "store", "--model", ensemble_folder, "--out", tmp_path / "out.csv")
    assert output.startswith("1 patients and 1 slides, ")
    assert "1 of 3 slides name no known patient, such as other:" in caplog.text


def test_slides_of_patients_of_the_training_are_grouped_by_their_names(cfusion, files, cases, tmp_path, caplog):
    """As for an explanation and a served model: without a table, `PT-0003-1` is of the patient `PT-0003`."""
    names = sorted(set(pd.read_csv(cases)["case_id"]))
    model = with_seen(tmp_path / "model", Seen(frozenset(map(digest_case, names)), None))
    for name, options in (("a.csv", ()), ("b.csv", ("--cases", cases))):
        cfusion("predict", files.shards, "--model", model, *options, "--out", tmp_path / name)
    assert "name no known patient" not in caplog.text
    columns = ["case_id", "slides", "unseen_folds"]
    without, with_cases = (pd.read_csv(tmp_path / name)[columns].sort_values("case_id") for name in ("a.csv", "b.csv"))
    assert without.to_dict("list") == with_cases.to_dict("list")
    assert (without["unseen_folds"] == 0).all()


def _predicts(shards: str, folder: str, out: str) -> None:
    runtime = join_world(ParallelConfig(global_batch=2))
    source = ShardSource(DataConfig(shards=shards))
    table = FoldEnsemble.load(Path(folder)).predict(source, SlideOwners(_nobody).group(source.slide_ids), runtime)
    table.to_csv(Path(out) / f"{runtime.rank}.csv", index=False)


@pytest.mark.slow
def test_two_processes_predict_as_one_does(files, ensemble_folder, tmp_path):
    run_world(2, _predicts, tmp_path, str(files.shards), str(ensemble_folder), str(tmp_path))
    source = ShardSource(DataConfig(shards=str(files.shards)))
    single = FoldEnsemble.load(ensemble_folder).predict(
        source, SlideOwners(_nobody).group(source.slide_ids), join_world(ParallelConfig())
    )
    for rank in range(2):
        table = pd.read_csv(tmp_path / f"{rank}.csv")
        assert table["case_id"].tolist() == single["case_id"].tolist()
        np.testing.assert_allclose(table["risk"], single["risk"], rtol=1e-6)


def embeddings(**changes: object) -> Embeddings:
    made = {"weights": "abc", "resample": "area"}
    return dataclasses.replace(Embeddings("here", ENCODER, 8, NAMES, made), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "other"}, r"here: holds embeddings of other \(8 wide\), but the model reads made-up \(8 wide\)"),
        ({"dim": 9}, r"made-up \(9 wide\), but the model reads made-up \(8 wide\)"),
        ({"magnifications": ("x20", "x10")}, r"holds x20, x10, but the model also reads x5"),
        ({"made": {"weights": "xyz"}}, r"have weights xyz, but those the model was trained on have abc"),
        ({"made": {"resample": "bicubic"}}, r"have resample bicubic"),
    ],
)
def test_embeddings_a_model_was_not_trained_on_are_refused(ensemble_folder, changes, message):
    card = dataclasses.replace(FoldEnsemble.load(ensemble_folder).models[0].card, embeddings=dict(embeddings().made))
    embeddings().check(card)
    embeddings(made={}).check(card)
    with pytest.raises(StoreError, match=message):
        embeddings(**changes).check(card)


@pytest.mark.slow
def test_bad_input_is_refused_and_nothing_is_written(cfusion, files, store, cases, tmp_path):
    other = untrained(tmp_path / "other", encoder="uni")
    wide = untrained(tmp_path / "wide", dim=6)
    good = untrained(tmp_path / "good")
    unfinished = untrained(tmp_path / "unfinished")
    (unfinished / "run.json").write_text("{}")
    absent = tmp_path / "absent.csv"
    absent.write_text("slide_id,case_id\nnowhere.svs,PT-1\n")
    untaught = untrained(tmp_path / "stain", encoder="stain-texture", dim=DIM)
    database = f"sqlite:///{tmp_path / 'm.db'}"
    out = tmp_path / "out.csv"
    attempts: list[tuple[type[CfusionError], str, list[object]]] = [
        (StoreError, "holds embeddings of made-up", [files.shards, "--model", other]),
        (StoreError, "holds embeddings of made-up, but the model reads uni", [store, "--model", other]),
        (StoreError, r"made-up \(8 wide\), but the model reads made-up \(6 wide\)", [files.shards, "--model", wide]),
        (StoreError, r"made-up \(8 wide\), but the model reads made-up \(6 wide\)", [store, "--model", wide]),
        (DataError, "its run is not finished", [files.shards, "--model", unfinished]),
        (DataError, "holds no model.json", [files.shards, "--model", tmp_path / "nothing"]),
        (CohortError, "1 of its slides are not there: nowhere", [files.shards, "--model", good, "--cases", absent]),
        (DataError, "gone: no such file or folder", [tmp_path / "gone", "--model", untaught]),
        (ConfigError, "No model registry is given", [files.shards, "--model", "models:/a@champion"]),
        (ConfigError, r"expected models:/NAME@ALIAS", [files.shards, "--model", "models:/a", "--uri", database]),
    ]  # fmt: skip
    for kind, message, arguments in attempts:
        with pytest.raises(kind, match=message):
            cfusion("predict", *arguments, "--out", out)
        assert not out.exists()
    with pytest.raises(ConfigError, match="no output was requested"):
        cfusion("predict", files.shards, "--model", good)


def test_fold_models_of_several_runs_are_no_ensemble(cfusion, files, tmp_path):
    sweep = tmp_path / "sweep"
    for name in ("real", "permuted"):
        run = untrained(sweep / "runs" / name)
        (run / "run.json").write_text("{}")
        (run / "done.json").write_text("{}")
    out = tmp_path / "out.csv"
    message = f"{sweep}: holds fold models of 2 runs, such as {sweep}/runs/permuted and {sweep}/runs/real, which"
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        cfusion("predict", files.shards, "--model", sweep, "--out", out)
    assert refused.value.remedy == "Give the folder of one run, or of one of its folds."
    assert not out.exists()
    for name in ("real", "permuted"):  # nor are folders of models that have lost their run.json
        (sweep / "runs" / name / "run.json").unlink()
    with pytest.raises(DataError, match="fold models of 2 runs"):
        FoldEnsemble.load(sweep)


def test_the_models_of_a_run_are_only_those_of_its_folds(cfusion, files, tmp_path):
    run = untrained(tmp_path / "sweep" / "run")
    fold = run / "fold_0" / "model"
    models = [fold, run / "fold_1" / "model"]
    assert fold_models(run) == fold_models(tmp_path / "sweep") == models
    assert fold_models(run / "fold_0") == fold_models(fold) == [fold]
    shutil.copytree(run / "fold_0", run / ".fold_0.0123abcd_7_0123abcd.tmp")
    assert fold_models(run) == models, "a killed writer's temporary folder is not a fold"
    (run / "run.json").write_text("{}")
    untrained(run / "null")
    shutil.copytree(fold, run / "consolidated")
    assert fold_models(run) == models, "another run, or a model copied there by hand, is not a fold"
    shutil.rmtree(run / "null")
    with pytest.raises(DataError, match=r"sweep/run: its run is not finished"):
        cfusion("predict", files.shards, "--model", tmp_path / "sweep", "--json")


def random_bag() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(n, 8)).astype(np.float32) for name, n in (("x20", 16), ("x10", 4), ("x5", 1))}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_a_bag_with_a_value_that_is_not_finite_is_refused_by_row(tmp_path, value):
    ensemble = FoldEnsemble.load(untrained(tmp_path, grid="file"))
    bag = {name: values.astype(np.float64) for name, values in random_bag().items()}
    assert np.isfinite(ensemble.predict_bag(bag)["risk"]).all()
    bag["x10"][2:, 5] = value
    with pytest.raises(DataError, match=r"features of x10: row 2, counted from 0, holds a value that is not finite"):
        ensemble.predict_bag(bag)


def test_a_bag_whose_risk_is_not_finite_is_refused(tmp_path):
    ensemble = FoldEnsemble.load(untrained(tmp_path, grid="file"))
    with pytest.raises(DataError, match="The risk of this bag is not finite"):
        ensemble.predict_bag({name: np.full_like(values, 3e38) for name, values in random_bag().items()})


def test_a_real_slide_is_preprocessed_with_the_models_encoder(cfusion, shared, tmp_path):
    slide = shared / "slides" / "cmu_small_region.svs"
    folder = untrained(tmp_path / "model", encoder="stain-texture", dim=DIM)
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / slide.name).symlink_to(slide)
    (slides / "broken.svs").write_bytes(b"no slide")
    out = tmp_path / "out.csv"
    with pytest.raises(PartialResultError, match="1 slides could not be read: broken"):
        cfusion("predict", slides, "--model", folder, "--out", out, "--store", tmp_path / "features")
    table = pd.read_csv(out)
    assert table["case_id"].tolist() == [slide.stem]
    again = tmp_path / "again.csv"
    cfusion("predict", tmp_path / "features", "--model", folder, "--out", again)
    assert again.read_text() == out.read_text()
    with pytest.raises(DataError, match="broken"):
        cfusion("predict", slides / "broken.svs", "--model", folder, "--out", tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


def test_a_store_with_slides_of_two_widths_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    for slide, dim in (("a", 4), ("b", 5)):
        features = {"x5": rng.normal(size=(3, dim)).astype(np.float16)}
        write_slide(tmp_path, SlideFeatures(slide, features, {}, {}, {"encoder": "e"}))
    with pytest.raises(StoreError, match="slides a, b differ in width"):
        _ = StoreSource(tmp_path, "e").embeddings


@pytest.fixture
def outside(files: CohortFiles, tmp_path: Path) -> Path:
    """The cohort's patients and outcomes under another name, with one patient of whom nothing is predicted."""
    table = pd.read_csv(files.table)
    stranger = table.iloc[[0]].assign(patient="stranger", slide="stranger")
    pd.concat([table, stranger]).to_csv(tmp_path / "hospital.csv", index=False)
    return tmp_path / "hospital.csv"


@pytest.mark.parametrize("named", ["by --table", "by --cases"])
def test_external_validation_is_one_command(cfusion, files, cases, ensemble_folder, outside, tmp_path, named):
    given = ("predict", files.shards, "--model", ensemble_folder)
    given += ("--cases", cases) if named == "by --cases" else ()
    output = cfusion(*given, "--table", outside, "--report", tmp_path / "report", "--out", tmp_path / "risks.csv")
    assert f"report: {tmp_path / 'report' / 'index.html'}" in output
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"crossfusion was trained on made_up (2 fold models, embeddings of {ENCODER}, epochs" in page
    assert "and tested on hospital." in page
    assert "hospital: 1 of 31 patients of the table have no prediction or no usable outcome." in page
    row = pd.read_csv(tmp_path / "report" / "summary.csv").iloc[0]
    assert (row["cohort"], row["n"], row["folds"]) == ("hospital", 30, 1)
    risks = pd.read_csv(tmp_path / "risks.csv").set_index("case_id")["risk"]
    table = pd.read_csv(files.table).drop_duplicates("patient").set_index("patient").loc[risks.index]
    expected = concordance(table["time"], table["event"].astype(bool), risks).cindex
    assert row["cindex_within"] == pytest.approx(expected)


def test_what_is_no_external_validation_is_refused(cfusion, files, cases, ensemble_folder, outside, tmp_path):
    given = ("predict", files.shards, "--model", ensemble_folder, "--cases", cases)
    with pytest.raises(ConfigError, match="--table and --report need each other"):
        cfusion(*given, "--table", outside, "--out", tmp_path / "risks.csv")
    with pytest.raises(ConfigError, match="need each other"):
        cfusion(*given, "--report", tmp_path / "report")
    other = tmp_path / "other.csv"
    other.write_text("patient,slide,time,event\nnobody,s,3,1\nnone,t,4,0\n")
    with pytest.raises(DataError, match="none of its 2 patients is among the 30 predicted ones"):
        cfusion(*given, "--table", other, "--report", tmp_path / "report")
    again = tmp_path / "again.csv"
    again.write_bytes(outside.read_bytes())
    with pytest.raises(DataError, match="is a patient of hospital and of again"):
        cfusion(*given, "--table", outside, "--table", again, "--report", tmp_path / "report")
    run = untrained(tmp_path / "run")
    cohort = pd.read_csv(files.table).drop_duplicates("patient").rename(columns={"patient": "case_id"})
    cohort = cohort.rename(columns={"time": "time_months"})[["case_id", "time_months", "event"]]
    cohort.iloc[:3].to_csv(run / "outcomes.csv", index=False)
    with pytest.raises(DataError, match="3 patients are in the run that trained the model"):
        cfusion(
            "predict", files.shards, "--model", run, "--cases", cases, "--table", outside, "--report", tmp_path / "r"
        )


def with_seen(folder: Path, seen: Seen) -> Path:
    """Save the untrained models as if they had seen these patients."""
    for path in fold_models(untrained(folder)):
        seen.save(path / "training.npz")
    return folder


@pytest.mark.slow
def test_patients_whose_embeddings_are_outside_of_the_trainings_are_named(
    cfusion, files, cases, outside, tmp_path, caplog
):
    dataset = ShardDataset.open(files.shards)
    means = slide_means(dataset, dataset.slide_ids, DataConfig(shards=str(files.shards)), (20.0, 10.0, 5.0))
    values = np.array([mean.ravel() for mean in means.values()])
    region = EmbeddingRegion.fit(values)
    assert region is not None
    table = pd.read_csv(files.table)
    table.assign(age=40 + table.groupby("patient", sort=False).ngroup() * 7 % 30).to_csv(outside, index=False)
    given = ("predict", files.shards, "--cases", cases, "--out", tmp_path / "risks.csv", "--model")
    cfusion(*given, with_seen(tmp_path / "same", Seen(frozenset(), region)))
    assert pd.read_csv(tmp_path / "risks.csv")["distance"].median() < 1
    assert "Read these predictions with care" not in caplog.text
    shifted = dataclasses.replace(region, mean=region.mean - 8 * region.scale)
    model = with_seen(tmp_path / "stained", Seen(frozenset(), shifted))
    cfusion(*given, model, "--table", outside, "--report", tmp_path / "report")
    assert "Read these predictions with care: the mean embeddings of 30 of 30 patients" in caplog.text
    page = (tmp_path / "report" / "index.html").read_text()
    assert "hospital: the mean embeddings of 30 of 30 patients (100%) are outside of those of the training" in page
    assert "are fitted on the patients of this cohort, in 5 drawn folds" in page
    row = pd.read_csv(tmp_path / "report" / "summary.csv").iloc[0]
    assert row["clinical_covariates"] == "age"
    assert np.isfinite([row["clinical_c"], row["both_c"], row["added_c"], row["hr_sd_adjusted"]]).all()


def test_patients_that_a_models_folder_has_recorded_are_no_external_cohort(cfusion, files, cases, outside, tmp_path):
    model = with_seen(tmp_path / "model", Seen(frozenset({digest_case("pt-0003")}), None))
    given = ("predict", files.shards, "--model", model, "--cases", cases, "--table", outside, "--report")
    with pytest.raises(DataError, match="1 patients are in the run that trained the model, such as PT-0003"):
        cfusion(*given, tmp_path / "report")


def test_predictions_do_not_replace_a_folder(cfusion, files, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kept.txt").touch()
    with pytest.raises(ConfigError, match="results: is a folder") as refused:
        cfusion("predict", files.shards, "--model", "nothing", "--out", tmp_path / "results")
    assert "results/risks.csv" in refused.value.remedy
    with pytest.raises(DataError, match="results: exists and holds no model, so it is not replaced"):
        FoldEnsemble.load(untrained(tmp_path / "run")).models[0].save(tmp_path / "results")
    assert (tmp_path / "results" / "kept.txt").exists()
