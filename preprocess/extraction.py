"""Extract features from slides into a feature store: select the slides and write the results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cfusion
from cfusion.console import Progress, progress
from cfusion.data.store import FeatureStore, write_slide
from cfusion.data.tile_places import LEVEL_0
from cfusion.errors import CfusionError, ConfigError, DataError, RequeueError, SlideError
from cfusion.files import digest_file, digest_json
from cfusion.types import SlideFeatures
from preprocess.annotation import check_masks, find_mask
from preprocess.artefacts import ARTEFACTS
from preprocess.encoders import Encoder, load_slots, tiles_per_batch
from preprocess.grid import GRID_VERSION, TILE_PX, check_halving
from preprocess.names import without_suffix
from preprocess.outcome import ALREADY, SlideOutcome, Summary, store_is_lost, write_summary
from preprocess.pipeline import Pipeline, Work
from preprocess.resolution import read_mpp_table, scale_of
from preprocess.settings import PreprocessConfig
from preprocess.slide_files import find_slides, same_name, slide_id_of
from preprocess.slide_headers import other_dicom_class
from preprocess.slide_plan import SlidePlan, plan_slide
from preprocess.slides import Slide, open_slide
from preprocess.tissue import METHOD

logger = logging.getLogger(__name__)


def preprocess_slides(
    config: PreprocessConfig,
    *,
    slots: Sequence[Sequence[Encoder]] | None = None,
    strict: bool = False,
    overwrite: bool = False,
    share: tuple[int, int] = (0, 1),
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Extract the features of all slides of `config.slides` into `config.store`.

    A slide is done when its group is complete and was made with the same configuration. Such slides are skipped, so
    the same call resumes an interrupted extraction. A slide that cannot be read is listed with the reason.

    Args:
        config: Settings of preprocessing.
        slots: Loaded encoders, one list per device or thread that encodes; None: those that `config` names.
        strict: Raise at the first slide that fails.
        overwrite: Extract stale slides again: those made with another configuration or from another file. Every slide
            is opened and compared, even if its file's size and time are unchanged.
        share: (number, of): this process does one of `of` equal shares of the slides.
        stop: Asked after each batch of tiles whether to stop.

    Returns:
        The outcome of each slide, also written to `summary.csv` in the store.

    Raises:
        DataError: No slide was found, the store cannot be written, an encoder returns invalid embeddings, or, if
            `strict`, a slide failed.
        ConfigError: An encoder, the magnifications or the table of resolutions cannot be used.
        RequeueError: `stop` returned true; finished slides are kept.
    """
    start = time.monotonic()
    paths, table = check_inputs(config)
    slots = load_slots(config) if slots is None else slots
    run = _Run(config, slots, table, strict, overwrite, stop)
    mine = paths[share[0] :: share[1]]
    todo = run.sort_out(mine, same_name(paths))
    with progress("Slides", sum(len(some) for some in todo.values())) as bar:
        run.extract(todo, bar)
    outcomes = tuple(run.outcomes[path] for path in mine)
    name = "summary.csv" if share[1] == 1 else f"summary-{share[0]}-of-{share[1]}.csv"
    seconds = time.monotonic() - start
    idle = max(0.0, 1 - _busy_seconds(slots, run.pipeline.encode_seconds) / seconds)
    return Summary(outcomes, seconds, run.pipeline.pixels, idle, write_summary(config.store / name, outcomes))


def _busy_seconds(slots: Sequence[Sequence[Encoder]], encoding: float) -> float:
    """Return the seconds in which an average slot encoded.

    Networks count the time in which they ran; of other encoders only the seconds in calls are known, `encoding` in all.
    """
    clocks = [{id(e): clock for e in slot if (clock := getattr(e, "clock", None)) is not None} for slot in slots]
    if any(len(found) < len(slot) for found, slot in zip(clocks, slots, strict=True)):
        return encoding / len(slots)
    devices = {tuple(found): sum(clock.seconds for clock in found.values()) for found in clocks}
    return sum(devices.values()) / len(devices)


def check_inputs(config: PreprocessConfig) -> tuple[list[Path], dict[str, float]]:
    """Find the slides, and check what the settings name, without reading a slide.

    Returns:
        The slides, and µm/px by slide of the table of resolutions.

    Raises:
        DataError: No slide was found, or masks belong to other slides.
        ConfigError: The magnifications or the table of resolutions cannot be used.
    """
    check_halving(config.magnifications)
    paths = find_slides(config.slides)
    slide_ids = [slide_id_of(path) for path in paths]
    check_masks(config.masks, slide_ids)
    return paths, _table_for(config, slide_ids)


def _table_for(config: PreprocessConfig, slide_ids: Sequence[str]) -> dict[str, float]:
    """Read the table of resolutions, and compare its names with those of the slides.

    Raises:
        ConfigError: None of its rows is of one of the slides.
    """
    if config.mpp_table is None:
        return {}
    table = read_mpp_table(config.mpp_table)
    names = {*slide_ids, *(without_suffix(slide_id) for slide_id in slide_ids)}
    unused = [name for name in table if name not in names]
    if len(unused) == len(table):
        raise ConfigError(
            f"{config.mpp_table}: none of its {len(table)} rows has the name of a slide, such as {slide_ids[0]}"
            f"{f'; its first row is of {unused[0]}' if unused else ''}.",
            "Write the names of the slides into slide_id, with or without their suffixes.",
        )
    if unused:
        logger.warning(
            "%s: %d rows have the name of no slide: %s", config.mpp_table, len(unused), ", ".join(unused[:5])
        )
    return table


def configuration_digest(config: PreprocessConfig, encoder: Encoder) -> str:
    """Compute the digest of everything that features depend on, except the slide, its resolution and its mask."""
    return digest_json({
        "encoder": encoder.name, "identity": encoder.identity, "magnifications": config.magnifications,
        "resolution": config.resolution, "resample": config.resample, "min_tissue": config.min_tissue,
        "min_piece_um2": config.min_piece_um2, "tissue": METHOD, "grid": GRID_VERSION, **_left_out(config),
    })  # fmt: skip


def _settings(config: PreprocessConfig) -> dict[str, Any]:
    """Return the settings that features depend on, as stored in a slide's attributes."""
    return {
        "magnifications": list(config.magnifications), "resolution": config.resolution, "resample": config.resample,
        "min_tissue": config.min_tissue, "min_piece_um2": config.min_piece_um2, "grid_version": GRID_VERSION,
        **_left_out(config),
    }  # fmt: skip


def _left_out(config: PreprocessConfig) -> dict[str, Any]:
    """Return the version of the artefacts that are left out; nothing if they are kept, as in older stores."""
    return {"artefacts": ARTEFACTS} if config.artefacts else {}


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text or "none"


@dataclass(frozen=True)
class _OpenedNow:
    """What decides a slide's features, as its file is now."""

    mpp: float
    mpp_source: str
    slide_bytes: int
    slide_mtime_ns: int
    slide_size_px: list[int]
    slide_digest: str
    header_digest: str

    @classmethod
    def of(cls, slide: Slide) -> _OpenedNow:
        return cls(
            slide.resolution.mpp, slide.resolution.source, slide.file_bytes, slide.modified_ns, list(slide.size_px),
            slide.quickhash, slide.header_digest,
        )  # fmt: skip


class _Run:
    """One pass over slides."""

    def __init__(
        self,
        config: PreprocessConfig,
        slots: Sequence[Sequence[Encoder]],
        mpp_table: dict[str, float],
        strict: bool,
        overwrite: bool,
        stop: Callable[[], bool],
    ) -> None:
        self.config, self.encoders, self.mpp_table = config, slots[0], mpp_table
        self.strict, self.overwrite, self._stop = strict, overwrite, stop
        self.outcomes: dict[Path, SlideOutcome] = {}
        self.digests = {e.name: configuration_digest(config, e) for e in self.encoders}
        self.pipeline = Pipeline(
            slots,
            config.threads,
            tiles_per_batch(config, slots),
            self._plan,
            self._write,
            self._fail,
            self._after_batch,
        )
        self._start = time.monotonic()
        self._bar = Progress("", 0)

    def sort_out(self, paths: Sequence[Path], same: dict[str, list[Path]]) -> dict[tuple[int, ...], list[Path]]:
        """Select the slides to extract and the indices of the encoders they lack; record the outcome of the rest."""
        todo: dict[tuple[int, ...], list[Path]] = {}
        for path in paths:
            slide_id = slide_id_of(path)
            if slide_id in same:
                names = ", ".join(str(p) for p in same[slide_id])
                self._fail(path, DataError(f"{len(same[slide_id])} slides share this name: {names}.", "Rename one."))
                continue
            if other := other_dicom_class(path):
                why = f"a DICOM file of the class {other}, not a whole-slide image"
                self.outcomes[path] = SlideOutcome(slide_id, "skipped", why, path=str(path))
                continue
            try:
                lacking = self._lacking(path, slide_id)
            except CfusionError as error:
                self._fail(path, error)
                continue
            except OSError as error:
                self._fail(path, SlideError(f"{path}: cannot be read ({error.strerror or error})."))
                continue
            if lacking:
                todo.setdefault(lacking, []).append(path)
        return todo

    def _lacking(self, path: Path, slide_id: str) -> tuple[int, ...]:
        """Return the indices of the encoders to run on a slide; if there are none, its outcome is recorded."""
        there = [FeatureStore(self.config.store / e.name).attrs_if_complete(slide_id) for e in self.encoders]
        why = ["" if a is None else self._why_stale(path, e, a) for e, a in zip(self.encoders, there, strict=True)]
        lacking = tuple(i for i, attrs in enumerate(there) if attrs is None or why[i])
        if any(why) and not self.overwrite:
            reasons = ", ".join(f"{e.name} {reason}" for e, reason in zip(self.encoders, why, strict=True) if reason)
            text = f"{reasons}; --overwrite extracts it again"
            self.outcomes[path] = SlideOutcome(slide_id, "stale", text, path=str(path))
            return ()
        if not lacking:
            self.outcomes[path] = SlideOutcome(slide_id, "skipped", ALREADY, path=str(path))
        return lacking

    def extract(self, todo: Mapping[tuple[int, ...], Sequence[Path]], bar: Progress) -> None:
        """Run the slides through the pipeline."""
        self._bar = bar
        self._start = time.monotonic()
        for encoders, paths in todo.items():
            self.pipeline.run(paths, encoders)

    def _why_stale(self, path: Path, encoder: Encoder, attrs: dict[str, Any]) -> str:
        """List what changed since the slide's features were made; empty if nothing did."""
        if attrs.get("imported_from"):
            return f"imported from {attrs['imported_from']}"
        now: dict[str, Any] = {"mask_digest": self._mask_digest(slide_id_of(path)), **self._changed_file(path, attrs)}
        changed_configuration = attrs.get("config_digest") != self.digests[encoder.name]
        if changed_configuration:
            now |= {**encoder.identity, **_settings(self.config)}
        changed = [
            f"{key} {_short(attrs.get(key))}, now {_short(new)}" for key, new in now.items() if attrs.get(key) != new
        ]
        if changed or changed_configuration:
            return f"made with {'; '.join(changed) or 'another configuration'}"
        return ""

    def _changed_file(self, path: Path, attrs: dict[str, Any]) -> dict[str, Any]:
        """Return what a slide's features depend on, from its file, where it differs from the features' attributes.

        An unchanged size and time of the file mean an unchanged file, unless `overwrite` asks for a look. Where they
        changed, what decides is compared: resolution, size and the digest of the header.
        """
        stat = path.stat()
        same_file = (stat.st_size, stat.st_mtime_ns) == (attrs.get("slide_bytes"), attrs.get("slide_mtime_ns"))
        from_user = attrs.get("mpp_source") in ("table", "default") or slide_id_of(path) in self.mpp_table
        if same_file and not from_user and not self.overwrite:
            return {}
        slide = open_slide(path, self.mpp_table, self.config.default_mpp)
        now = _OpenedNow.of(slide)
        slide.close()
        # Version 0.1.0 stored no digest of the header; its size in bytes stands for it.
        header = "header_digest" if "header_digest" in attrs else "slide_bytes"
        keys = ["mpp", "slide_size_px", "slide_digest", header]
        changed = {key: getattr(now, key) for key in keys if key in attrs and attrs[key] != getattr(now, key)}
        if changed and now.slide_bytes != attrs.get("slide_bytes"):
            # Another file: its digests need not be reported.
            changed = {"slide_bytes": now.slide_bytes, **{key: changed[key] for key in ["mpp"] if key in changed}}
        finest = f"x{max(self.config.magnifications):g}"
        scale = scale_of(slide.slide_id, now.mpp, max(self.config.magnifications), self.config.resolution).factor
        stored = attrs.get("tile_px_level0", {}).get(finest)
        if "mpp" not in changed and stored and abs(stored / (TILE_PX * scale) - 1) > 1e-6:
            changed["tile_px_level0"] = {**attrs["tile_px_level0"], finest: TILE_PX * scale}
        return changed

    def _mask_digest(self, slide_id: str) -> str:
        mask = find_mask(self.config.masks, slide_id)
        return digest_file(mask) if mask else ""

    def _plan(self, path: Path) -> Any:
        return plan_slide(path, self.config, self.mpp_table)

    def _write(self, work: Work) -> None:
        """Write a slide's features, without the cells that cannot be read."""
        plan, bad = work.plan, work.bad_cells
        if len(bad) == len(plan.grid.cells):
            raise DataError(f"{work.path}: none of its {len(bad)} cells can be read: {next(iter(bad.values()))}")
        grid = plan.grid.without_cells(list(bad))
        keep = {name: ~np.isin(plan.grid.cell_of(name), list(bad)) for name in grid.names}
        coords = {name: grid.coords(name) for name in grid.names}
        parents = {name: grid.parents(name) for name in grid.names[:-1]}
        for encoder in self.encoders:
            if encoder.name not in work.features:
                continue
            features = {name: array[keep[name]] for name, array in work.features[encoder.name].items()}
            attrs = self._attrs(work, encoder)
            write_slide(self.config.store, SlideFeatures(plan.slide.slide_id, features, coords, parents, attrs))
        why = f"{len(bad)} of {len(plan.grid.cells)} cells cannot be read" if bad else ""
        resolution, tiles = plan.slide.resolution, sum(len(t) for t in grid.tiles.values())
        self.outcomes[work.path] = SlideOutcome(
            plan.slide.slide_id, "done", why, tiles, time.monotonic() - work.start, resolution.mpp, resolution.source,
            plan.reader.name, str(work.path), plan.scale.taken_as, plan.tissue_from,
            round(plan.tissue.tissue_percent, 2), round(plan.tissue.ink_percent, 2), "; ".join(self._warnings(plan)),
        )  # fmt: skip
        self._show(1)

    def _warnings(self, plan: SlidePlan) -> list[str]:
        """List what was assumed for a slide."""
        found = [plan.scale.warning] if plan.scale.warning else []
        if plan.slide.resolution.source == "default":
            found.append("the resolution is --default-mpp")
        if self.config.masks is not None and not plan.mask_digest:
            found.append("no mask file")
        found += plan.tissue.warnings
        return found

    def _attrs(self, work: Work, encoder: Encoder) -> dict[str, Any]:
        plan = work.plan
        grid, slide = plan.grid, plan.slide
        return {
            **encoder.identity, "encoder": encoder.name, "dtype": "float16",
            "config_digest": self.digests[encoder.name], "program_version": cfusion.__version__,
            "reader": plan.reader.name,
            "tile_px_level0": {n: grid.scale * grid.cell_px / grid.factor(n) for n in grid.names},
            "tissue": plan.tissue_from, "mask_digest": plan.mask_digest, **_settings(self.config),
            "coords_space": LEVEL_0, "coords_from": "extracted from the slide", **asdict(_OpenedNow.of(slide)),
            "unreadable_cells": [[int(v) for v in grid.cells[number]] for number in sorted(work.bad_cells)],
        }  # fmt: skip

    def _fail(self, path: Path, error: CfusionError) -> None:
        if self.strict or store_is_lost(error):
            raise error
        logger.warning("failed: %s", error)
        self.outcomes[path] = SlideOutcome(slide_id_of(path), "failed", str(error), path=str(path))
        self._show(1)

    def _after_batch(self) -> None:
        if self._stop():
            raise RequeueError("Asked to stop; finished slides are kept.", "The same command resumes.")
        self._show()

    def _show(self, slides: int = 0) -> None:
        """Advance the progress bar by finished slides and show the rate."""
        seconds = time.monotonic() - self._start
        gigabytes = self.pipeline.pixels * 3 / 1e9
        self._bar.advance(slides, f"{self.pipeline.tiles / seconds:.0f} tiles/s, {gigabytes / seconds:.2f} GB/s")
