"""Several sets of shards read as one."""

import numpy as np
import pytest
from factories import CohortFiles, MadeUpStore, make_cohorts, slide_features

from cfusion.config import DataConfig
from cfusion.data.shards import open_shards
from cfusion.errors import ShardsError
from preprocess.packing import pack_store


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, CohortFiles]:
    return make_cohorts(tmp_path_factory.mktemp("cohorts"), patients=6)


def test_the_slides_of_both_sets_have_the_same_bytes(files):
    sets = [open_shards(DataConfig(shards=str(one.shards))) for one in files.values()]
    joined = open_shards(DataConfig(shards=[str(one.shards) for one in files.values()]))
    assert joined.slide_ids == (*sets[0].slide_ids, *sets[1].slide_ids)
    for one in sets:
        for slide in one.slide_ids:
            for name, array in joined.read(slide, ["x20", "coords_x5"]).items():
                np.testing.assert_array_equal(array, one.read(slide, [name])[name])
    read = dict(joined.samples())
    assert set(read) == set(joined.slide_ids)
    assert joined.index.digest not in {one.index.digest for one in sets}
    backwards = open_shards(DataConfig(shards=[str(one.shards) for one in reversed(files.values())]))
    assert backwards.index.digest != joined.index.digest


def packed(folder, slides, **attrs):
    for slide in slides:
        slide.attrs.update(attrs)
    pack_store(MadeUpStore(slides), folder)
    return str(folder)


def test_other_embeddings_and_the_same_slide_are_refused(files, tmp_path):
    first = str(files["short"].shards)
    rng = np.random.default_rng(0)
    wide = packed(tmp_path / "wide", [slide_features("W-1", 2, 16, rng)])
    with pytest.raises(ShardsError, match=r"made-up \(16 wide\) and of made-up \(8 wide\)"):
        open_shards(DataConfig(shards=[first, wide]))
    twice = packed(tmp_path / "twice", [slide_features("S-0003-1", 2, 8, rng)])
    with pytest.raises(ShardsError, match=r"slide S-0003-1 is in .*short.* and in .*twice"):
        open_shards(DataConfig(shards=[first, twice]))
    one = packed(tmp_path / "one", [slide_features("A-1", 2, 8, rng)], weights="abc")
    other = packed(tmp_path / "other", [slide_features("B-1", 2, 8, rng)], weights="def")
    with pytest.raises(ShardsError, match="embeddings with weights def and with weights abc"):
        open_shards(DataConfig(shards=[one, other]))
