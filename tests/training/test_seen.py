"""What a model has seen: its patients, and the region of their mean embeddings."""

import numpy as np
import pytest

from cfusion.errors import DataError
from cfusion.training.seen import EmbeddingRegion, Seen, digest_case, outside_words


def embeddings(patients: int, seed: int, columns: int = 60) -> np.ndarray:
    """Correlated columns, as of an encoder: eight directions and a little noise."""
    mixing = np.random.default_rng(0).normal(size=(8, columns))
    rng = np.random.default_rng(seed)
    return 3 + rng.normal(size=(patients, 8)) @ mixing + 0.3 * rng.normal(size=(patients, columns))


@pytest.mark.parametrize("patients", [40, 150, 300])
def test_patients_like_those_of_the_training_are_inside(patients):
    region = EmbeddingRegion.fit(embeddings(patients, 1))
    assert region is not None
    shares = [float((region.distance(embeddings(500, seed)) > 1).mean()) for seed in (2, 3, 4)]
    assert max(shares) < 0.05 if patients > 100 else max(shares) < 0.09
    for seed in range(10, 20):
        assert outside_words(region.distance(embeddings(60, seed)), patients) is None


@pytest.mark.parametrize("kind", ["all columns", "one column", "scale", "another encoder"])
def test_another_stain_scanner_or_encoder_is_outside(kind):
    region = EmbeddingRegion.fit(embeddings(150, 1))
    assert region is not None
    shifted = embeddings(60, 2)
    if kind == "all columns":
        shifted += 3
    elif kind == "one column":
        shifted[:, 5] += 6 * shifted[:, 5].std()
    elif kind == "scale":
        shifted *= 3
    else:
        shifted = shifted[:, ::-1]
    words = outside_words(region.distance(shifted), 150)
    assert words is not None
    assert "of 60 patients" in words


def test_a_column_that_never_varied_makes_no_infinite_distance():
    values = embeddings(60, 1)
    values[:, 3] = 1.5
    region = EmbeddingRegion.fit(values)
    assert region is not None
    near = embeddings(40, 2)
    near[:, 3] = 1.5 + 1e-5
    assert outside_words(region.distance(near), 60) is None
    assert EmbeddingRegion.fit(np.ones((60, 5))) is None
    assert EmbeddingRegion.fit(values[:19]) is None


def test_a_saved_region_gives_the_same_distances(tmp_path):
    region = EmbeddingRegion.fit(embeddings(60, 1))
    seen = Seen(frozenset(map(digest_case, ("a", "b"))), region)
    seen.save(tmp_path / "training.npz")
    again = Seen.load(tmp_path / "training.npz")
    assert digest_case("A ") in again.digests
    assert region is not None
    assert again.region is not None
    others = embeddings(30, 2)
    np.testing.assert_allclose(again.region.distance(others), region.distance(others), rtol=1e-4)
    assert np.isnan(again.percentile(np.zeros(2))).all()
    Seen(seen.digests, None, np.array([-2.0, -1.0, -1.0, 0.0])).save(tmp_path / "few.npz")
    few = Seen.load(tmp_path / "few.npz")
    assert few.region is None
    assert few.percentile(np.array([-3.0, -1.0, -0.5, 0.0, 1.0])).tolist() == [0, 50, 75, 87.5, 100]
    (tmp_path / "few.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read"):
        Seen.load(tmp_path / "few.npz")
    np.savez(tmp_path / "few.npz", patients=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        Seen.load(tmp_path / "few.npz")


def test_patients_whose_distance_is_unknown_count_neither_way():
    assert outside_words(np.array([np.nan, np.nan]), 50) is None
    assert outside_words(np.array([np.nan, *[2.0] * 10]), 50) is not None
    assert outside_words(np.array([2.0, *[0.5] * 30]), 50) is None
