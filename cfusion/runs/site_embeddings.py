"""Mean embeddings of patients, from which `cfusion audit --sites` tries to read the submitting site."""

from __future__ import annotations

import numpy as np

from cfusion.cohort.identifiers import site_of
from cfusion.config import Config
from cfusion.data.slide_means import slide_means
from cfusion.survival.site_reading import SiteReading, read_sites
from cfusion.training.folds import open_run_shards
from cfusion.types import Cohort


def sites_in_embeddings(config: Config, cohort: Cohort) -> SiteReading | None:
    """Read the submitting site from the patients' mean embeddings at the finest magnification.

    Args:
        config: The run; its shards are read once.
        cohort: The patients, with `site`, or with TCGA barcodes, which contain it.

    Returns:
        None if fewer than two sites have enough patients with slides in the shards.
    """
    dataset = open_run_shards(config)
    held = set(dataset.slide_ids)
    slides = {
        case: [slide for slide in mine if slide in held]
        for case, mine in cohort.slides_of(list(cohort.cases.index)).items()
    }
    cases = [case for case, mine in slides.items() if mine]
    finest = (max(config.data.magnifications),)
    means = slide_means(dataset, sorted({slide for case in cases for slide in slides[case]}), config.data, finest)
    values = np.array([np.mean([means[slide][0] for slide in slides[case]], axis=0) for case in cases])
    return read_sites(values, np.array([_site(cohort, case) for case in cases]))


def _site(cohort: Cohort, case: str) -> str:
    known = cohort.cases["site"].get(case) if "site" in cohort.cases.columns else None
    return site_of(case) or (str(known) if isinstance(known, str) else "")
