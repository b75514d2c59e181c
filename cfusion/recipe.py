"""Training recipes: the settings of the published program, and what a run changes in them.

Works on plain values, as in a configuration file, so that `cfusion.config` can apply a recipe while it reads one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PUBLISHED_RECIPE: dict[str, Any] = {
    "epochs": 100, "patience": 20, "min_epoch": 5, "monitor": "cindex", "optimizer": "adam", "lr": 1e-4,
    "weight_decay": 4e-6, "schedule": "published", "warmup_fraction": 0.0, "clip_norm": None, "ema": None,
    "loss": "nll", "alpha": 0.2, "sampling": "weighted", "micro_batch": 1,
}  # fmt: skip
"""Section `train` of the published program (CrossFusion, `recipe: published`)."""

PUBLISHED_ERRORS = {
    "bins": "leak: the time bins are quantiles over all patients, the scored ones among them",
    "gradient": "noise: the gradient of an epoch's last, partial window of bags makes no step; it enters the next "
    "epoch's first step",
    "evaluation": "noise: dropout of attention weights stays on in evaluation, so scores and predictions depend on its "
    "seed, and differ from those of the saved model",
    "precision": "noise: on a GPU fp16 without loss scaling, in which small gradients become 0; on a CPU f32",
}
"""Errors of the published program that `train.published_errors` brings back, each with its kind: leak or noise."""

_ELSEWHERE = {
    "data.unit": "slide", "data.max_tiles": None, "data.feature_dropout": 0.0, "data.token_budget": None,
    "parallel.global_batch": 32, "parallel.precision": "f32", "evaluation.n_bins": 4,
}  # fmt: skip
"""Settings of other sections that decide the published training. All but `data.unit` and `parallel.precision` are
defaults."""

_WORDS = {"parallel.precision": "fp16 without loss scaling"}
"""What the published program has where the value of a setting does not say it."""

_DROPOUT = {"crossfusion": 0.3, "crossfusion_concat": 0.3, "crossfusion_single": 0.3, "transmil": 0.1}
_ATTENTION_DROPOUT = 0.2


def with_recipe(values: Any) -> Any:
    """Fill in the values of `train.recipe` that a configuration does not give; those that it gives stay.

    `published` also sets `data.unit`, `parallel.precision` and `model.options.published`, the published dropouts. Under
    the protocol of that name it sets `train.published_errors`; under any other the scored patients must not decide the
    time bins. With `train.published_errors`, set or given, `parallel.precision` is f32 in place of `auto`.
    If a given `train.epochs` ends training before the recipe's `min_epoch`, only the last epoch may be chosen.

    Args:
        values: Sections of a configuration as plain values; anything else is returned unchanged.
    """
    train = values.get("train") if isinstance(values, dict) else None
    if train is None:
        return values
    if not isinstance(train, dict) or train.get("recipe") != "published":
        return _with_f32(values) if _plain(train).get("published_errors") is True else values
    evaluation = _plain(values.get("evaluation", {}))
    filled = {**PUBLISHED_RECIPE, "published_errors": evaluation.get("protocol") == "published", **train}
    epochs = filled["epochs"]
    if "min_epoch" not in train and isinstance(epochs, int) and epochs <= filled["min_epoch"]:
        filled["min_epoch"] = max(epochs - 1, 0)
    model, data = (_plain(values.get(section, {})) for section in ("model", "data"))
    return {
        **_with_f32(values),
        "train": filled,
        "data": {"unit": "slide", **data},
        "model": {**model, "options": {"published": True, **model.get("options", {})}},
    }


def _with_f32(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in `parallel.precision`."""
    parallel = _plain(values.get("parallel", {}))
    given = parallel.get("precision", "auto")
    return {**values, "parallel": {**parallel, "precision": "f32" if given == "auto" else given}}


def departures(values: Mapping[str, Any]) -> list[str]:
    """List what a configuration changes in its recipe, as `section.key=value (published: value)`.

    Args:
        values: A complete configuration as plain values; empty if its recipe is not `published`.
    """
    if values["train"]["recipe"] != "published":
        return []
    return [
        f"{key}={ours} (published: {_WORDS.get(key, theirs)})"
        for key, ours, theirs in _compared(values)
        if ours != theirs
    ]


def recipe_notes(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what a reader of the scores must know about the recipe of a complete configuration; empty if nothing."""
    changed = departures(values)
    notes = [f"No longer the published recipe: {', '.join(changed)}."] if changed else []
    if values["train"]["published_errors"]:
        notes += [f"Error of the published program, {PUBLISHED_ERRORS[name]}." for name in _brought_back(values)]
    return tuple(notes)


def _brought_back(values: Mapping[str, Any]) -> list[str]:
    """List the errors that a configuration with `train.published_errors` has; a given precision replaces theirs."""
    return [name for name in PUBLISHED_ERRORS if name != "precision" or values["parallel"]["precision"] == "f32"]


def _compared(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key of the recipe with its value here and in the published program."""
    for key, theirs in {**PUBLISHED_RECIPE, "published_errors": True}.items():
        yield f"train.{key}", values["train"][key], theirs
    for key, theirs in _ELSEWHERE.items():
        section, name = key.split(".")
        yield key, values[section][name], theirs
    model = values["model"]
    dropouts = {"dropout": _DROPOUT.get(model["name"], 0.0), "attention_dropout": _ATTENTION_DROPOUT}
    for name, theirs in {"published": True, **dropouts}.items():
        yield f"model.options.{name}", model["options"].get(name, theirs), theirs


def _plain(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else section.model_dump()
