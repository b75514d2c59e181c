"""Which patient a slide belongs to, and so which fold models have not seen it."""

from types import SimpleNamespace

import pytest

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.cohort.slide_owners import SlideOwners
from cfusion.training.seen import Seen, digest_case


def fold(number: int, *patients: str) -> SimpleNamespace:
    """A model as far as it matters here: its fold, and the patients of its training."""
    seen = Seen(frozenset(map(digest_case, patients)), None)
    return SimpleNamespace(seen=seen, card=SimpleNamespace(fold=number))


@pytest.mark.parametrize(
    ("slide", "patient", "folds"),
    [
        ("p-7-a", "p-7", [1]),
        ("p-7_2.1", "p-7", [1]),
        ("p-7", "p-7", [1]),
        ("p-70-a", "p-70-a", [0, 1]),
        ("q-1-a", "q-1", [0]),
        ("TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001", [1]),
    ],
)
def test_a_slide_without_a_table_belongs_to_the_patient_whose_name_it_starts_with(slide, patient, folds):
    ensemble = FoldEnsemble((fold(0, "p-7", "TCGA-AA-0001"), fold(1, "q-1", "q")))
    assert SlideOwners(ensemble.find_trained).patient(slide) == patient
    models, note = ensemble.not_seen_by(patient)
    assert [model.card.fold for model in models.models] == folds
    assert (note is None) == (len(folds) == 2)
