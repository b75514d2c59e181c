"""Build what MLflow stores about a run: name, tags, parameters, input data and score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from cfusion.config import Config
from cfusion.data.shard_index import ShardIndex
from cfusion.extensions import plain_name
from cfusion.study.packaged import data_name
from cfusion.types import Cohort


def run_name(config: Config, encoder: str) -> str:
    """Return the name of a run: cohort, encoder, model and seed, then a protocol other than strict."""
    parts = [config.cohort.name, encoder, plain_name(config.model.name), f"seed{config.seed}"]
    if config.evaluation.protocol != "strict":
        parts.append(config.evaluation.protocol)
    if config.evaluation.permute_outcomes is not None:
        parts.append(f"permuted{config.evaluation.permute_outcomes}")
    return "-".join(parts)


def run_tags(config: Config, encoder: str) -> dict[str, str]:
    """Return the tags by which runs are searched and grouped."""
    return {
        "cohort": config.cohort.name,
        "encoder": encoder,
        "model": config.model.name,
        "seed": str(config.seed),
        "protocol": config.evaluation.protocol,
        "outcomes": "real" if config.evaluation.permute_outcomes is None else "permuted",
    }


def run_params(config: Config, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting that decides the numbers as `section.key`, and the digests of the data.

    Parameters of MLflow never change, and the other settings may when a run is continued.
    """
    flat = pd.json_normalize(config.deciding()).iloc[0]
    digests = {name: provenance[name] for name in ("shards_digest", "splits_digest", "table_sha256", "program")}
    if "model_code" in provenance:
        digests["model_code_sha256"] = provenance["model_code"]["sha256"]
    return {str(key): value for key, value in flat.items()} | digests


def run_inputs(
    config: Config, cohort: Cohort, index: ShardIndex, provenance: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Return MLflow's inputs: the clinical tables, the shards and the folds, each with its digest."""
    patients = {"patients": len(cohort.cases), "events": int(cohort.cases["event"].sum()), "endpoint": cohort.endpoint}
    embeddings = {
        "encoder": index.encoder, "dim": index.dim, "magnifications": index.magnifications, "dtype": index.dtype,
        "slides": len(index.samples), "bytes": sum(shard.size for shard in index.shards), **index.provenance,
    }  # fmt: skip
    directory = config.splits.directory
    directories = list(directory.values()) if isinstance(directory, dict) else [directory] if directory else []
    folds = ", ".join(map(data_name, directories)) or "drawn"
    digest, shards = provenance["table_sha256"], config.data.where
    digests = digest if isinstance(digest, Mapping) else {cohort.name: digest}
    tables = [
        _input(f"{one.name} outcomes", digests[one.name], data_name(one.table), "outcomes", patients)
        for one in config.cohort_configs
    ]
    return [
        *tables,
        _input(f"{cohort.name} {index.encoder}", provenance["shards_digest"], shards, "bags", embeddings),
        _input(
            f"{cohort.name} folds", provenance["splits_digest"], folds, "folds",
            config.splits.model_dump(mode="json"),
        ),
    ]  # fmt: skip


def _input(name: str, digest: str, source: str, context: str, profile: Mapping[str, Any]) -> dict[str, str]:
    kind = "http" if "://" in source else "local"
    return {
        "name": name, "digest": digest, "kind": kind, "source": json.dumps({"uri": source}), "context": context,
        "profile": json.dumps(profile, default=str),
    }  # fmt: skip


def version_tags(config: Config, summary: pd.Series) -> dict[str, str]:
    """Return the tags of a registered version: what it was trained on, and its score."""
    tags = run_tags(config, "")
    del tags["encoder"]
    return {
        **tags,
        "endpoint": config.cohort.endpoint,
        "patients": str(summary["n"]),
        "cindex": f"{summary['cindex_within']:.4f}",
        "low": f"{summary['within_low']:.4f}",
        "high": f"{summary['within_high']:.4f}",
    }
