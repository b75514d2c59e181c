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
from cfusion.errors import DataError


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

        The parameter `positions` is JSON of each tile's column and row per magnification name. `model_input` has no
        annotation, which MLflow would take for another signature than the registered one.

        Raises:
            MlflowException: The bag cannot be used; the server answers 400 with what is wrong.
        """
        positions = json.loads((params or {}).get("positions") or "null")
        try:
            return self.ensemble.predict_bag(model_input, positions)
        except DataError as error:  # of any other class than its own, MLflow's server hides the message
            raise MlflowException.invalid_parameter_value(str(error)) from error


mlflow.models.set_model(ServedEnsemble())
