"""The phantom cohorts: slides OpenSlide opens, outcomes with a known concordance, signals at one magnification each."""

import csv
import dataclasses
from itertools import combinations
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cfusion.cohort.read import read_cohort
from cfusion.config import CohortConfig
from cfusion.errors import ConfigError, DataError
from cfusion.survival.metrics import concordance
from preprocess.descriptor import describe_tiles
from preprocess.phantom.draw import PHANTOMS, PhantomCohort, PhantomSpec, draw_cohort, plan_patients
from preprocess.phantom.histology import Stain, atlas, draw_tissue, gland_field

SMALL = PhantomSpec("small", seed=5, patients=6, cells=(1, 1), share_40x=0.34, two_slides=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PhantomCohort:
    return draw_cohort(SMALL, tmp_path_factory.mktemp("phantom"))


def halved(image: np.ndarray) -> np.ndarray:
    rows = image[0::2].astype(np.float32) + image[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) / 4


def test_slides_open_with_resolution_and_pyramid(small: PhantomCohort) -> None:
    powers = []
    for patient in plan_patients(SMALL):
        for slide_id in patient.slides:
            with openslide.OpenSlide(small.slides / f"{slide_id}.svs") as slide:
                power = int(slide.properties["openslide.objective-power"])
                assert power == patient.magnification
                assert float(slide.properties["openslide.mpp-x"]) == 10 / power
                assert slide.dimensions == (1024 * power // 20, 1024 * power // 20)
                assert slide.level_downsamples[1] == 4
                powers.append(power)
    assert sorted(set(powers)) == [20, 40]
    assert len(powers) == 7


def test_40x_slide_shows_the_same_tissue_at_twice_the_pixels(small: PhantomCohort) -> None:
    patient = next(p for p in plan_patients(SMALL) if p.magnification == 40)
    number = int(patient.case_id[-4:])
    with openslide.OpenSlide(small.slides / f"{patient.slides[0]}.svs") as slide:
        level0 = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"), np.float32)
    rng = np.random.default_rng([SMALL.seed, 1, number, 0])
    drawn = draw_tissue(1024, 1024, patient.architecture, patient.nuclei, SMALL.stain, rng)
    assert np.abs(halved(level0) - drawn).mean() < 3


def test_table_is_read_and_truth_names_every_patient(small: PhantomCohort) -> None:
    cohort = read_cohort(CohortConfig(name="small", table=small.table))
    assert len(cohort.cases) == 6
    assert len(cohort.slides) == 7
    assert sorted(len(slides) for slides in cohort.slides_of(list(cohort.cases.index)).values()) == [1] * 5 + [2]
    assert {f"{slide}.svs" for slide in cohort.slides.index} == {path.name for path in small.slides.iterdir()}
    with small.truth.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case_id"] for row in rows] == list(cohort.cases.index)
    assert list(rows[0]) == ["case_id", "architecture", "nuclei", "log_hazard"]


def test_interrupted_drawing_goes_on_and_gives_the_same_bytes(small: PhantomCohort, tmp_path: Path) -> None:
    first = draw_cohort(SMALL, tmp_path, workers=1)
    expected = {path.name: path.read_bytes() for path in small.slides.iterdir()}
    assert {path.name: path.read_bytes() for path in first.slides.iterdir()} == expected
    lost, kept = sorted(first.slides.iterdir())[:2]
    lost.unlink()
    (first.slides / f".{lost.name}.0a1b2c3d.tmp").write_bytes(b"half a slide")
    before = kept.stat().st_mtime_ns
    draw_cohort(SMALL, tmp_path)
    assert {path.name: path.read_bytes() for path in first.slides.iterdir()} == expected
    assert kept.stat().st_mtime_ns == before


def test_folder_of_another_spec_is_refused_and_left_unchanged(small: PhantomCohort) -> None:
    table = small.table.read_bytes()
    with pytest.raises(DataError, match=r"phantom\.json: the folder contains the phantom cohort of another spec"):
        draw_cohort(dataclasses.replace(SMALL, seed=6), small.table.parent)
    assert small.table.read_bytes() == table


@pytest.mark.parametrize(("key", "value"), [("patients", 0), ("architecture_weight", 1.2), ("two_slides", 7)])
def test_impossible_spec_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"small: {key}={value} is not within"):
        dataclasses.replace(SMALL, **{key: value})


def pair_concordance(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    """Harrell's C by its definition, pair by pair."""
    agree = pairs = 0.0
    for i, j in combinations(range(len(time)), 2):
        first, last = (i, j) if time[i] < time[j] else (j, i)
        if time[first] == time[last] or not event[first]:
            continue
        pairs += 1
        agree += 1.0 if risk[first] > risk[last] else 0.5 * (risk[first] == risk[last])
    return agree / pairs


@pytest.mark.parametrize("spec", PHANTOMS, ids=lambda spec: spec.name)
def test_oracle_is_about_080_with_half_censored(spec: PhantomSpec) -> None:
    patients = plan_patients(spec)
    time, risk = (np.array([getattr(p, key) for p in patients]) for key in ("time_months", "log_hazard"))
    event = np.array([p.event for p in patients])
    oracle = pair_concordance(time, event, risk)
    assert 0.79 <= oracle <= 0.82
    assert concordance(time, event, risk).cindex == pytest.approx(oracle, abs=2e-3)  # tied times count here only
    assert 0.45 < event.mean() < 0.6
    shares_40x = np.mean([p.magnification == 40 for p in patients])
    assert 0.05 < shares_40x < 0.12
    assert sum(len(p.slides) == 2 for p in patients) == 1


@pytest.mark.parametrize("spec", PHANTOMS, ids=lambda spec: spec.name)
def test_signals_are_independent_and_both_in_the_hazard(spec: PhantomSpec) -> None:
    patients = plan_patients(spec)
    signals = np.array([[p.architecture, p.nuclei, p.log_hazard] for p in patients]).T
    between = np.corrcoef(signals)
    assert abs(between[0, 1]) < 0.2
    assert between[0, 2] > 0.5
    assert between[1, 2] > 0.5
    assert np.all((signals[:2] >= 0) & (signals[:2] <= 1))


def test_cohorts_differ() -> None:
    first, second = (plan_patients(spec) for spec in PHANTOMS)
    correlation = np.corrcoef([p.architecture for p in first], [p.architecture for p in second])[0, 1]
    assert abs(correlation) < 0.25
    assert PHANTOMS[0].stain != PHANTOMS[1].stain
    assert PHANTOMS[0].architecture_weight != PHANTOMS[1].architecture_weight


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_first_area_average_removes_the_grains(seed: int, nuclei: float) -> None:
    fine, coarse = (
        draw_tissue(1024, 1024, 0.5, value, Stain(), np.random.default_rng(seed)).astype(np.float32)
        for value in (0.0, nuclei)
    )
    assert np.abs(halved(fine) - halved(coarse)).max() <= 1
    if nuclei > 0.1:
        assert np.abs(fine - coarse).max() > 2


def gland_cover(architecture: float) -> float:
    covers = []
    for seed in range(60):
        depth, border = gland_field(atlas(1024, 1024), architecture, np.random.default_rng(seed))
        covers.append(np.mean(depth[border < 0] > 0))
    return float(np.mean(covers))


@pytest.mark.parametrize("architecture", [0.5, 1.0])
def test_glands_cover_as_much_whatever_their_order(architecture: float) -> None:
    assert gland_cover(architecture) == pytest.approx(gland_cover(0.0), rel=0.05)


def test_tissue_stands_out_from_glass_in_saturation(small: PhantomCohort) -> None:
    from skimage.filters import threshold_otsu

    for path in small.slides.iterdir():
        with openslide.OpenSlide(path) as slide:
            step = round(8 / float(slide.properties["openslide.mpp-x"]))
            image = slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")
            saturation = np.asarray(
                image.resize((image.width // step, image.height // step), Image.Resampling.BOX).convert("HSV")
            )[..., 1]
        found = saturation > threshold_otsu(saturation)
        assert 0.5 < found.mean() < 0.98
        assert saturation[found].mean() > saturation[~found].mean() + 30


def cross_validated_r2(x: np.ndarray, y: np.ndarray) -> float:
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 12)))
    predicted = cross_val_predict(probe, x, y, cv=KFold(6, shuffle=True, random_state=0))
    return 1 - float(np.mean((y - predicted) ** 2) / y.var())


def slide_means(image: np.ndarray) -> list[np.ndarray]:
    """Mean descriptors of a slide's tiles at 20x (a third of them), 10x and 5x, glass left out."""
    means = []
    for step in (3, 1, 1):
        rows, columns = image.shape[0] // 256, image.shape[1] // 256
        tiles = image.reshape(rows, 256, columns, 256, 3).swapaxes(1, 2).reshape(-1, 256, 256, 3)[::step]
        tiles = np.rint(tiles[tiles.min(axis=3).mean(axis=(1, 2)) < 225]).astype(np.uint8)
        means.append(describe_tiles(tiles).mean(axis=0))
        image = halved(image)
    return means


@pytest.mark.slow
def test_architecture_shows_at_5x_and_nuclei_at_20x_only() -> None:
    rng = np.random.default_rng(0)
    count = 60
    architecture, nuclei = ((rng.permutation(count) + 0.5) / count for _ in range(2))
    means = [
        slide_means(draw_tissue(2048, 2048, a, n, Stain(), np.random.default_rng([9, i])))
        for i, (a, n) in enumerate(zip(architecture, nuclei, strict=True))
    ]
    x20, x10, x5 = (np.stack(level) for level in zip(*means, strict=True))
    assert cross_validated_r2(x5, architecture) > 0.75
    assert cross_validated_r2(x20, architecture) < 0.2
    assert cross_validated_r2(x20, nuclei) > 0.9
    assert cross_validated_r2(x10, nuclei) < 0.2
    assert cross_validated_r2(x5, nuclei) < 0.2


def read_at_20x(path: Path) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        return halved(image) if float(slide.properties["openslide.mpp-x"]) < 0.4 else image


@pytest.mark.long
@pytest.mark.parametrize("spec", PHANTOMS, ids=lambda spec: spec.name)
def test_survival_can_be_learnt_from_the_slides_and_permuted_survival_cannot(spec: PhantomSpec, tmp_path: Path) -> None:
    from sklearn.model_selection import KFold
    from sklearn.preprocessing import StandardScaler
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.util import Surv

    cohort, patients = draw_cohort(spec, tmp_path), plan_patients(spec)
    means = [slide_means(read_at_20x(cohort.slides / f"{p.slides[0]}.svs")) for p in patients]
    x20, x10, x5 = (np.stack(level) for level in zip(*means, strict=True))
    architecture, nuclei = (np.array([getattr(p, key) for p in patients]) for key in ("architecture", "nuclei"))
    assert cross_validated_r2(x5, architecture) > 0.75
    assert cross_validated_r2(x20, architecture) < 0.1
    assert cross_validated_r2(x20, nuclei) > 0.95
    assert max(cross_validated_r2(x10, nuclei), cross_validated_r2(x5, nuclei)) < 0.1

    def out_of_fold(time: np.ndarray, event: np.ndarray) -> float:
        x, y, risk = np.hstack([x20, x10, x5]), Surv.from_arrays(event, time), np.zeros(len(time))
        for train, test in KFold(5, shuffle=True, random_state=0).split(x):
            scale = StandardScaler().fit(x[train])
            cox = CoxPHSurvivalAnalysis(alpha=100).fit(scale.transform(x[train]), y[train])
            risk[test] = cox.predict(scale.transform(x[test]))
        return concordance(time, event, risk).cindex

    time, event = np.array([p.time_months for p in patients]), np.array([p.event for p in patients])
    assert out_of_fold(time, event) > 0.72
    null = [
        out_of_fold(time[order], event[order]) for order in map(np.random.default_rng(3).permutation, [len(time)] * 10)
    ]
    assert 0.42 < np.mean(null) < 0.58
