"""The TRIPOD+AI reporting checklist (Collins et al., BMJ 2024; 385: e078378), and where a report answers each item."""

from __future__ import annotations

_AUTHORS = "for the authors"

TRIPOD_ITEMS: tuple[tuple[str, str, str], ...] = (
    ("1", "Title: model development or evaluation, population, outcome", f"heading (--title); {_AUTHORS}"),
    ("2", "Abstract", f"the opening sentences; {_AUTHORS}"),
    ("3a–c", "Background: context, target population, known inequalities", _AUTHORS),
    ("4", "Objectives: development or validation", _AUTHORS),
    ("5a, b", "Sources of the data; dates of participants", f"Provenance: tables with SHA-256; dates {_AUTHORS}"),
    (
        "6a–c",
        "Setting, eligibility, treatments",
        f"What was done: flow, findings of the audit; treatments {_AUTHORS}",
    ),
    ("7", "Data preparation and its fairness between groups", "Provenance: configuration, encoder, grid"),
    ("8a–c", "Outcome and time horizon, assessors, blinding", f"Results: end point and horizons; assessors {_AUTHORS}"),
    ("9a–c", "Predictors: choice, definition, assessors", "Provenance: encoder and magnifications; Beyond the clinic"),
    ("10", "Sample size", "`cfusion null --power`; the note on few events"),
    ("11", "Missing data", "What was done: patients dropped; covariates filled from training patients"),
    ("12a", "Division of the data", "What was done: folds, protocol; digest in Provenance"),
    ("12b", "Handling of predictors", "Provenance: configuration"),
    ("12c", "Type of model, training, internal validation", "Provenance: model, training; What was done: protocol"),
    ("12d", "Heterogeneity between clusters", "The patients: C by site"),
    ("12e", "Measures of performance", "How to read this"),
    ("12f", "Model updating", "none is done"),
    ("12g", "How predictions are calculated", "the saved models (safetensors) of every fold; `cfusion predict`"),
    ("13", "Class imbalance", "none is corrected unless train.sampling=weighted; Provenance"),
    ("14", "Fairness", "The patients: C by sex, age and site"),
    ("15", "Output of the model, thresholds", "Model by model: cut-off of the risk groups; Calibration"),
    ("16", "Differences between training and evaluation data", "What was done; The patients: covariates by fold"),
    ("17", "Ethical approval", _AUTHORS),
    (
        "18a–f",
        "Funding, conflicts, protocol, registration, sharing",
        f"code and data digests; rest {_AUTHORS}",
    ),
    ("19", "Patient and public involvement", _AUTHORS),
    ("20a–c", "Participants: flow, characteristics, comparison", "What was done: flow; The patients: by fold"),
    ("21", "Participants and events in each analysis", "Results; The patients: by fold"),
    ("22", "Full model specification", "the saved models; Provenance"),
    (
        "23a, b",
        "Performance with intervals, in subgroups; heterogeneity",
        "Results; The patients: subgroups, sites",
    ),
    ("24", "Results of model updating", "none is done"),
    ("25", "Interpretation, fairness", _AUTHORS),
    ("26", "Limitations", f"warnings at the top; {_AUTHORS}"),
    ("27a–c", "Usability: poor input, interaction, next steps", f"the audit refuses or names poor input; {_AUTHORS}"),
)
"""Item, what it asks for, and the section of the report that answers it."""
