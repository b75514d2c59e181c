"""`cfusion preprocess remove` and `merge`: change what a feature store holds; both list the changes first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cfusion.errors import ConfigError, PartialResultError

Apply = Annotated[bool, typer.Option("--apply", help="Do it; without this, only list what would change.")]

SHOWN = 20
"""Lines of a list that are printed."""


def register(app: typer.Typer) -> None:
    """Add the commands to `cfusion preprocess`."""
    app.command()(remove)
    app.command()(merge)


def remove(
    places: Annotated[list[Path], typer.Argument(help="Feature stores and folders of shards.")],
    slide: Annotated[list[str] | None, typer.Option(help="Slide to remove.")] = None,
    patient: Annotated[list[str] | None, typer.Option(help="Patient whose slides are removed.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Clinical table with the patients' slides, unless slides have TCGA barcodes.")
    ] = None,
    apply: Apply = False,
) -> None:
    """Remove slides or patients from feature stores and shards, such as after a withdrawn consent.

    cfusion preprocess remove features shards --patient TCGA-2F-A9KO --apply
    """
    from preprocess.withdrawal import plan_removal, remove_slides

    slide_ids = [*(slide or ()), *_slides_of(places, patient or (), table)]
    if not slide_ids:
        raise ConfigError("no slides to remove.", "Give --slide or --patient.")
    removal = plan_removal(places, slide_ids)
    _show("delete", [*removal.groups, *removal.files, *removal.leftovers])
    _show("drop rows of", removal.tables)
    _show("rewrite", [folder / name for folder, names in removal.shards.items() for name in names])
    for name in removal.unknown:
        typer.echo(f"not found: {name}")
    if apply:
        remove_slides(removal)
    done = "removed" if apply else "would be removed; --apply removes them"
    typer.echo(f"{len(removal.slide_ids)} slides {done}. Runs, predictions and pictures made from them stay.")
    if removal.unknown:
        raise PartialResultError(f"{len(removal.unknown)} slides were not found.", "Check their names.")


def merge(
    source: Annotated[Path, typer.Argument(help="Feature store to copy from.")],
    target: Annotated[Path, typer.Argument(help="Feature store to copy into; may be new.")],
    apply: Apply = False,
) -> None:
    """Copy the slides of one feature store into another that lacks them; contradictions are refused.

    cfusion preprocess merge features-b features --apply
    """
    from preprocess.merging import merge_stores, plan_merge

    plan = plan_merge(source, target)
    for remark in plan.remarks:
        typer.echo(f"the stores differ: {remark}")
    refused = merge_stores(plan) if apply else plan.refused
    for name, why in refused.items():
        typer.echo(f"refused {name}: {why}")
    copied = len(plan.copied) - len(refused) + len(plan.refused)
    done = "copied" if apply else "would be copied; --apply copies them"
    typer.echo(f"{copied} groups {done}, {len(plan.same)} are there already, {len(refused)} refused")
    if refused:
        raise PartialResultError(f"{len(refused)} groups were not copied.", "See above.")


def _show(what: str, paths: Sequence[Path]) -> None:
    for path in paths[:SHOWN]:
        typer.echo(f"{what} {path}")
    if len(paths) > SHOWN:
        typer.echo(f"{what} {len(paths) - SHOWN} more")


def _slides_of(places: Sequence[Path], patients: Sequence[str], table: Path | None) -> list[str]:
    """Return the slides of patients: those that a table lists, or whose TCGA barcode is the patient's.

    Raises:
        ConfigError: A patient has no slide, or `--table` is given without a patient.
    """
    if not patients:
        if table is not None:
            raise ConfigError("--table lists the slides of patients, but no --patient is given.", "Give --patient.")
        return []
    by_patient: dict[str, set[str]] = {patient: set() for patient in patients}
    if table is not None:
        from cfusion.cohort.read import read_cohort
        from cfusion.config import CohortConfig

        cohort = read_cohort(CohortConfig(table=table))
        for patient, slides in cohort.slides_of(patients).items():
            by_patient[patient].update(slides)
    else:
        from cfusion.cohort.identifiers import patient_of
        from preprocess.withdrawal import slides_in

        for slide_id in slides_in(places):
            by_patient.get(patient_of(slide_id), set()).add(slide_id)
    for patient, found in by_patient.items():
        if not found:
            where = f"{table} lists" if table is not None else "the stores have"
            raise ConfigError(
                f"patient {patient}: {where} no slide of this patient.",
                "Check the name; --table maps patients to slides, --slide names slides.",
            )
    return [slide_id for found in by_patient.values() for slide_id in sorted(found)]
