"""Write the configuration that `cfusion init` proposes: settings with the reason for each as a comment."""

from __future__ import annotations

import shlex
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cfusion.cohort.audit import audit
from cfusion.config import SCHEMA, Config, validate
from cfusion.errors import ConfigError
from cfusion.files import write_text
from cfusion.proposal.clinical_table import ProposedCohort, propose_cohort, with_slides
from cfusion.proposal.feature_folder import FeatureAnswers, ShardedFeatures, shard_features
from cfusion.proposal.recommended_settings import Recommended, model_for, settings_for_patients
from cfusion.runs.run import Run

_COMMENT_AT = 30
"""Column of comments, where the setting is shorter."""

FIRST_EPOCHS = 5
"""Epochs of a first try: enough to see that everything works, too few to report."""

_OPTIONAL = {
    "cohort": ("covariates_table: clinic.csv", "age, sex, stage, grade by case_id: what slides add to them"),
    "splits": ("scheme: site", "keep the patients of one hospital on one side of each fold"),
    "data": ("max_tiles: 4096", "per bag, drawn again each epoch, if memory or time is short"),
    "train": ("lr: 3.0e-4", "the default"),
}
"""A setting of each section that is worth knowing, as a comment."""


@dataclass(frozen=True)
class Study:
    """A proposed configuration.

    Attributes:
        path: The file.
        config: What it says.
        features: The shards it reads.
        run: The audited run.
    """

    path: Path
    config: Config
    features: ShardedFeatures
    run: Run


def propose_study(table: Path, source: Path, out: Path, name: str | None, answers: FeatureAnswers) -> Study:
    """Read a table and a folder of features, make shards where there are none, audit, and write a configuration.

    Safe to call again: finished slides and shards are kept.

    Args:
        table: The clinical table.
        source: Shards, a feature store, or a folder of another program.
        out: The file to write. Shards and imported features go next to it.
        name: Name of the cohort; None: that of the file.
        answers: What the user says about the features.

    Raises:
        ConfigError: The file exists, or the table or the folder has no known layout.
        DataError: The table or the features cannot be used, or the audit refuses them; then no file is written.
    """
    if out.exists():
        raise ConfigError(f"{out}: already exists.", "Give another --out, or delete it.")
    stem = out.with_suffix("")
    # The table first: an import may take many minutes, and an error of the table would come after it.
    cohort = propose_cohort(table, name or stem.name)
    features = shard_features(source, Path(f"{stem}-shards"), Path(f"{stem}-features"), answers)
    cohort = with_slides(cohort, features.tiles)
    text = _text(out, cohort, features)
    config = validate(Config, yaml.safe_load(text), str(out))
    run = Run.prepare(config)
    write_text(out, text)
    return Study(out, config, features, run)


def first_try(study: Study) -> str:
    """Return the command of a short training, whose folder does not stand in the way of the complete one."""
    changes = ["splits.repeats=1", f"train.epochs={FIRST_EPOCHS}", f"output={study.config.output}-first-try"]
    return shlex.join(["cfusion", "train", str(study.path), *changes])


def _counts(cohort: ProposedCohort, features: ShardedFeatures) -> tuple[int, int]:
    """Return the number of patients with features, and of those with the event."""
    available = {slide: {name for name, count in tiles.items() if count} for slide, tiles in features.tiles.items()}
    cases = audit(cohort.cohort, [], available=available).cohort.cases
    return len(cases), int(cases["event"].sum())


def _text(out: Path, cohort: ProposedCohort, features: ShardedFeatures) -> str:
    patients, events = _counts(cohort, features)
    settings = [
        Recommended(f"cohort.{key}", value, cohort.reasons.get(key, "")) for key, value in cohort.values.items()
    ]
    tiles = [max(of_slide.values()) for of_slide in features.tiles.values()]
    settings += [
        Recommended("data.shards", str(features.shards), f"made from {features.came_from}"),
        Recommended("data.encoder", features.encoder, f"{features.dim} wide; shards of any other are refused"),
        *model_for(features.magnifications),
        *settings_for_patients(patients, events),
        Recommended("output", str(Path("runs") / out.stem), "checkpoints, predictions, report"),
    ]
    path = shlex.quote(str(out))
    head = (
        f"{out.name}: proposed by `cfusion init` for {patients} patients with features, {events} with the event; "
        f"{len(features.tiles)} slides with a median of {statistics.median(tiles):,.0f} tiles. "
        f"Check it: `cfusion audit {path}`. What the training will do: `cfusion train {path} --dry-run`. Train: "
        f"`cfusion train {path}`. All settings: `cfusion train {path} "
        "--print-config`."
    )
    lines = [f"# yaml-language-server: $schema={SCHEMA}", *_comment(head)]
    for remark in (*features.remarks, *_advice(features)):
        lines += _comment(remark[0].upper() + remark[1:] + ".")
    return "\n".join([*lines, *_sections(settings)]) + "\n"


def _advice(features: ShardedFeatures) -> list[str]:
    if len(features.magnifications) != 1 or features.magnifications[0] == 0:
        return []
    return [
        "one magnification only: if the features have coordinates, crossfusion can read their means as coarser "
        "ones; run `cfusion preprocess derive STORE --out derived` and `cfusion init` on derived"
    ]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False,
                         break_long_words=False)  # fmt: skip


def _sections(settings: Sequence[Recommended]) -> list[str]:
    """Return the settings as YAML, in the order of the sections of `Config`."""
    lines = []
    for section in Config.model_fields:
        own = [s for s in settings if s.key.partition(".")[0] == section]
        if own and own[0].key == section:
            lines.append(_line(f"{section}: {_scalar(own[0].value)}", own[0].reason))
        elif own:
            lines.append(f"{section}:")
            lines += [_line(f"  {s.key.partition('.')[2]}: {_scalar(s.value)}", s.reason) for s in own]
            written = {s.key.partition(".")[2] for s in own}
            setting, reason = _OPTIONAL.get(section, ("", ""))
            if setting and setting.partition(":")[0] not in written:
                lines.append(_line(f"  # {setting}", reason))
    return lines


def _line(setting: str, reason: str) -> str:
    return f"{setting:<{_COMMENT_AT}}  # {reason}" if reason else setting


def _scalar(value: object) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("\n...\n").strip()
    )
