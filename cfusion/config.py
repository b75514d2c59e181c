"""Define every setting of a run: its default, its range and its meaning.

A configuration file is YAML with the sections below; `section.key=value` overrides one key. Unknown keys and invalid
combinations are rejected when the file is read, before anything is computed. The docstring under a setting is its
description in the configuration reference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cfusion.addresses import Address, AddressesSetting, AddressSetting
from cfusion.errors import ConfigError, nearest
from cfusion.extensions import names_file
from cfusion.recipe import recipe_notes, with_recipe
from cfusion.secret_text import hide_in, without_secrets
from cfusion.study.packaged import DataPath, refuse_missing_config
from cfusion.yaml_files import apply_override, read_yaml, set_key

SCHEMA = Path(__file__).with_name("config.schema.json")
"""JSON Schema of `Config`, for editors; `cfusion configs schema` prints what it must be."""

Protocol = Literal["strict", "fixed-epoch", "published"]
"""Patients used to choose the model: an inner validation split, none, or (optimistically) the scored fold."""


CovariateType = Literal["number", "category", "ordered"] | tuple[str, ...]
"""How a clinical covariate is read; a list gives the levels of an ordered one, lowest first."""


@dataclass(frozen=True)
class Aside:
    """Marks a setting that does not decide the numbers of a run, so that runs that differ in it are one run.

    Attributes:
        reason: Why it does not, for the table in the documentation.
    """

    reason: str


class Section(BaseModel):
    """A group of settings; unknown keys are errors, and a section cannot be changed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show only the settings that differ from their default."""
        for name, value in super().__repr_args__():
            if name is None or value != type(self).model_fields[name].get_default(call_default_factory=True):
                yield name, value

    @classmethod
    def asides(cls) -> dict[str, str]:
        """Return the settings that do not decide the numbers, as `section.key`, and why."""
        found = {}
        for key, field in cls.model_fields.items():
            marks = [mark.reason for mark in field.metadata if isinstance(mark, Aside)]
            if marks:
                found[key] = marks[0]
            elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found |= {f"{key}.{inner}": reason for inner, reason in field.annotation.asides().items()}
        return found

    @classmethod
    def without_asides(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings, as plain values in sections, without those that do not decide the numbers."""
        return _without(values, cls.asides())

    def deciding(self) -> dict[str, Any]:
        """Return what decides the numbers, as plain values in sections.

        The content of tables, folds and shards decides too; the run adds its digests (`cfusion.runs.run.Run`).
        """
        return self.without_asides(self.model_dump(mode="json"))


def _without(values: Mapping[str, Any], keys: Mapping[str, str], parent: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{parent}{key}.") if isinstance(value, Mapping) else value
        for key, value in values.items()
        if f"{parent}{key}" not in keys
    }


class CohortConfig(Section):
    """Which patients, and what happened to them."""

    name: str = "cohort"
    """Short name of the cohort, used in every table and file."""
    table: Annotated[DataPath, Aside("the digest of its content decides")] = Path("cohort.csv")
    """Clinical table: CSV, TSV, or CSV in a ZIP file. `package:PATH` names a file of the installed package, such as
    `package:tcga/clinical/tcga_blca.csv`."""
    format: Literal["auto", "published", "plain", "gdc", "cdr", "cbioportal", "covariates"] = "auto"
    """Layout of the table; `auto` detects it from the columns and logs the result."""
    endpoint: Literal["OS", "DSS", "PFI"] = "OS"
    """Overall survival, disease-specific survival or progression-free interval; a table must have its columns.
    `evaluation.endpoint` (os, dss, pfi) is another name of this setting."""
    time_unit: Literal["months", "days", "years"] = "months"
    """Unit of a plain table's time column."""
    event_is: Literal["event", "censored"] = "event"
    """What 1 means in a plain table's event column. With `censored`, a column `censorship` takes precedence."""
    keep_zero_times: bool = False
    """Whether to keep patients with a follow-up of 0 (tables in whole months round early deaths to 0)."""
    follow_up: Annotated[DataPath | None, Aside("the digest of its content decides")] = None
    """The GDC's `follow_up.tsv`, which holds the follow-up times since data release 42; none: they are in `table`."""
    keep_tissue: tuple[Literal["frozen", "normal"], ...] = ()
    """Kinds of TCGA slides to keep in addition to diagnostic slides of the tumour: frozen sections, normal tissue."""
    slides: Annotated[DataPath | None, Aside("the digest of its content decides")] = None
    """Table that maps slides to cases (`slide_id, case_id`), or a GDC manifest; needed if `table` names no slides."""
    covariates: Annotated[
        dict[str, CovariateType] | None, Aside("only the clinical model uses them; the network never sees them")
    ] = None
    """Clinical covariates by column, each `number`, `category`, `ordered` (stage II, G3, low), or a list of its levels,
    lowest first; none: the columns `age`, `sex` (or `is_female`), `stage` and `grade` that the table has."""
    covariates_table: Annotated[
        DataPath | None, Aside("only the clinical model uses them; the network never sees them")
    ] = None
    """Table of the covariates by `case_id`; none: they are columns of `table`. Its columns `dss` and `dss_months`,
    `pfi` and `pfi_months` give the end points that `table` lacks."""


class SplitsConfig(Section):
    """Who trains, who chooses, who is scored."""

    directory: Annotated[DataPath | dict[str, DataPath] | None, Aside("the digest of the folds decides")] = None
    """Folder of published `splits_K.csv` files with columns train and val; with `cohorts`, either one whose files name
    the patients of all cohorts, or a folder for each cohort by its name. None: folds are drawn, in each cohort by
    itself."""
    folds: int = Field(5, ge=2)
    """Number of outer folds to draw."""
    repeats: int = Field(1, ge=1)
    """Number of repetitions of the cross-validation, each with newly drawn folds."""
    scheme: Literal["stratified", "site", "cohort"] = "stratified"
    """`stratified`: stratify patients by event and time; `site`: also keep each tissue source site on one side of a
    fold; `cohort`: leave one of `cohorts` out, so that each fold trains on the others and scores that one."""
    validation_fraction: float = Field(0.2, gt=0, lt=0.5)
    """Share of the training patients held out for early stopping and model selection under `strict`."""
    test_cases: Annotated[DataPath | None, Aside("the digest of the folds decides")] = None
    """Table with a column `case_id`: these patients are a fixed external test set; all others train."""
    fold: int | None = Field(None, ge=0)
    """Train and score only this outer fold; none: every fold."""
    within: int | None = Field(None, ge=0)
    """Nested cross-validation: draw the folds from the training patients of this outer fold; none: no nesting."""
    seed: int = 7
    """Seed for drawing the folds and the inner validation split."""


class DataConfig(Section):
    """Where bags come from and how they are read."""

    shards: Annotated[AddressesSetting, Aside("the digest of their content decides")] = Address.of("shards")
    """Folder or URL of the packed shards and their index, or a list of several, whose slides are read as one set. User,
    password and query of a URL are used and written nowhere; `~/.netrc`, `http_proxy` and fsspec's configuration are
    read too."""
    encoder: str | None = None
    """Encoder that the shards must come from; none: any."""
    magnifications: tuple[float, ...] = (20.0, 10.0, 5.0)
    """Magnifications to read, finest first; 0: embeddings of entire slides. If not set, a model of one magnification
    takes those of the shards."""
    unit: Literal["case", "slide"] = "case"
    """`case`: one bag per patient, from all of their slides; `slide`: one bag per slide, a patient's risks averaged."""
    max_tiles: int | None = Field(None, ge=1)
    """Maximum tiles per bag at the finest magnification, resampled every epoch; parents of sampled tiles are kept."""
    feature_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of embedding channels set to zero in training, the same channels for all tiles of a bag."""
    order_seed: int = 7
    """Seed for the order of bags and the sampling of tiles; runs that differ only in `seed` can share one read."""
    cache: Annotated[Literal["page", "ram", "gpu"], Aside("where bags are kept, not what is in them")] = "page"
    """`page`: rely on the operating system's page cache; `ram`/`gpu`: keep the cohort in that memory if it fits."""
    read_threads: Annotated[int, Aside("how fast bags are read, not in which order")] = Field(2, ge=1)
    """Threads that read bags ahead of the model."""
    buffer_bytes: Annotated[int, Aside("how far ahead bags are read, not in which order")] = Field(1 << 30, ge=1 << 20)
    """Maximum memory for bags read ahead, in bytes; one bag is always read ahead, whatever its size."""
    token_budget: int | None = Field(None, ge=1)
    """Maximum padded tiles (bags × tiles of the longest bag) of one forward pass; replaces train.micro_batch."""
    stage: Annotated[str | None, Aside("where shards are copied before they are read")] = None
    """Local folder to which each node copies the shards that it reads, such as `$TMPDIR`; none: shards are read where
    they are."""
    cache_directory: Annotated[Path | None, Aside("where remote shards are kept")] = None
    """Local cache folder for remote shards; none: `cfusion/shards` in the user's cache folder."""
    cache_bytes: Annotated[int, Aside("how much of remote shards is kept")] = Field(64 << 30, ge=0)
    """Maximum size of that cache in bytes; the least recently used data is deleted first."""

    @property
    def shard_sets(self) -> tuple[Address, ...]:
        """Return the folders or URLs of shards."""
        return self.shards if isinstance(self.shards, tuple) else (self.shards,)

    @property
    def where(self) -> str:
        """Return the folders or URLs of shards as text."""
        return ", ".join(map(str, self.shard_sets))


class ModelConfig(Section):
    """Which network."""

    name: str = "crossfusion"
    """A key of the model registry: crossfusion, crossfusion_concat, crossfusion_single, amil, dsmil, transmil, …"""
    embed_dim: int = Field(512, ge=8)
    """Token width; 512 in the paper."""
    num_heads: int = Field(4, ge=1)
    """Number of attention heads; must divide `embed_dim`."""
    num_layers: int = Field(1, ge=1)
    """Number of blocks on each side of the position encoding in every transformer."""
    source: float = 10.0
    """Magnification whose tokens define CrossFusion's grid; the other magnifications provide context."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options specific to the model, passed to its builder by name."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.embed_dim={self.embed_dim}")
        return self


class TrainConfig(Section):
    """How a fold is trained."""

    recipe: Literal["default", "published"] = "default"
    """`published`: the settings of the published program for this section, its dropouts, and `data.unit=slide`. Values
    that are given override it; log, run.json, report and model card then say so and list them."""
    published_errors: bool = False
    """Whether to repeat four errors of the published program, which `recipe: published` does under the protocol
    `published`: time bins from all patients (a leak); an epoch's last, partial window of bags makes no step, and its
    gradient enters the next epoch; attention dropout in evaluation; fp16 without loss scaling on a GPU (noise)."""
    epochs: int = Field(40, ge=1)
    """Maximum number of epochs."""
    patience: int | None = Field(10, ge=1)
    """Number of epochs without a better validation score after which training stops; none: never stop early."""
    min_epoch: int = Field(0, ge=0)
    """First epoch (from 0) whose weights may be chosen."""
    monitor: Literal["cindex", "loss"] = "cindex"
    """Validation score used to choose the epoch."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """AdamW (decoupled weight decay) or Adam (L2)."""
    fused_optimizer: bool = False
    """Whether the optimizer updates all parameters in one kernel, which changes the last bits (`parallel.engine: ddp`);
    off, since it has not been measured on a GPU."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay."""
    schedule: Literal["cosine", "constant", "published"] = "cosine"
    """`cosine`: decay to `final_lr` over all steps; `published`: a cosine with a period of 2 × 10 epochs and floor 0,
    updated once an epoch."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    final_lr: float = Field(0.05, ge=0, le=1)
    """Final learning rate of `cosine`, as a share of `lr`."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Maximum gradient norm of a step; none: no clipping."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; if set, the averaged weights are evaluated; none: off."""
    loss: Literal["nll", "ce", "cox", "ranking"] = "nll"
    """A key of the loss registry."""
    alpha: float = Field(0.0, ge=0, le=1)
    """In `nll`, the weight of censored cases is 1 − alpha; in `ce`, the weight of the cross-entropy is 1 − alpha and
    that of the events' likelihood is alpha. 0 in validation; ignored by `cox` and `ranking`."""
    keep_checkpoints: Annotated[int, Aside("how much is kept while a fold trains")] = Field(2, ge=1)
    """Number of recent checkpoints to keep while a fold trains, in addition to its best parameters."""
    background_checkpoints: Annotated[bool, Aside("the same bytes are written, by a thread")] = False
    """Whether a thread writes a checkpoint from a copy of the state while training continues. Off, since it has not
    been measured on a GPU."""
    folds: Annotated[
        Literal["auto", "separate", "side-by-side", "together"], Aside("the arrangement of the folds changes no fold")
    ] = "auto"
    """`separate`: train the folds one after another, each on all cores; `side-by-side`: as many at once as there are
    cores (one process on a CPU only); `together`: all folds from one read of the shards per epoch; `auto`:
    `side-by-side` for bags of up to 8,192 tiles if memory suffices, else `separate`."""
    wide_folds: bool = False
    """With `folds: together`, whether folds that share a bag compute it as one wide product; for amil, one bag in a
    forward pass and a loss of single bags. The numbers are the same up to rounding. Off, since it has not been measured
    on a GPU."""
    sampling: Literal["all", "weighted"] = "all"
    """`all`: every bag once an epoch; `weighted`: with replacement, by 1 / size of its (bin × censoring) class."""
    micro_batch: int = Field(1, ge=1)
    """Bags in one forward pass, padded and masked. 1 as published; only 1 gives the same dropout at any world size."""
    packed: bool = False
    """Whether the bags of one forward pass (`micro_batch` or `data.token_budget`) are joined in one row instead of
    padded; only attention and convolutions run bag by bag. For crossfusion and its variants, amil, abmil, dsmil and
    mean_mil; the numbers are the same up to rounding. Off, since it has not been measured on a GPU."""
    start_from: Annotated[str | None, Aside("the digest of its weights decides")] = None
    """Trained model whose weights a fold starts from: a folder with `model.json`, a run's folder or a registered model
    (`models:/NAME@ALIAS`). A run's fold starts from its model of the same number. None: initial weights are drawn."""
    start_unchecked: bool = False
    """Whether to start also from a model that was trained on patients whom the fold scores, or that does not record its
    patients. Every output then says so."""


class ParallelConfig(Section):
    """How a run is distributed over processes."""

    engine: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    """DistributedDataParallel, or a stage of DeepSpeed's ZeRO."""
    precision: Literal["auto", "f32", "bf16", "fp16", "f64"] = "auto"
    """Precision of the forward pass. `auto`: bf16 on a GPU that has it, else f32; decided when a run begins and kept by
    a resume. f64 is for tests of numerical equality. With `train.published_errors`, f32 is fp16 without loss scaling on
    a GPU, and `auto` is f32."""
    deterministic: Literal["auto", True, False] = "auto"
    """Whether the same run on the same device gives the same bits. `auto`: on a CPU, where it costs nothing; on a GPU
    `true` excludes faster operations. The number of processes and the kind of GPU change bits in any case."""
    hold_casts: Annotated[bool, Aside("weights are cast less often, to the same values")] = False
    """Whether to cast the weights to bf16 or fp16 once a step instead of once a forward pass (`engine: ddp`, folds that
    do not share a read). The numbers are the same; off, since it has not been measured on a GPU."""
    depthwise: Literal["torch", "triton"] = "torch"
    """Library of CrossFusion's and TransMIL's depthwise convolutions on a GPU. `triton` has kernels for the layout of
    the tokens; the numbers are the same up to rounding. Off, since it has not been measured on a GPU."""
    global_batch: int = Field(32, ge=1)
    """Bags per optimizer step over all processes; the number of accumulation steps follows from it."""
    timeout_minutes: Annotated[float, Aside("how long a process waits for the others")] = Field(10.0, gt=0, le=24 * 60)
    """Minutes after which a process that waits for the others fails, because one of them is stuck or unreachable."""


class EvaluationConfig(Section):
    """How a run is evaluated."""

    protocol: Protocol = "strict"
    """Patients used to choose the model: `strict`: an inner validation split; `fixed-epoch`: none, the last epoch is
    used; `published`: the scored fold, which is optimistic."""
    n_bins: int = Field(4, ge=2)
    """Time bins of the discrete hazard, at quantiles of the training patients' event times (of all patients' with
    `train.published_errors`)."""
    horizons_months: tuple[float, ...] = (12.0, 36.0, 60.0)
    """Horizons of the time-dependent AUC, in months."""
    bootstrap: int = Field(1000, ge=0)
    """Number of patient-bootstrap replicates for every confidence interval."""
    permute_outcomes: int | None = None
    """Seed that permutes the outcomes among patients, to get the null distribution of a score; none: real outcomes."""
    permute_within: Literal["cohort", "folds"] = "cohort"
    """Among whom outcomes are permuted: all patients, before folds are drawn; or only the patients of each scored fold,
    which keeps the events of published folds."""
    strict: Annotated[bool, Aside("stops a run or does not; it changes no number")] = False
    """Stop if the audit of the data drops anything or finds anything suspicious, instead of reporting it and
    continuing."""


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    """Whether to track runs."""
    uri: AddressSetting | None = None
    """Tracking server or database; none: `MLFLOW_TRACKING_URI` if set, otherwise sqlite next to the output folder."""
    experiment: str = "cfusion"
    """MLflow experiment of the runs."""
    register_as: str | None = None
    """Name under which to register the fold ensemble in the model registry; none: do not register it."""


_SEARCHED = ("data.max_tiles", "data.feature_dropout", "parallel.global_batch")
_NOT_SEARCHED = ("model.name", "train.folds", "train.recipe", "train.published_errors", "train.keep_checkpoints",
                 "train.background_checkpoints")  # fmt: skip


class SearchRange(Section):
    """A range of numbers that a search draws from; whole numbers if both limits are."""

    low: float
    """Lowest value."""
    high: float
    """Highest value."""
    log: bool = False
    """Whether to draw the logarithm evenly."""

    @model_validator(mode="after")
    def _is_a_range(self) -> SearchRange:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"a range needs low < high, and 0 < low with log; got {self.low:g} to {self.high:g}")
        return self


class SearchConfig(Section):
    """Which settings a search chooses in each fold, by the fold's inner validation patients."""

    space: dict[str, list[Any] | SearchRange] = Field(min_length=1)
    """`section.key` → list of values, or a range. Settings of `train` and `model` (not `model.name`, `train.folds`),
    `data.max_tiles`, `data.feature_dropout` and `parallel.global_batch` can be searched."""
    trials: int = Field(20, ge=2)
    """Number of trials in each fold."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How values are drawn: tree-structured Parzen estimator, or at random."""
    prune: bool = True
    """Whether to end a trial whose validation score is below the median of earlier trials at the same epoch."""
    seed: int = 7
    """Seed of the sampler."""

    @model_validator(mode="after")
    def _only_what_a_fold_can_choose(self) -> SearchConfig:
        for key, values in self.space.items():
            section = key.partition(".")[0]
            if key in _NOT_SEARCHED or not (section in ("train", "model") or key in _SEARCHED):
                raise ValueError(f"space: {key} cannot be searched; put it on an axis of a sweep")
            if isinstance(values, list) and len(values) < 2:
                raise ValueError(
                    f"space: {key} has {len(values)} values; give two or more, or set it outside of search"
                )
        return self


class Config(Section):
    """A complete run: cohort, splits, data, model, training, evaluation, tracking."""

    cohort: CohortConfig = CohortConfig()
    """Patients and outcomes."""
    cohorts: dict[str, CohortConfig] = Field(default_factory=dict)
    """Several cohorts that one model is trained on, by name, each with the settings of `cohort`. `cohort` then has only
    their common name and end point. Losses and scores compare patients within a cohort only."""
    splits: SplitsConfig = SplitsConfig()
    """Folds."""
    data: DataConfig = DataConfig()
    """Bags."""
    model: ModelConfig = ModelConfig()
    """Network."""
    train: TrainConfig = TrainConfig()
    """Training of a fold."""
    parallel: ParallelConfig = ParallelConfig()
    """Processes and precision."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Protocol and scores."""
    tracking: Annotated[TrackingConfig, Aside("where the numbers are sent")] = TrackingConfig()
    """MLflow."""
    search: SearchConfig | None = None
    """Settings that each fold chooses by trials on its training side; none: every setting is fixed."""
    seed: int = 7
    """Seed of initialisation and dropout."""
    output: Annotated[Path, Aside("where the numbers are written")] = Path("runs/run")
    """Folder of the run: checkpoints, predictions, report."""

    @classmethod
    def without_asides(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings without those that do not decide, and the name of a model's file without its folder."""
        kept = super().without_asides(values)
        if kept.get("search", True) is None:  # the same identity as before there were searches
            del kept["search"]
        if "cohorts" in kept:
            of = {name: CohortConfig.without_asides(cohort) for name, cohort in kept.pop("cohorts").items()}
            kept |= {"cohorts": of} if of else {}
        for section, new in _NEWER.items():  # likewise
            if isinstance(given := kept.get(section), dict):
                kept[section] = {key: value for key, value in given.items() if new.get(key, _NO_VALUE) != value}
        model = kept.get("model")
        if isinstance(model, dict) and names_file(str(model.get("name"))):
            kept["model"] = {**model, "name": Path(model["name"]).name}
        return kept

    def with_precision(self, precision: Literal["auto", "f32", "bf16", "fp16", "f64"]) -> Config:
        """Return the configuration with `precision` in place of `parallel.precision=auto`; another value stays."""
        if self.parallel.precision != "auto":
            return self
        return self.model_copy(update={"parallel": self.parallel.model_copy(update={"precision": precision})})

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the run's scores must know about its recipe and its start; empty if nothing."""
        start = (f"Training started from {self.train.start_from}.",) if self.train.start_from else ()
        return recipe_notes(self.model_dump()) + start + ((_UNCHECKED,) if self.train.start_unchecked else ())

    @property
    def cohort_configs(self) -> tuple[CohortConfig, ...]:
        """Return the settings of each cohort that is read."""
        return tuple(self.cohorts.values()) or (self.cohort,)

    def of_cohort(self, name: str) -> Config:
        """Return the configuration of one of `cohorts` by itself, on the same folds of its patients."""
        directory = self.splits.directory
        splits = {"directory": directory[name]} if isinstance(directory, dict) else {}
        return self.model_copy(update={
            "cohort": self.cohorts[name], "cohorts": {}, "splits": self.splits.model_copy(update=splits),
        })  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, values: Any) -> Any:
        return with_recipe(_with_cohorts(_with_endpoint(values)))

    @model_validator(mode="after")
    def _cohorts_fit(self) -> Config:
        if problem := _unfit_cohorts(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _start_is_needed(self) -> Config:
        if self.train.start_unchecked and self.train.start_from is None:
            raise ValueError("train.start_unchecked=true needs train.start_from; remove it")
        return self

    @model_validator(mode="after")
    def _folds_can_share_a_read(self) -> Config:
        if self.train.folds != "together":
            return self
        if self.train.sampling == "weighted":
            raise ValueError(
                "train.sampling=weighted (train.recipe=published sets it) draws different bags for each fold, so "
                "train.folds=together cannot share one read; set train.folds=separate or train.sampling=all"
            )
        if self.parallel.engine != "ddp" or self.parallel.precision == "fp16":
            raise ValueError(
                f"train.folds=together needs parallel.engine=ddp and f32, bf16 or f64; "
                f"got {self.parallel.engine}, {self.parallel.precision}"
            )
        return self

    @model_validator(mode="after")
    def _only_ddp_has_these(self) -> Config:
        asked = {"train.fused_optimizer": self.train.fused_optimizer, "parallel.hold_casts": self.parallel.hold_casts}
        for key, value in asked.items():
            if value and self.parallel.engine != "ddp":
                raise ValueError(
                    f"{key}=true needs parallel.engine=ddp, since DeepSpeed has its own; got {self.parallel.engine}. "
                    f"Set {key}=false"
                )
        if self.parallel.hold_casts and self.train.folds == "together":
            raise ValueError(
                "parallel.hold_casts=true needs train.folds=separate or side-by-side: folds that share a read train on "
                "one bag after the other. Set parallel.hold_casts=false"
            )
        return self

    @model_validator(mode="after")
    def _folds_can_be_wide(self) -> Config:
        train = self.train
        needs = {
            "train.folds": (train.folds, ("together",)),
            "model.name": (self.model.name, ("amil",)),
            "train.loss": (train.loss, ("nll", "ce")),
            "train.micro_batch": (train.micro_batch, (1,)),
            "data.token_budget": (self.data.token_budget, (None,)),
        }
        for key, (found, possible) in needs.items():
            if train.wide_folds and found not in possible:
                raise ValueError(
                    f"train.wide_folds=true needs {key}={' or '.join(map(str, possible))}; got {found}. Set "
                    "train.wide_folds=false"
                )
        return self

    @model_validator(mode="after")
    def _several_bags_are_packed(self) -> Config:
        if self.train.packed and self.train.micro_batch == 1 and self.data.token_budget is None:
            raise ValueError(
                "train.packed=true has no effect: a forward pass has one bag. Set train.micro_batch above 1, or "
                "data.token_budget"
            )
        return self

    @model_validator(mode="after")
    def _search_looks_only_at_the_training_side(self) -> Config:
        if self.search is None:
            return self
        if self.evaluation.protocol != "strict":
            raise ValueError(
                f"search needs evaluation.protocol=strict, whose inner validation patients choose; "
                f"{self.evaluation.protocol} has none that are not scored"
            )
        if self.train.folds == "together":
            raise ValueError("search needs train.folds=separate: the folds of a trial have different settings")
        for settings in corners(self.search):
            self.with_chosen(settings)
        return self

    def with_chosen(self, settings: Mapping[str, Any]) -> Config:
        """Return the configuration of one trial: without the search, with the values of a trial.

        Raises:
            ValueError: A key is unknown, or a value is refused.
        """
        values = self.model_dump(exclude={"search"}, exclude_unset=True)
        for key, value in settings.items():
            set_key(values, key, value)
        try:
            return type(self).model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            shown = ", ".join(f"{key}={value}" for key, value in settings.items())
            raise ValueError(f"search: {shown}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    @model_validator(mode="after")
    def _published_errors_are_possible(self) -> Config:
        folds = self.train.folds if self.train.folds == "together" else "separate"
        needs = {
            "evaluation.protocol": (self.evaluation.protocol, "published", "its time bins see the scored patients"),
            "parallel.engine": (self.parallel.engine, "ddp", "ZeRO does not keep a gradient between epochs"),
            "train.folds": (folds, "separate", "a group steps on every window"),
        }
        for key, (found, wanted, why) in needs.items():
            if self.train.published_errors and found != wanted:
                raise ValueError(
                    f"train.published_errors=true needs {key}={wanted}, since {why}; got {found}. Set "
                    f"train.published_errors=false or {key}={wanted}"
                )
        return self

    @model_validator(mode="after")
    def _source_is_read(self) -> Config:
        if self.model.name == "crossfusion" and self.model.source not in self.data.magnifications:
            raise ValueError(f"model.source={self.model.source:g} is not among data.magnifications")
        return self


_NO_VALUE = object()

_NEWER: dict[str, dict[str, Any]] = {
    "train": {"fused_optimizer": False, "packed": False, "start_unchecked": False, "wide_folds": False},
    "parallel": {"depthwise": "torch"},
}
"""Settings that are not part of a run's identity at these values, which are what runs before them did."""

_UNCHECKED = (
    "train.start_unchecked=true: it was not required that the model from which training started has seen none of the "
    "scored patients; the scores may be optimistic."
)


def _with_cohorts(values: Any) -> Any:
    """Give each of `cohorts` its name and the common end point; leave-one-cohort-out has a fold for each."""
    cohorts = values.get("cohorts") if isinstance(values, dict) else None
    if not cohorts or not isinstance(cohorts, dict):
        return values
    together = _plain_values(values.get("cohort"))
    common = {"endpoint": together["endpoint"]} if "endpoint" in together else {}
    named = {
        str(name): of if not (of is None or isinstance(of, dict | Section)) else
        {"name": str(name), **common, **_plain_values(of)}
        for name, of in cohorts.items()
    }  # fmt: skip
    splits = _plain_values(values.get("splits"))
    left_out = {"splits": {"folds": len(named), **splits}} if splits.get("scheme") == "cohort" else {}
    return {**values, "cohorts": named, **left_out}


def _plain_values(section: Any) -> dict[str, Any]:
    if isinstance(section, Section):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, dict) else {}


def _unfit_cohorts(config: Config) -> str:
    """Say what contradicts `cohorts`, in a sentence; empty if nothing does."""
    splits, names = config.splits, list(config.cohorts)
    by_name = isinstance(splits.directory, dict)
    if not names:
        if by_name or splits.scheme == "cohort":
            key = "splits.directory by cohort" if by_name else "splits.scheme=cohort"
            return f"{key} needs cohorts, the cohorts that are trained as one; none is given"
        return ""
    if len(names) == 1:
        return f"cohorts has only {names[0]}; give one cohort as `cohort`"
    if config.cohort.name in names:
        return (
            f"cohort.name={config.cohort.name} is also one of cohorts; give all together a name that none of them has"
        )
    own = [key for key, value in config.cohort if key not in ("name", "endpoint") and value != getattr(_NO_COHORT, key)]
    if own:
        return f"cohort.{own[0]} does not go with cohorts; set cohorts.{names[0]}.{own[0]} and that of the others"
    for name, one in config.cohorts.items():
        if one.name != name:
            return f"cohorts.{name}.name={one.name}: a cohort is named by its key; remove the name"
        if one.endpoint != config.cohort.endpoint:
            return (
                f"cohorts.{name}.endpoint={one.endpoint} and cohort.endpoint={config.cohort.endpoint} differ; one "
                "model has one end point"
            )
    return _unfit_folds(splits, names, config.evaluation.protocol)


def _unfit_folds(splits: SplitsConfig, names: Sequence[str], protocol: Protocol) -> str:
    if splits.scheme == "cohort":
        if protocol == "published":
            return (
                "splits.scheme=cohort does not go with evaluation.protocol=published: the cohort left out would choose "
                "the epoch, and its patients give no time bins; set strict or fixed-epoch"
            )
        given = [key for key in ("directory", "test_cases") if getattr(splits, key) is not None]
        if given:
            return f"splits.scheme=cohort leaves out one cohort in each fold; splits.{given[0]} does not go with it"
        if splits.folds != len(names):
            return f"splits.scheme=cohort has a fold for each of the {len(names)} cohorts; splits.folds={splits.folds}"
    if isinstance(splits.directory, dict) and set(splits.directory) != set(names):
        lacking, unknown = set(names) - set(splits.directory), set(splits.directory) - set(names)
        what = f"lacks {min(lacking)}" if lacking else f"names {min(unknown)}, which is not one of cohorts"
        return f"splits.directory {what}; give a folder for each of {', '.join(names)}"
    return ""


_NO_COHORT = CohortConfig()


def corners(search: SearchConfig) -> Iterator[dict[str, Any]]:
    """Yield settings in which each value of a list and each limit of a range occurs, to be checked before training."""
    listed = {
        key: values if isinstance(values, list) else [as_integer(values.low, values), as_integer(values.high, values)]
        for key, values in search.space.items()
    }
    for number in range(max(map(len, listed.values()))):
        yield {key: values[min(number, len(values) - 1)] for key, values in listed.items()}


def as_integer(value: float, values: SearchRange) -> float | int:
    """Return a value of a range, as a whole number if both limits are."""
    return int(value) if float(values.low).is_integer() and float(values.high).is_integer() else value


def _with_endpoint(values: Any) -> Any:
    """Move `evaluation.endpoint` to `cohort.endpoint`, the one setting of the end point."""
    evaluation = values.get("evaluation") if isinstance(values, dict) else None
    if not isinstance(evaluation, dict) or "endpoint" not in evaluation:
        return values
    cohort = values.get("cohort") or {}
    if not isinstance(cohort, dict):
        cohort = cohort.model_dump(exclude_unset=True)
    endpoint = str(evaluation["endpoint"]).upper()
    if cohort.get("endpoint", endpoint) != endpoint:
        raise ValueError(f"evaluation.endpoint={endpoint} and cohort.endpoint={cohort['endpoint']} differ; give one")
    rest = {key: value for key, value in evaluation.items() if key != "endpoint"}
    return {**values, "cohort": {**cohort, "endpoint": endpoint}, "evaluation": rest}


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    schema = Config.model_json_schema()
    endpoint = schema["$defs"]["CohortConfig"]["properties"]["endpoint"]
    names = [case(name) for name in endpoint["enum"] for case in (str.lower, str.upper)]
    schema["$defs"]["EvaluationConfig"]["properties"]["endpoint"] = {
        "enum": names, "type": "string", "title": "Endpoint", "description": "Another name of `cohort.endpoint`.",
    }  # fmt: skip
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "cfusion configuration", **schema}


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply `section.key=value` overrides.

    Paths in the file are relative to the working directory.

    Raises:
        ConfigError: The file cannot be read, a key is unknown (the nearest valid one is suggested), or a value or
            combination is invalid.
    """
    if path is not None:
        refuse_missing_config(Path(path))
    values = read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(values, override)
    return validate(Config, values, str(path or "command line"))


SectionT = TypeVar("SectionT", bound=Section)


def validate(section: type[SectionT], values: dict[str, Any], source: str) -> SectionT:
    """Build `section` from plain values; errors name `source`, the key and the nearest valid key."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explain(section, item)}" for item in error.errors())) from None


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a type is or has in it, such as `dict[str, CohortConfig]`; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part)) is not None), None)


def _explain(section: type[BaseModel], item: Any) -> str:
    # Of a setting with several types, pydantic also names the type that was tried.
    location = ".".join(str(part) for part in item["loc"] if "[" not in str(part))
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        found = repr(hide_in(item["input"]))
        return f"{location}={found}: {message}." if location else f"{without_secrets(message)}."
    *parents, key = (str(part) for part in item["loc"])
    owner = section
    for parent in parents:
        field = owner.model_fields.get(parent)
        owner = owner if field is None else _section_in(field.annotation) or owner
    hint = nearest(key, owner.model_fields, "".join(f"{parent}." for parent in parents))
    return f"unknown key {location}. {hint}"
