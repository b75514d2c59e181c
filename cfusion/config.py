"""One configuration: every setting of a run, its default and what it means.

A file is YAML with the sections below; `section.key=value` overrides one key. Unknown keys and impossible combinations
are refused when the file is read, not when the run meets them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cfusion.errors import ConfigError, nearest
from cfusion.study.packaged import DataPath
from cfusion.yaml_files import apply_override, read_yaml

Protocol = Literal["strict", "fixed-epoch", "published"]
"""Where a model is chosen: on an inner validation split, nowhere, or (optimistically) on the scored fold."""


class Section(BaseModel):
    """A group of settings; unknown keys are errors, and a section cannot be changed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What is not as by default: of a hundred settings a reader wants to see those."""
        for name, value in super().__repr_args__():
            if name is None or value != type(self).model_fields[name].get_default(call_default_factory=True):
                yield name, value


class CohortConfig(Section):
    """Which patients, and what happened to them."""

    name: str = "cohort"
    """Short name of the cohort; it heads every table and file."""
    table: DataPath = Path("cohort.csv")
    """Clinical table: CSV, TSV, or CSV in a ZIP file. `package:tcga/clinical/tcga_blca.csv` is in the package."""
    format: Literal["auto", "published", "plain", "gdc", "cdr"] = "auto"
    """Layout of the table; `auto` tells by its columns and says which it took."""
    endpoint: Literal["OS", "DSS", "PFI"] = "OS"
    """Overall survival, disease-specific survival or progression-free interval, where the table has them."""
    time_unit: Literal["months", "days", "years"] = "months"
    """Unit of a plain table's time column."""
    event_is: Literal["event", "censored"] = "event"
    """What 1 means in a plain table's event column; a column `censorship` is taken first for `censored`."""
    keep_zero_times: bool = False
    """Whether patients with a follow-up of 0 stay (tables in whole months round early deaths to 0)."""
    slides: DataPath | None = None
    """Table that names each slide's case (`slide_id, case_id`), or a GDC manifest, where `table` does not name them."""


class SplitsConfig(Section):
    """Who trains, who chooses, who is scored."""

    directory: DataPath | None = None
    """Folder of published `splits_K.csv` with columns train and val; none: folds are drawn."""
    folds: int = Field(5, ge=2)
    """Number of outer folds, where they are drawn."""
    repeats: int = Field(1, ge=1)
    """How often the whole cross-validation is drawn anew."""
    scheme: Literal["stratified", "site"] = "stratified"
    """`stratified`: patients by event and time; `site`: no tissue source site on both sides of a fold."""
    validation_fraction: float = Field(0.2, gt=0, lt=0.5)
    """Share of the training patients kept for early stopping and model choice under `strict`."""
    test_cases: DataPath | None = None
    """Table with a column `case_id`: these patients are a fixed external test, all others train."""
    fold: int | None = Field(None, ge=0)
    """Train and score this outer fold alone; none: every fold."""
    within: int | None = Field(None, ge=0)
    """Nested cross-validation: draw the folds inside the training side of this outer fold; none: no nesting."""
    seed: int = 7
    """Seed of the drawn folds and of the inner validation."""


class DataConfig(Section):
    """Where bags come from and how they are read."""

    shards: str = "shards"
    """Folder or URL of packed shards with their index."""
    encoder: str | None = None
    """Name of the encoder the shards must carry; none: whatever they carry."""
    magnifications: tuple[float, ...] = (20.0, 10.0, 5.0)
    """Magnifications to read, finest first."""
    unit: Literal["case", "slide"] = "case"
    """`case`: a patient's slides form one bag; `slide`: one bag a slide, and a patient's risks are averaged."""
    max_tiles: int | None = Field(None, ge=1)
    """At most so many tiles at the finest magnification, drawn anew each epoch; parents of kept tiles stay."""
    feature_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of embedding channels set to zero in training, the same for a whole bag."""
    order_seed: int = 7
    """Seed of the order of bags and of what is drawn of each; runs that differ only in `seed` can share one read."""
    cache: Literal["page", "ram", "gpu"] = "page"
    """`page`: the operating system's page cache; `ram`/`gpu`: the cohort is held where it fits."""
    read_threads: int = Field(2, ge=1)
    """Threads that read bags ahead of the model."""
    buffer_bytes: int = Field(1 << 30, ge=1 << 20)
    """Memory that bags read ahead may take, in bytes; the next bag is read ahead whatever its size."""
    token_budget: int | None = Field(None, ge=1)
    """Bags share a forward pass while bags × tiles of the longest stay within this; replaces train.micro_batch."""
    cache_directory: Path | None = None
    """Folder for what is fetched of remote shards; none: `cfusion/shards` in the user's cache folder."""
    cache_bytes: int = Field(64 << 30, ge=0)
    """Most bytes kept there; the least recently used go first."""


class ModelConfig(Section):
    """Which network."""

    name: str = "crossfusion"
    """A key of the model registry: crossfusion, crossfusion_concat, crossfusion_single, amil, dsmil, transmil, …"""
    embed_dim: int = Field(512, ge=8)
    """Width of the tokens; the paper has 512."""
    num_heads: int = Field(4, ge=1)
    """Attention heads; must divide `embed_dim`."""
    num_layers: int = Field(1, ge=1)
    """Blocks on each side of the position encoding in every transformer."""
    source: float = 10.0
    """Magnification whose tokens set the grid of CrossFusion; the others are its context."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of one model, passed on to its builder by name."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"model.num_heads={self.num_heads} does not divide model.embed_dim={self.embed_dim}")
        return self


class TrainConfig(Section):
    """How a fold is trained."""

    recipe: Literal["default", "published"] = "default"
    """`published` sets this section to the published training and refuses other values for what it sets."""
    epochs: int = Field(40, ge=1)
    """At most so many passes over the training bags."""
    patience: int | None = Field(10, ge=1)
    """Stop after so many epochs without a better validation score; none: never."""
    min_epoch: int = Field(0, ge=0)
    """First epoch (from 0) whose weights may be chosen."""
    monitor: Literal["cindex", "loss"] = "cindex"
    """Validation score that chooses the epoch."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """AdamW (decoupled weight decay) or Adam (L2)."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay."""
    schedule: Literal["cosine", "constant", "published"] = "cosine"
    """`cosine` to `final_lr` over all steps; `published`: a cosine of period 2 × 10 epochs with floor 0, by epoch."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    final_lr: float = Field(0.05, ge=0, le=1)
    """Last learning rate of `cosine`, as a share of `lr`."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of a step's gradient; none: no clipping."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is evaluated; none: off."""
    loss: Literal["nll", "ce", "cox", "ranking"] = "nll"
    """A key of the loss registry."""
    alpha: float = Field(0.0, ge=0, le=1)
    """In `nll`, censored cases weigh 1 − alpha; in `ce`, the cross-entropy weighs 1 − alpha and the likelihood of the
    events alpha. 0 in validation; `cox` and `ranking` have no use for it."""
    keep_checkpoints: int = Field(2, ge=1)
    """So many of a fold's newest checkpoints are kept, beside its best parameters, while it trains."""
    folds: Literal["separate", "together"] = "separate"
    """`separate`: fold after fold; `together`: all folds from one pass over the shards an epoch, each as if alone."""
    sampling: Literal["all", "weighted"] = "all"
    """`all`: every bag once an epoch; `weighted`: with replacement, by 1 / size of its (bin × censoring) class."""
    micro_batch: int = Field(1, ge=1)
    """Bags in one forward pass, padded and masked. 1 as published, and for the same dropout at any world size."""


PUBLISHED_RECIPE: dict[str, Any] = {
    "epochs": 100, "patience": 20, "min_epoch": 5, "monitor": "cindex", "optimizer": "adam", "lr": 1e-4,
    "weight_decay": 4e-6, "schedule": "published", "warmup_fraction": 0.0, "clip_norm": None, "ema": None,
    "loss": "nll", "alpha": 0.2, "sampling": "weighted", "micro_batch": 1,
}  # fmt: skip
"""The published training (CrossFusion program, `recipe: published`); `model.options.published` goes with it, which has
the published dropouts."""


class ParallelConfig(Section):
    """How a run is spread over processes."""

    engine: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    """DistributedDataParallel or a stage of DeepSpeed's ZeRO."""
    precision: Literal["f32", "bf16", "fp16", "f64"] = "f32"
    """Arithmetic of the forward pass; f64 is for tests of equality."""
    global_batch: int = Field(32, ge=1)
    """Bags of one optimizer step over all processes; accumulation follows from it."""


class EvaluationConfig(Section):
    """How a run is judged."""

    protocol: Protocol = "strict"
    """Where the model is chosen: on an inner validation split, nowhere, or (optimistically) on the scored fold."""
    n_bins: int = Field(4, ge=2)
    """Time bins of the discrete hazard, at quantiles of the training patients' event times."""
    horizons_months: tuple[float, ...] = (12.0, 36.0, 60.0)
    """Horizons of the time-dependent AUC."""
    bootstrap: int = Field(1000, ge=0)
    """Patient-bootstrap replicates of every interval."""
    permute_outcomes: int | None = None
    """Seed by which outcomes are dealt to other patients, for the null beside a score; none: real outcomes."""
    strict: bool = False
    """Stop where the audit of the data drops or doubts anything, instead of saying so and going on."""


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    """Whether runs are tracked."""
    uri: str | None = None
    """Tracking server or database; none: `MLFLOW_TRACKING_URI`, or else sqlite in the output folder."""
    experiment: str = "cfusion"
    """Experiment under which the runs stand."""
    register_as: str | None = None
    """Name in the model registry for the fold ensemble; none: not registered."""


class Config(Section):
    """A whole run: cohort, splits, data, model, training, evaluation, tracking."""

    cohort: CohortConfig = CohortConfig()
    """Patients and outcomes."""
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
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    seed: int = 7
    """Seed of initialisation and dropout."""
    output: Path = Path("runs/run")
    """Folder of the run: checkpoints, predictions, report."""

    @model_validator(mode="before")
    @classmethod
    def _apply_recipe(cls, values: Any) -> Any:
        train = values.get("train") if isinstance(values, dict) else None
        if not isinstance(train, dict) or train.get("recipe") != "published":
            return values
        for key, value in PUBLISHED_RECIPE.items():
            if train.get(key, value) != value:
                raise ValueError(f"train.recipe=published sets train.{key}={value}; {train[key]!r} contradicts it")
        model = values.get("model", {})
        model = model if isinstance(model, dict) else model.model_dump()
        options = {"published": True, **model.get("options", {})}
        return {**values, "train": {**train, **PUBLISHED_RECIPE}, "model": {**model, "options": options}}

    @model_validator(mode="after")
    def _folds_can_share_a_read(self) -> Config:
        if self.train.folds == "separate":
            return self
        if self.train.sampling == "weighted":
            raise ValueError(
                "train.sampling=weighted (train.recipe=published sets it) draws the bags of each fold anew, so "
                "train.folds=together finds no order that they share; set train.folds=separate or train.sampling=all"
            )
        if self.parallel.engine != "ddp" or self.parallel.precision == "fp16":
            raise ValueError(
                f"train.folds=together needs parallel.engine=ddp and f32, bf16 or f64; "
                f"got {self.parallel.engine}, {self.parallel.precision}"
            )
        return self

    @model_validator(mode="after")
    def _source_is_read(self) -> Config:
        if self.model.name == "crossfusion" and self.model.source not in self.data.magnifications:
            raise ValueError(f"model.source={self.model.source:g} is not among data.magnifications")
        return self


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply `section.key=value` overrides.

    Paths in the file are relative to the working directory.

    Raises:
        ConfigError: The file cannot be read, a key is unknown (the nearest valid one is offered), or a value or
            combination is refused.
    """
    values = read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(values, override)
    return validate(Config, values, str(path or "command line"))


SectionT = TypeVar("SectionT", bound=Section)


def validate(section: type[SectionT], values: dict[str, Any], source: str) -> SectionT:
    """Build `section` from plain values, with errors that name `source`, the key and the nearest valid key."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_explain(section, item)}" for item in error.errors())) from None


def _explain(section: type[BaseModel], item: Any) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{location}={item['input']!r}: {message}." if location else f"{message}."
    *parents, key = (str(part) for part in item["loc"])
    owner: Any = section
    for parent in parents:
        owner = owner.model_fields[parent].annotation if parent in owner.model_fields else owner
    hint = nearest(key, owner.model_fields, "".join(f"{parent}." for parent in parents))
    return f"unknown key {location}. {hint}"
