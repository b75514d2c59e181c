"""Training of one fold, and of all folds of a cross-validation; finished folds are not trained again."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cfusion.config import Config
from cfusion.data.encoder_names import encoder_name
from cfusion.data.loader import BagSet
from cfusion.data.shards import ShardDataset, open_shards
from cfusion.errors import ConfigError, DataError
from cfusion.extensions import OwnCode
from cfusion.files import digest_json
from cfusion.models.bag import check_packs
from cfusion.models.registry import READ_ONE, model_code, reads_positions, spatial_graph
from cfusion.survival.bins import TimeBins
from cfusion.survival.losses import LOSSES
from cfusion.survival.predictions import curve_table, fold_predictions
from cfusion.training.checkpoint import TrainState
from cfusion.training.fitted import FittedModel, ModelCard, StratumCard, build
from cfusion.training.fold_job import FoldJob, never_stop
from cfusion.training.inference import patient_survival, predict_logits
from cfusion.training.loop import train_fold
from cfusion.training.optimizers import make_optimizer
from cfusion.training.preparation import prepare
from cfusion.training.runtime import Runtime
from cfusion.training.seen import Seen
from cfusion.training.start import StartModel, read_starts, start_of
from cfusion.training.step import Stepper
from cfusion.training.world import join_world
from cfusion.types import Cohort, Split, magnification_value, titled_table

logger = logging.getLogger(__name__)

_ONE_AT_A_TIME = threading.Lock()
"""Initial weights come from torch's generator, which all threads share."""

EpochCallback = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, repr=False)
class FoldRun:
    """Result of training one fold.

    Attributes:
        model: The chosen model with its card.
        predictions: Predictions of the test patients, one row each: `model, cohort, protocol, seed, fold, case_id,
            risk, survival_months, event, risk_cutoff, survival_1…K, edge_1…K`.
        history: One row of metrics per epoch.
        best_epoch: The epoch whose parameters were chosen.
        split: The patients.
    """

    model: FittedModel
    predictions: pd.DataFrame
    history: pd.DataFrame
    best_epoch: int
    split: Split

    def __repr__(self) -> str:
        return (
            f"FoldRun({self.model.card.model['name']}, fold {self.split.fold}: epoch {self.best_epoch} chosen after "
            f"{len(self.history)} epochs, {len(self.predictions)} patients predicted)"
        )

    def _repr_html_(self) -> str:
        return titled_table(repr(self), self.history) + titled_table("Predictions", self.predictions, rows=5)


def fit(
    config: Config,
    cohort: Cohort,
    split: Split,
    *,
    runtime: Runtime | None = None,
    folder: Path | None = None,
    on_epoch: EpochCallback | None = None,
    code: OwnCode | None = None,
    starts: Sequence[StartModel] | None = None,
    stop: Callable[[], bool] = never_stop,
) -> FoldRun:
    """Train on one fold, choose the epoch as the protocol requires, and predict the fold's test patients.

    The call is the same on 1 process or 64: every rank makes it and gets the same result.

    Args:
        config: The run.
        cohort: Patients with slides in the shards.
        split: Which patients train, choose the epoch and are scored; its protocol names the result.
        runtime: The processes; None: as launched.
        folder: Folder for checkpoints; None: no checkpoints, so an interrupted training run starts again.
        on_epoch: Called on rank 0 after each epoch.
        code: Code of the model as it was read for the run; none: it is read now.
        starts: Models that the folds start from, as read for the run; none: `train.start_from` is read now.
        stop: Whether to save the state and stop, as after a signal; asked after every step.

    Raises:
        ConfigError: The split is of another protocol than `evaluation.protocol`, or the model to start from does not
            fit.
        DataError: The shards have another encoder or lack a slide, the model to start from was trained on scored
            patients, or a loss is not finite.
        RequeueError: The process was asked to stop; the state is in `folder`.
    """
    runtime = runtime or join_world(config.parallel)
    dataset = open_run_shards(config)
    config = with_held_magnifications(config.with_precision(runtime.parallel.precision), dataset)
    with tempfile.TemporaryDirectory() as scratch:
        fold = ready_fold(
            config, cohort, split, dataset, runtime,
            folder=folder or Path(scratch), on_epoch=on_epoch, code=code, starts=starts, stop=stop,
        )  # fmt: skip
        return _train(runtime, fold)


@dataclass(frozen=True)
class ReadyFold:
    """A fold that is ready for training.

    Attributes:
        job: The training job.
        network: The model with its initial weights.
        card: Card of the model; training adds the cut-off.
        cohort: All patients.
        split: The fold's patients.
        test: Bags that are scored.
        source: The user's file with the model's class, if there is one.
        start: The model that it starts from, if there is one.
    """

    job: FoldJob
    network: nn.Module
    card: ModelCard
    cohort: Cohort
    split: Split
    test: BagSet
    source: bytes | None = None
    start: StartModel | None = None


def ready_fold(
    config: Config,
    cohort: Cohort,
    split: Split,
    dataset: ShardDataset,
    runtime: Runtime,
    *,
    folder: Path,
    on_epoch: EpochCallback | None,
    code: OwnCode | None = None,
    starts: Sequence[StartModel] | None = None,
    stop: Callable[[], bool] = never_stop,
) -> ReadyFold:
    """Prepare bags, time bins and initial weights of a fold; see `fit`."""
    _check_protocol(config, split)
    bins = _fitted_bins(config, cohort, split)
    start = start_of(_starts(config) if starts is None else starts, split)
    train_set = _bag_set(config, cohort, dataset, runtime, split.train)
    code = code or model_code(config.model.name)
    with _ONE_AT_A_TIME:
        torch.manual_seed(int(digest_json(["initial weights", _name(config, split)])[:15], 16))
        network = build(config.model, dataset.index.dim, config.evaluation.n_bins, config.data.magnifications, code)
    if config.train.packed:
        check_packs(network)
    prepare(runtime, network, train_set, list(bins.values()), _name(config, split))
    if start is not None:
        start.check_inputs(config, dataset.index)
        start.check_unseen(split, unchecked=config.train.start_unchecked)
        start.fill(network)
    cases = _labelled(cohort, bins)
    card = ModelCard(
        model=config.model.model_dump(mode="json"),
        backbone_dim=dataset.index.dim,
        magnifications=config.data.magnifications,
        edges_months=_mean_edges(list(bins.values())),
        encoder=dataset.index.encoder,
        cohort=cohort.name,
        endpoint=cohort.endpoint,
        fold=split.fold,
        risk_cutoff=None,
        embeddings=dict(dataset.index.provenance),
        unit=config.data.unit,
        protocol=split.protocol,
        code=None if code is None else code.identity,
        notes=config.notes,
        strata={} if cohort.strata is None else {name: StratumCard(of.edges) for name, of in bins.items()},
        start={} if start is None else start.origin,
    )
    job = FoldJob(
        config=config,
        train=train_set,
        validation=_bag_set(config, cohort, dataset, runtime, split.validation) if split.validation else None,
        cases=cases,
        bins=bins,
        sampling_weights=_sampling_weights(config, cases, train_set),
        name=_name(config, split),
        identity=config.deciding()
        | {
            "split": split.__dict__,
            "shards_digest": dataset.index.digest,
            "outcomes_digest": _outcomes_digest(config, cohort, split),
        }
        | ({} if code is None else {"model_code": code.identity})
        | ({} if start is None else {"start_sha256": start.sha256}),
        card=asdict(card),
        folder=folder,
        on_epoch=on_epoch or (lambda epoch, metrics: None),
        stop=stop,
    )
    test = _bag_set(config, cohort, dataset, runtime, split.test)
    return ReadyFold(job, network, card, cohort, split, test, None if code is None else code.source, start)


def _starts(config: Config) -> tuple[StartModel, ...]:
    return () if config.train.start_from is None else read_starts(config.train.start_from)


def _fitted_bins(config: Config, cohort: Cohort, split: Split) -> dict[str, TimeBins]:
    """Return the time bins of each cohort that the fold trains on.

    Raises:
        ConfigError: Patients of a cohort choose the epoch, and none of it trains, so that it has no time bins.
        DataError: The patients of a cohort cannot fill the bins.
    """
    bins = {}
    for name in dict.fromkeys(cohort.strata_of(split.train)) or [cohort.name]:
        binned = _binned(config, cohort, split, str(name))
        try:
            bins[str(name)] = TimeBins.fit(*binned, config.evaluation.n_bins)
        except DataError as error:
            where = f"cohort {name}, fold {split.fold}: " if cohort.strata is not None else ""
            raise DataError(f"{where}{error.message}", error.remedy) from error
    choosing = [str(name) for name in dict.fromkeys(cohort.strata_of(split.validation)) if name not in bins]
    if choosing:
        raise ConfigError(
            f"fold {split.fold}: patients of {choosing[0]} choose the epoch and none of them trains, so there are no "
            "time bins for their loss.",
            "Set evaluation.protocol to strict or fixed-epoch.",
            topic="protocol",
        )
    return bins


def _labelled(cohort: Cohort, bins: Mapping[str, TimeBins]) -> pd.DataFrame:
    """Return the outcomes of all patients with the time bin of each, and the number of the cohort if there are several.

    A time belongs to a bin of the patient's own cohort.
    """
    outcomes = cohort.cases[["time_months", "event"]]
    of, label = cohort.strata_of(list(outcomes.index)), np.full(len(outcomes), -1)
    for name, own in bins.items():
        label[of == name] = own.label(outcomes["time_months"].to_numpy(float)[of == name])
    if cohort.strata is None:
        return outcomes.assign(label=label)
    numbers = {name: number for number, name in enumerate(cohort.stratum_names)}
    return outcomes.assign(label=label, stratum=[numbers[str(name)] for name in of])


def _mean_edges(bins: Sequence[TimeBins]) -> tuple[float, ...]:
    """Return the mean of the cohorts' edges; those of one cohort as they are."""
    if len(bins) == 1:
        return bins[0].edges
    return tuple(np.mean([of.edges for of in bins], axis=0).tolist())


def _check_protocol(config: Config, split: Split) -> None:
    """Refuse a split that chooses the epoch by another protocol than the configuration.

    Raises:
        ConfigError: It does.
    """
    configured = config.evaluation.protocol
    if split.protocol != configured:
        raise ConfigError(
            f"The split of fold {split.fold} is of the protocol {split.protocol}, expected evaluation.protocol="
            f"{configured}: it has {len(split.validation)} patients that choose the epoch, "
            f"{len(set(split.validation) & set(split.test))} of whom are scored.",
            "Make it with make_splits(cohort, config.splits, config.evaluation.protocol), or set evaluation.protocol="
            f"{split.protocol}.",
            topic="protocol",
        )


def _train(runtime: Runtime, fold: ReadyFold) -> FoldRun:
    job, network, train = fold.job, fold.network, fold.job.config.train
    optimizer = make_optimizer(network, train)
    model, optimizer = runtime.prepare(network, optimizer)
    stepper = Stepper(
        runtime, model, optimizer, LOSSES[train.loss], train.alpha, train.clip_norm, train.published_errors
    )
    state, snapshot = train_fold(runtime, job, network, stepper)
    published = job.evaluation(state.best_epoch)
    training, scored = (
        predict_logits(runtime, network, bags, train.micro_batch, published, packed=train.packed)
        for bags in (job.train, fold.test)
    )
    module = runtime.bare(network, snapshot.parts)
    runtime.release()
    return fold_run(runtime, fold, module, state, training, scored)


def fold_run(
    runtime: Runtime, fold: ReadyFold, module: nn.Module, state: TrainState, training: Tensor, scored: Tensor
) -> FoldRun:
    """Assemble the result of a fold. Every rank must call this.

    Args:
        runtime: The processes.
        fold: The fold.
        module: Its model with the chosen parameters.
        state: State at the end of training.
        training: Logits [bag, bin] of its training bags, which determine the cut-off.
        scored: Logits [bag, bin] of its test bags.
    """
    risks = -patient_survival(training, fold.job.train).sum(axis=1)
    card = _with_cutoffs(fold.card, risks, fold.cohort)
    frame = _scored_frame(scored, fold)
    config, split, bags = fold.job.config, fold.split, fold.job.train
    patients = {*split.train, *split.validation}
    seen = Seen.of(runtime, bags.loader.dataset, bags.bags, patients, config.data, risks.tolist())
    seen = seen if fold.start is None else fold.start.seen_with(seen)
    shared = {
        "model": config.model.name, "protocol": split.protocol, "seed": config.seed,
        "repeat": split.repeat, "fold": split.fold,
        "risk_cutoff": _cutoffs(card, fold.cohort.strata_of(list(frame["case_id"]))),
    }  # fmt: skip
    return FoldRun(
        model=FittedModel(module.eval(), card, fold.source, seen),
        predictions=fold_predictions(frame, fold.cohort, shared),
        history=pd.DataFrame(state.history).sort_index(axis=1).assign(fold=fold.split.fold),
        best_epoch=state.best_epoch,
        split=fold.split,
    )


def _with_cutoffs(card: ModelCard, risks: pd.Series, cohort: Cohort) -> ModelCard:
    """Return the card with the median risk of the training patients, of all and of each cohort."""
    of = cohort.strata_of(list(risks.index))
    strata = {name: replace(one, risk_cutoff=float(risks[of == name].median())) for name, one in card.strata.items()}
    return replace(card, risk_cutoff=float(risks.median()), strata=strata)


def _cutoffs(card: ModelCard, of: np.ndarray) -> list[float | None]:
    """Return the cut-off of each patient's cohort [case]; that of all training patients where it does not train."""
    return [card.strata[name].risk_cutoff if name in card.strata else card.risk_cutoff for name in of]


def _scored_frame(scored: Tensor, fold: ReadyFold) -> pd.DataFrame:
    """Return predictions of the test patients, each in the time bins of the patient's cohort.

    A cohort that does not train has no time bins: its patients have a risk and no survival curve.
    """
    survival = patient_survival(scored, fold.test)
    of, frames = fold.cohort.strata_of(list(survival.index)), []
    for name in dict.fromkeys(of):
        rows = survival[of == name]
        bins = fold.job.bins.get(str(name))
        if bins is None:
            frames.append(pd.DataFrame({"case_id": list(rows.index), "risk": -rows.to_numpy().sum(axis=1)}))
        else:
            frames.append(curve_table(list(rows.index), rows.to_numpy(), bins.right_edges_months))
    return pd.concat(frames, ignore_index=True)


def open_run_shards(config: Config) -> ShardDataset:
    """Open the shards of a run and check that they have the configured encoder."""
    dataset = open_shards(config.data)
    wanted = config.data.encoder
    if wanted is not None and encoder_name(dataset.index.encoder) != encoder_name(wanted):
        raise DataError(
            f"{config.data.where}: holds embeddings of {dataset.index.encoder}, expected data.encoder={wanted}.",
            f"Point data.shards at the shards of that encoder, or set data.encoder={dataset.index.encoder}.",
        )
    return dataset


def with_held_magnifications(config: Config, dataset: ShardDataset) -> Config:
    """Return the configuration with the magnifications that the shards have, for a model of one magnification.

    Only where `data.magnifications` is not set: then what the model does not read need not be in the shards.
    """
    held = tuple(magnification_value(name) for name in dataset.index.magnifications)
    wanted = config.data.magnifications
    if (
        config.model.name not in READ_ONE
        or "magnifications" in config.data.model_fields_set
        or set(wanted) <= set(held)
    ):
        return config
    found = tuple(m for m in wanted if m in held) or held
    logger.info("%s: has only %s, of which the model reads one", config.data.where, ", ".join(map(str, found)))
    return config.model_copy(update={"data": config.data.model_copy(update={"magnifications": found})})


def _bag_set(
    config: Config, cohort: Cohort, dataset: ShardDataset, runtime: Runtime, patients: tuple[str, ...]
) -> BagSet:
    slides = cohort.slides_of(patients)
    return BagSet.open(
        dataset,
        slides,
        config.data,
        magnifications=config.data.magnifications,
        device=runtime.device,
        dtype=runtime.dtype,
        graphs=spatial_graph(config.model.name, config.data.magnifications, config.model.options),
        positions=reads_positions(config.model.name, config.model.options),
    )


def _outcomes(cohort: Cohort, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = cohort.cases.loc[list(patients)]
    return rows["time_months"].to_numpy(dtype=float), rows["event"].to_numpy(dtype=bool)


def _binned(config: Config, cohort: Cohort, split: Split, stratum: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the outcomes that decide the time bins of a cohort: those of its training patients.

    With `train.published_errors` those of all bags of the cohort, as in the published program: where a bag is a
    slide, a patient counts once for each slide.
    """
    if not config.train.published_errors:
        of = cohort.strata_of(split.train)
        return _outcomes(cohort, [case for case, name in zip(split.train, of, strict=True) if name == stratum])
    cohort = next(part for part in cohort.parts() if part.name == stratum)
    cases = cohort.cases
    known = cases.index[(cases["time_months"] >= 0) & cases["event"].notna()]
    by_slide = cohort.slides["case_id"]
    return _outcomes(cohort, list(known if config.data.unit == "case" else by_slide[by_slide.isin(known)]))


def _outcomes_digest(config: Config, cohort: Cohort, split: Split) -> str:
    """Digest of the outcomes that decide a fold's bins, training and choice, and of its patients' slides."""
    patients = [*split.train, *split.validation]
    outcomes = [values.tolist() for values in _outcomes(cohort, patients)]
    if config.train.published_errors:
        for name in dict.fromkeys(cohort.strata_of(split.train)):
            outcomes += [values.tolist() for values in _binned(config, cohort, split, str(name))]
    slides = cohort.slides_of([*patients, *split.test])
    return digest_json([outcomes, slides, *_strata_list(cohort, patients)])


def _strata_list(cohort: Cohort, patients: Sequence[str]) -> list[list[str]]:
    """Return the cohort of each patient where there are several, since it decides bins and risk sets."""
    return [] if cohort.strata is None else [cohort.strata_of(patients).tolist()]


def _sampling_weights(config: Config, cases: pd.DataFrame, bags: BagSet) -> np.ndarray | None:
    """Return 1 / size of each bag's (time bin × censoring) class if `sampling: weighted` (the published recipe).

    Classes of several cohorts are distinct, so that all cohorts are drawn equally often.
    """
    if config.train.sampling == "all":
        return None
    keys = [key for key in ("label", "event", "stratum") if key in cases.columns]
    rows = cases.loc[[bag.case_id for bag in bags.bags], keys]
    classes = pd.Series(list(rows.itertuples(index=False, name=None)))
    return 1 / classes.map(classes.value_counts()).to_numpy(dtype=float)


def _name(config: Config, split: Split) -> str:
    return f"seed {config.seed}, repeat {split.repeat}, fold {split.fold}"
