"""Mean embeddings of patients, from which `cfusion audit --sites` tries to read the submitting site."""

from __future__ import annotations

import numpy as np

from cfusion.cohort.identifiers import site_of
from cfusion.config import Config
from cfusion.data.shards import ShardDataset
from cfusion.survival.site_reading import SiteReading, read_sites
from cfusion.training.folds import open_run_shards
from cfusion.types import Cohort, magnification_name


def sites_in_embeddings(config: Config, cohort: Cohort) -> SiteReading | None:
    """Read the submitting site from the patients' mean embeddings at the finest magnification.

    Args:
        config: The run; its shards are read once.
        cohort: The patients, with `site`, or with TCGA barcodes, which contain it.

    Returns:
        None if fewer than two sites have enough patients with slides in the shards.
    """
    dataset = open_run_shards(config)
    name = magnification_name(max(config.data.magnifications))
    held = set(dataset.slide_ids)
    slides = {
        case: [slide for slide in mine if slide in held]
        for case, mine in cohort.slides_of(list(cohort.cases.index)).items()
    }
    cases = [case for case, mine in slides.items() if mine]
    values = np.array([_mean(dataset, slides[case], name) for case in cases])
    return read_sites(values, np.array([_site(cohort, case) for case in cases]))


def _mean(dataset: ShardDataset, slides: list[str], name: str) -> np.ndarray:
    return np.mean(
        [np.asarray(dataset.read(slide, [name])[name], dtype=float).mean(axis=0) for slide in slides], axis=0
    )


def _site(cohort: Cohort, case: str) -> str:
    known = cohort.cases["site"].get(case) if "site" in cohort.cases.columns else None
    return site_of(case) or (str(known) if isinstance(known, str) else "")
