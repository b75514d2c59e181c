"""The methods section of a paper, as far as the records of the runs have it, and the table of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cfusion.config import Config
from cfusion.report.context import PROTOCOL_TEXTS, ReportContext, endpoint_words, named
from cfusion.report.number_words import decimal, with_interval
from cfusion.report.printed_tables import Printed
from cfusion.types import magnification_name, magnification_words

_HEAD = """# Methods text

Facts from the records of the runs, to be edited. Add what no record has: where the patients come from and how they
were chosen, ethics approval, the program and the settings that extracted the features, the encoder's paper and licence.
"""

_RESULTS = (
    "C within folds with its 95% interval, from resampled patients and widened for the dependence between folds. Null: "
    "97.5% limit of risks without signal under the same protocol and folds. Hazard ratio of the high-risk against the "
    "low-risk group."
)
_ADDED = " Added: C of the clinical covariates and the risk minus C of the covariates."


def methods_text(rows: Sequence[Mapping[str, Any]], context: ReportContext) -> str:
    """Return the methods as Markdown: a section per configuration, whose seeds are listed.

    Args:
        rows: Rows of the evidence table.
        context: Where the numbers come from; runs without a recorded configuration have no section.
    """
    seeds: dict[str, list[int]] = {}
    for values in context.provenance.values():
        if "config" in values:
            seeds.setdefault(_without_seed(values), []).append(int(values["config"].get("seed", Config().seed)))
    sections = [_section(json.loads(text), found, rows, context) for text, found in seeds.items()]
    return "\n".join([_HEAD, *sections])


def results_table(rows: Sequence[Mapping[str, Any]]) -> list[Printed]:
    """Return the table of results of each protocol, for a paper."""
    return [
        _results([row for row in rows if str(row["protocol"]) == protocol], protocol)
        for protocol in dict.fromkeys(str(row["protocol"]) for row in rows)
    ]


def _results(rows: Sequence[Mapping[str, Any]], protocol: str) -> Printed:
    clinical = any(isinstance(row.get("clinical_covariates"), str) for row in rows)
    head = ("Cohort", "Model", "Patients (events)", "C within folds (95%)", "Null", "Hazard ratio (95%)")
    cells = tuple(
        (
            str(row["cohort"]), str(row["model"]), f"{row['n']} ({row['events']})",
            _with_interval(row, "cindex_within within_low within_high"), decimal(row["null_high"]),
            _with_interval(row, "hazard_ratio hazard_ratio_low hazard_ratio_high", 2),
            *((_with_interval(row, "added_c added_c_low added_c_high", 3, "+"),) if clinical else ()),
        )
        for row in rows
    )  # fmt: skip
    caption = f"{_RESULTS}{_ADDED if clinical else ''} {named(protocol)}"
    return Printed("Results", caption, (*head, "Added (95%)") if clinical else head, cells)


def _with_interval(row: Mapping[str, Any], names: str, digits: int = 3, sign: str = "") -> str:
    value, low, high = (float(row[name]) for name in names.split())
    return with_interval(value, low, high, digits, sign)


def _without_seed(values: Mapping[str, Any]) -> str:
    """Return a run's record as JSON, without what may differ between seeds."""
    config = {name: section for name, section in values["config"].items() if name != "seed"}
    kept = {**values, "config": config}
    return json.dumps(kept, sort_keys=True, default=str)


def _section(
    record: Mapping[str, Any], seeds: Sequence[int], rows: Sequence[Mapping[str, Any]], context: ReportContext
) -> str:
    config = _complete(record["config"])
    key = config["cohort"]["name"], config["model"]["name"], config["evaluation"]["protocol"]
    counts = [row for row in rows if (row["cohort"], row["model"], row["protocol"]) == key]
    patients = f"{counts[0]['n']} patients with {counts[0]['events']} events" if counts else "See the table of results"
    scales = ", ".join(magnification_words(magnification_name(m)) for m in config["data"]["magnifications"])
    packages = ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items())
    digests = "; ".join(f"{name} `{record[name]}`" for name in record if name.endswith(("_digest", "_sha256")))
    paragraphs = {
        "Patients": f"{patients}; event: {endpoint_words(context.endpoints.get(key[0]))}.",
        "Features": f"Embeddings of the encoder {config['data']['encoder'] or 'that the shards name'} at {scales}.",
        "Model": _model(config, seeds),
        "Validation": f"Cross-validation over {_folds(config['splits'])}. {PROTOCOL_TEXTS[key[2]]}",
        "Measures": (
            "Harrell's C over the pairs of patients of the same fold, with 95% intervals from "
            f"{config['evaluation']['bootstrap']} bootstrap replicates of patients, widened for the dependence between "
            "folds; compared with simulated models that have learnt noise on the same folds. Risk groups are divided "
            "at the median risk of each fold's training patients."
        ),
        "Software": f"cfusion {record.get('program', '')}, code `{record.get('code', '')}`; {packages}.",
        "Data": f"{digests}.",
    }
    heading = f"## {key[0]}, {key[1]} ({key[2]})"
    return "\n\n".join([heading, *(f"**{name}.** {words}" for name, words in paragraphs.items())]) + "\n"


def _model(config: Mapping[str, Any], seeds: Sequence[int]) -> str:
    train, most = config["train"], "" if config["evaluation"]["protocol"] == "fixed-epoch" else "at most "
    return (
        f"{config['model']['name']}, {config['model']['embed_dim']} wide, loss {train['loss']} in "
        f"{config['evaluation']['n_bins']} time bins. Training: {train['optimizer']}, learning rate {train['lr']:g} "
        f"({train['schedule']}), weight decay {train['weight_decay']:g}, {config['parallel']['global_batch']} bags per "
        f"step, {most}{train['epochs']} epochs; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}."
    )


def _folds(splits: Mapping[str, Any]) -> str:
    if splits["directory"]:
        return f"the folds in {splits['directory']}"
    several = f", {splits['repeats']} times with new folds" if splits["repeats"] > 1 else ""
    return f"{splits['folds']} folds ({splits['scheme']}{several}; seed {splits['seed']})"


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with the defaults of what it does not state."""
    found = Config().model_dump(mode="json")
    for name, values in config.items():
        found[name] = {**found[name], **values} if isinstance(found.get(name), dict) and values else values
    return found
