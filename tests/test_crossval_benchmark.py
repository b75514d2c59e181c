"""The benchmark of a cross-validation runs both sides on the same patients and counts what it says."""

import pytest

from benchmarks import published_training
from benchmarks.crossval import ours, rows_of
from benchmarks.crossval_files import NAMES, Size, make_files
from benchmarks.published_model import PublishedAMIL
from benchmarks.published_training import theirs
from cfusion.data.shards import ShardDataset


@pytest.mark.slow
def test_both_sides_are_measured_on_the_same_patients(tmp_path, monkeypatch):
    monkeypatch.setattr(published_training, "WORKERS", 1)
    size = Size(patients=30, tiles=16, epochs=2)
    files = make_files(tmp_path / "files", size, NAMES["amil"])
    assert len(files.cohort.cases) == 30
    assert sorted(case for _, val in files.folds for case in val) == sorted(files.cohort.cases.index)
    one_pass = sum(s.tiles["x20"] for s in ShardDataset.open(tmp_path / "files" / "shards").index.samples) * 1024

    left = ours(files, "amil", size, tmp_path, cold=True, device="cpu")
    right = theirs(files, lambda: PublishedAMIL(1024, 4), size, cold=True, device="cpu")

    assert left.read == 2 * one_pass * 5, "two epochs, one that validates, one that predicts, one of the region; f16"
    assert right.read > 8 * one_pass * 4, "two epochs of five folds, drawn with replacement; f32"
    assert len(left.epochs) == 4
    assert len(right.epochs) == 2
    rows = {row.case: row for row in rows_of("amil", left, right, size.epochs)}
    assert rows["amil: read"].ratio == pytest.approx(right.read / left.read)
    assert rows["amil: wall"].ours == left.wall > left.tracking > 0
    assert rows["amil: share of tracking"].theirs is None
