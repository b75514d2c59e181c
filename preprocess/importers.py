"""Import features that other programs extracted.

Supported layouts: the published CrossFusion program, CLAM, TRIDENT, STAMP, slide encoders, and plain files. `alignment`
reports what a layout's coordinates allow. Where they allow no alignment, none is invented. What contradicts itself is
refused, and the message names both sides and the option that decides.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import cfusion
from cfusion.console import progress
from cfusion.data.encoder_names import encoder_name
from cfusion.data.store import FeatureStore, array_digest, checked_name, write_slide
from cfusion.data.tile_places import LEVEL_0, check_on_slide
from cfusion.errors import CfusionError, ConfigError, LayoutError, MissingExtraError, StoreError
from cfusion.types import FEATURE_SUFFIXES, SlideFeatures
from preprocess.feature_files import said
from preprocess.import_checks import check_magnification, check_tilings, missing_magnifications, odd_widths
from preprocess.import_levels import as_f16, geometry_attrs, linked, read_levels, to_pixels
from preprocess.layouts import (
    FeatureFile,
    Found,
    SourceFolder,
    find_clam,
    find_published,
    find_stamp,
    find_trident,
    slide_name,
)  # fmt: skip
from preprocess.names import files_below
from preprocess.outcome import SlideOutcome, store_is_lost, write_summary
from preprocess.plain_files import WITHOUT_PATCHES, find_plain
from preprocess.resolution import read_mpp_table
from preprocess.slide_embeddings import FOLDER, find_slide_embeddings
from preprocess.slide_files import find_slides, same_name, slide_id_of
from preprocess.slides import SlideGeometry

logger = logging.getLogger(__name__)

LAYOUTS: dict[str, Callable[[SourceFolder], Found]] = {
    "published": find_published,
    "trident": find_trident,
    "clam": find_clam,
    "stamp": find_stamp,
    "slide": find_slide_embeddings,
    "plain": find_plain,
}
"""Finders by layout."""

BESIDES = frozenset({"slide", "plain"})
"""Layouts for which `auto` looks only if no other fits: such files lie next to those of another layout."""

_SHOWN_SUFFIXES = 4


@dataclass(frozen=True)
class ImportOptions:
    """What the user says about features that are imported.

    Attributes:
        only: Patterns of folders or files to take; empty: all.
        magnification: Magnification of files that do not state theirs.
        slides: Folder of the slides, for µm/px, sizes, and coordinates in level-0 px.
        mpp_table: See `PreprocessConfig`; for the slides.
        default_mpp: Likewise.
        overwrite: Replace features that the store already has.
    """

    only: tuple[str, ...] = ()
    magnification: float | None = None
    slides: Path | None = None
    mpp_table: Path | None = None
    default_mpp: float | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Attributes:
        layout: The detected or given layout.
        alignment: What its coordinates allow, as a sentence.
        imported: Slides that are now in the store.
        refused: Slides that were not imported, with the reason.
        skipped: Files that were left out on purpose, with the reason.
        table: The CSV file with a row for each file: done, failed or skipped, why, and what is suspicious.
    """

    layout: str
    alignment: str
    imported: tuple[str, ...]
    refused: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    table: Path | None = None


ALIGNMENTS = {
    "grid": "tiles of all magnifications lie on one grid; parents are found by division",
    "centre": "tiles are not aligned across magnifications; each is linked to the coarser tile that "
    "contains its centre, and tiles without one are dropped",
    "none": "the files have no coordinates, so tiles have no parents in the coarser magnifications",
}


def import_features(
    source: Path,
    store: Path,
    layout: str = "auto",
    encoder: str | None = None,
    options: ImportOptions | None = None,
    found: Found | None = None,
) -> ImportReport:
    """Import the features of another program into a feature store.

    A slide whose files cannot be used is refused with the reason, and the rest are imported.

    Args:
        source: Folder that the other program wrote.
        store: Feature store.
        layout: A key of `LAYOUTS`, or auto.
        encoder: Encoder to import: its name, or `FOUND=NAME` to store the features of FOUND under NAME. Required if
            the files name none or several.
        options: Everything else that the user says.
        found: The folder's files, if `find_layout` has found them already.

    Raises:
        ConfigError: The layout is unknown, or the encoder is not named.
        LayoutError: The folder does not have the layout, or contradicts itself or the options.
        SlideError: `options.slides` has no slides.
    """
    options = options or ImportOptions()
    folder = SourceFolder(source, options.only, options.magnification)
    name, found = (layout, found) if found else find_layout(folder, layout)
    held, stored_as = _choose_encoder(source, {f.encoder for f in found.files}, encoder)
    chosen = [f for f in found.files if f.encoder in held]
    check_tilings(source, chosen)
    check_magnification(source, chosen, options.magnification)
    by_slide: dict[str, list[FeatureFile]] = {}
    for file in chosen:
        by_slide.setdefault(file.slide_id, []).append(file)
    odd = odd_widths(source, by_slide, FeatureStore(store / checked_name(stored_as)), overwrite=options.overwrite)
    run = _Import(store, stored_as, name, found.alignment, options, _slides(options))
    run.skip_others(folder, found, chosen)
    for path in folder.unreadable():
        run.refuse(path.name, [path], f"{path}: the folder cannot be searched; give it read permission")
    for slide_id, path, why in found.refused:
        # Without this file the slide would lack a magnification.
        others = [file.paths[0] for file in by_slide.pop(slide_id, [])]
        run.refuse(slide_id, [path, *others], why)
    lacking = missing_magnifications(by_slide)
    with progress("Importing", len(by_slide)) as bar:
        for slide_id, files in sorted(by_slide.items()):
            if slide_id in odd:
                run.refuse(slide_id, [path for file in files for path in file.paths[:1]], odd[slide_id])
            else:
                run.take(slide_id, files, lacking.get(slide_id, ""))
            bar.advance()
    return run.report()


def find_layout(folder: SourceFolder, layout: str) -> tuple[str, Found]:
    """Return the layout of a folder and its files.

    Args:
        folder: The folder.
        layout: A key of `LAYOUTS`, or auto.

    Raises:
        ConfigError: The layout is unknown.
        LayoutError: The folder does not have it, or fits none or several.
    """
    if not folder.path.is_dir():
        raise LayoutError(
            f"{folder.path}: {'a file, expected a folder' if folder.path.exists() else 'no such folder'}.",
            "Give the folder of the features; --only chooses files in it.",
        )
    if layout != "auto" and layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is unknown.", f"Known: auto, {', '.join(LAYOUTS)}.")
    fits: dict[str, Found] = {}
    for names in ([layout],) if layout != "auto" else (LAYOUTS.keys() - BESIDES, BESIDES):
        fits |= {name: found for name in LAYOUTS if name in names and (found := LAYOUTS[name](folder)).files}
        if fits:
            break
    if len(fits) != 1:
        known = ", ".join(LAYOUTS) if layout == "auto" else layout
        matches = f"fits the layouts {', '.join(fits)}" if fits else f"has no features of {known}"
        raise LayoutError(
            f"{folder.path}: {matches}; it contains {_content(folder.path)}.",
            "Give the folder with --from LAYOUT; see `cfusion preprocess import -h`.",
        )
    return next(iter(fits.items()))


def _content(folder: Path) -> str:
    """Say what files lie in a folder and its subfolders, by suffix."""
    counts = Counter(path.suffix.lower() or "no suffix" for path in files_below(folder) if path.is_file())
    return ", ".join(f"{number} × {suffix}" for suffix, number in counts.most_common(_SHOWN_SUFFIXES)) or "no files"


def _choose_encoder(source: Path, held: set[str | None], wanted: str | None) -> tuple[set[str | None], str]:
    """Return the encoders of the files to import, as the files name them, and the name in the store."""
    known = sorted(name for name in held if name is not None)
    which, _, stored_as = (wanted or "").partition("=")
    if not which:
        if not known:
            raise ConfigError(f"{source}: the files do not name their encoder.", "Give --encoder NAME.")
        if len({encoder_name(name) for name in known}) > 1:
            raise LayoutError(
                f"{source}: contains the encoders {', '.join(known)}.", f"Choose one, such as --encoder {known[0]}."
            )
        return set(known), encoder_name(known[0])
    fitting = {name for name in known if encoder_name(name) == encoder_name(which)}
    if known and not fitting:
        raise LayoutError(
            f"{source}: its features are of {', '.join(known)}, but --encoder says {which}.",
            f"Leave --encoder out, or give --encoder {known[0]}={stored_as or which} to store them under that name.",
        )
    # Files that name no encoder are of the one that the user names.
    return {*fitting, None}, stored_as or encoder_name(which)


@dataclass(frozen=True)
class _Slides:
    """The files of slides by name, and what is needed to find their resolution."""

    files: Mapping[str, Path]
    mpp_table: Mapping[str, float]
    default_mpp: float | None

    def geometry(self, slide_id: str) -> SlideGeometry | None:
        path = self.files.get(slide_id)
        return None if path is None else SlideGeometry.of(path, self.mpp_table, self.default_mpp)


def _slides(options: ImportOptions) -> _Slides | None:
    if options.slides is None:
        if options.mpp_table or options.default_mpp:
            raise ConfigError("--mpp-table and --default-mpp describe slides, but --slides is not given.")
        return None
    paths = find_slides(options.slides)
    if same := same_name(paths):
        slide_id, files = next(iter(same.items()))
        raise ConfigError(
            f"{options.slides}: the slides {', '.join(map(str, files))} share the name {slide_id}.", "Rename one."
        )
    table = read_mpp_table(options.mpp_table) if options.mpp_table else {}
    return _Slides({slide_id_of(path): path for path in paths}, table, options.default_mpp)


class _Import:
    """One import: takes slides, and records the outcome of each."""

    def __init__(
        self, store: Path, encoder: str, layout: str, alignment: str, options: ImportOptions, slides: _Slides | None
    ) -> None:
        self.store, self.encoder, self.layout, self.alignment = store, encoder, layout, alignment
        self.options, self.slides = options, slides
        self._outcomes: list[SlideOutcome] = []
        self._matched = 0
        self._seen: dict[tuple[Any, ...], str] = {}

    def report(self) -> ImportReport:
        """Write the table of outcomes and return the report.

        Raises:
            ConfigError: No slide of `--slides` belongs to any of the features.
        """
        table = write_summary(self.store / "import.csv", self._outcomes)
        named: dict[str, dict[str, str]] = {"done": {}, "failed": {}, "skipped": {}}
        for outcome in self._outcomes:
            key = outcome.path if outcome.status == "skipped" else outcome.slide_id
            named[outcome.status][key] = outcome.why
        if self.slides is not None and not self._matched:
            raise ConfigError(
                f"{self.options.slides}: none of its slides has the name of one of the features, such as "
                f"{self._outcomes[-1].slide_id}.",
                "Give the folder of the slides that the features were made from.",
            )
        imported = tuple(sorted(named["done"]))
        return ImportReport(self.layout, ALIGNMENTS[self.alignment], imported, named["failed"], named["skipped"], table)

    def refuse(self, slide_id: str, paths: Sequence[Path], why: str) -> None:
        """Record a slide that cannot be imported."""
        logger.warning("slide %s refused: %s", slide_id, why)
        self._outcomes += [SlideOutcome(slide_id, "failed", why, path=str(path)) for path in paths]

    def skip_others(self, folder: SourceFolder, found: Found, chosen: Sequence[FeatureFile]) -> None:
        """Record the files that look like features and are not imported."""
        used = {path for file in chosen for path in file.paths} | {path for _, path, _ in found.refused}
        encoders = {file.paths[0]: file.encoder for file in found.files}
        for path in SourceFolder(folder.path).files(*FEATURE_SUFFIXES):
            if path in used:
                continue
            if path in encoders:
                why = f"features of {encoders[path]}; --encoder {encoders[path]} imports them"
                if encoders[path] is None:
                    why = "names no encoder; --encoder NAME imports it"
            elif path.parent.name == "h5_files" and self.layout in ("plain", "published"):
                why = f"{WITHOUT_PATCHES}; link it next to h5_files/ to import coordinates, which heatmaps need"
            elif path.parent.name.startswith(FOLDER):
                why = "embedding of a slide; --from slide imports it"
            elif self.options.only:
                why = "not chosen by --only, or no features of the layout"
            else:
                why = f"no features of the layout {self.layout}"
            self._outcomes.append(SlideOutcome(slide_name(path), "skipped", why, path=str(path)))

    def take(self, slide_id: str, files: Sequence[FeatureFile], lacking: str = "") -> None:
        """Import one slide; any error refuses only this slide, unless the store cannot be written.

        Args:
            slide_id: The slide.
            files: Its features.
            lacking: Warning on magnifications that it lacks.
        """
        paths = {file.magnification: file.paths[0] for file in files}
        try:
            features, warnings = self._assemble(slide_id, files)
            if not self._is_stored(features):
                write_slide(self.store, features)
        except CfusionError as error:
            if isinstance(error, MissingExtraError) or store_is_lost(error):
                raise
            self.refuse(slide_id, list(paths.values()), str(error))
        except MemoryError:
            raise
        except Exception as error:  # a library's error is one slide's, not the run's
            logger.debug("slide %s", slide_id, exc_info=True)
            self.refuse(slide_id, list(paths.values()), f"{files[0].paths[0]}: cannot be imported ({said(error)}).")
        else:
            self._record(features, paths, warnings, lacking)

    def _record(
        self, slide: SlideFeatures, paths: Mapping[str, Path], warnings: Mapping[str, Sequence[str]], lacking: str
    ) -> None:
        """Record each file of a slide that is now in the store."""
        mpp, source = slide.attrs.get("mpp"), slide.attrs.get("mpp_source", "")
        for name, array in slide.features.items():
            found = [*warnings[name], *([lacking] if lacking else [])]
            key = (array.shape, array[0].tobytes(), array[-1].tobytes())
            if (other := self._seen.setdefault(key, slide.slide_id)) != slide.slide_id:
                found.append(f"has the features of slide {other}")
            for warning in found:
                logger.warning("slide %s, %s: %s", slide.slide_id, name, warning)
            self._outcomes.append(SlideOutcome(
                slide.slide_id, "done", tiles=len(array), mpp=mpp, mpp_source=source, reader=self.layout,
                path=str(paths[name]), warnings="; ".join(found),
            ))  # fmt: skip

    def _is_stored(self, features: SlideFeatures) -> bool:
        """Return whether the store has exactly these features.

        Raises:
            StoreError: It has others, which only `overwrite` replaces.
        """
        attrs = FeatureStore(self.store / self.encoder).attrs_if_complete(features.slide_id)
        if attrs is None or self.options.overwrite:
            return False
        digests = {f"{name}/features": array_digest(array) for name, array in features.features.items()}
        stored = {key: value for key, value in attrs.get("digests", {}).items() if key.endswith("/features")}
        if stored == digests and attrs.get("imported_from") == self.layout and self.slides is None:
            return True
        made = f"imported from {attrs['imported_from']}" if attrs.get("imported_from") else "extracted from the slide"
        raise StoreError(
            f"{self.store}: already has features of {self.encoder} of slide {features.slide_id}, {made}.",
            "Give another --store, or --overwrite to replace them.",
        )

    def _assemble(
        self, slide_id: str, files: Sequence[FeatureFile]
    ) -> tuple[SlideFeatures, dict[str, tuple[str, ...]]]:
        """Return a slide's features, and what is suspicious by magnification."""
        levels = read_levels(slide_id, files)
        geometry = self.slides.geometry(slide_id) if self.slides else None
        self._matched += geometry is not None
        unmatched = (f"{self.options.slides} has no slide of this name",) if self.slides and geometry is None else ()
        attrs = {
            "encoder": self.encoder, "imported_from": self.layout, "alignment": self.alignment,
            "program_version": cfusion.__version__, **geometry_attrs(slide_id, levels, geometry),
        }  # fmt: skip
        levels, space = to_pixels(slide_id, levels, geometry)
        levels, parents = linked(slide_id, levels)
        coords = {n: level.coords.astype(np.int32) for n, level in levels.items() if level.coords is not None}
        if coords:
            attrs |= space
        attrs["tile_px_level0"] = {n: level.side_px for n, level in levels.items() if level.side_px is not None}
        features = {name: as_f16(slide_id, name, level.features) for name, level in levels.items()}
        slide = SlideFeatures(slide_id, features, coords, parents, attrs)
        if coords and "slide_size_px" in attrs and space["coords_space"] == LEVEL_0:
            check_on_slide(slide, attrs["slide_size_px"])
        return slide, {name: (*level.warnings, *unmatched) for name, level in levels.items()}
