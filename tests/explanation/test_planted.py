"""Test that models find planted regions in phantom slides, although their training slides had only one tissue each."""

import pytest

from benchmarks.faithfulness import measure


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_planted_regions_are_ranked_and_their_removal_lowers_the_risk(tmp_path):
    table = measure(tmp_path, ["crossfusion"], patients=240, folds=5, slides=2, cells=4, seeds=[7])
    print(table.to_string(float_format="{:.2f}".format))
    auroc, area = table["auroc"]["crossfusion"], table["area"]["crossfusion", "both"]
    assert auroc["both", "x20", "occlusion"] >= 0.8
    assert auroc["both", "x5", "occlusion"] >= 0.8
    assert 0.35 <= auroc["architecture", "x20"].min() <= auroc["architecture", "x20"].max() <= 0.65, "not seen at 20x"
    assert auroc["nuclei", "x20"].max() > auroc["architecture", "x20"].max(), "seen only at 20x"
    assert area["x20", "occlusion"] > 0
    assert area["x5", "occlusion"] > 0
