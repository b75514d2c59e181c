"""What MLflow serves: a fold ensemble that answers a bag with risk and survival curve.

MLflow keeps this file with the model and runs it to load it, so no pickled object is stored.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow.models
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel

from cfusion.apply.ensemble import FoldEnsemble
from cfusion.errors import CfusionError, DataError


class ServedEnsemble(PythonModel):
    """A fold ensemble behind MLflow's generic interface."""

    def load_context(self, context: Any) -> None:
        """Read the fold models among the run's artifacts.

        Code that came with the models runs only where the variable `CFUSION_TRUST_CODE` names its SHA-256.
        """
        trust_code = os.environ.get("CFUSION_TRUST_CODE")
        self.ensemble = FoldEnsemble.load(Path(context.artifacts["folds"]), trust_code=trust_code)

    def predict(  # type: ignore[no-untyped-def]
        self, context: Any, model_input, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Risk and survival of one bag: f32 [tile, dim] per magnification name (see `FoldEnsemble.predict_bag`).

        The parameter `positions` is JSON of each tile's column and row per magnification name, and `slide` the name of
        the slide or of its patient, who may have been in the training. A model that was trained
        on several cohorts needs the parameter `cohort`, the name of the patient's. `model_input` has no annotation,
        which MLflow would take for another signature than the registered one.

        Raises:
            MlflowException: The bag cannot be used; the server answers 400 with what is wrong.
        """
        positions = json.loads((params or {}).get("positions") or "null")
        cohort, slide = (str((params or {}).get(name) or "") for name in ("cohort", "slide"))
        try:
            return self._of(cohort).predict_bag(model_input, positions, slide or None)
        except CfusionError as error:  # of any other class than its own, MLflow's server hides the message
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _of(self, cohort: str) -> FoldEnsemble:
        """Return the models for a bag of a cohort.

        Raises:
            CfusionError: There are several cohorts and none is named, or it is none of theirs.
        """
        if cohort:
            return self.ensemble.of_cohort(cohort)
        if self.ensemble.cohorts:
            raise DataError(
                "The model was trained on several cohorts, each with its own time bins; the parameter cohort names "
                "none.",
                f"Give one of {', '.join(self.ensemble.cohorts)}.",
            )
        return self.ensemble


mlflow.models.set_model(ServedEnsemble())
