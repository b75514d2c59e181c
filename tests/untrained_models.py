"""Untrained fold models, and fixtures of the tests that predict with them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from factories import ENCODER, CohortFiles, make_cohort
from typer.testing import CliRunner

from cfusion.cli.main import app
from cfusion.config import ModelConfig
from cfusion.training.fitted import FittedModel, ModelCard, StratumCard, build

NONE: Mapping[str, float] = MappingProxyType({})
MAGNIFICATIONS = (20.0, 10.0, 5.0)
EDGES = ((0.0, 6.0, 14.0, 30.0, 200.0), (0.0, 6.0, 15.0, 31.0, 200.0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return make_cohort(tmp_path_factory.mktemp("cohort"), patients=30, two_slides=3)


def untrained(
    folder: Path, *, grid: str = "spatial", encoder: str = ENCODER, dim: int = 8, strata: Mapping[str, float] = NONE
) -> Path:
    """Save two fold models with random weights in the layout of a finished run.

    `strata`: cohorts of a joint model, and by how much their time bins are longer than the model's.
    """
    settings = ModelConfig(embed_dim=16, num_heads=2, options={"grid": grid})
    for fold, edges in enumerate(EDGES):
        torch.manual_seed(fold)
        card = ModelCard(
            model=settings.model_dump(mode="json"), backbone_dim=dim, magnifications=MAGNIFICATIONS, edges_months=edges,
            encoder=encoder, cohort="made_up", endpoint="OS", fold=fold, risk_cutoff=-2.2 + 0.1 * fold,
            strata={name: StratumCard(tuple(times * edge for edge in edges), -2.0) for name, times in strata.items()},
        )  # fmt: skip
        network = build(settings, dim, 4, MAGNIFICATIONS).eval()
        with torch.no_grad():  # some parts of a fresh network are zero, such as the position encoding
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        FittedModel(network, card).save(folder / f"fold_{fold}" / "model")
    return folder


@pytest.fixture
def cfusion() -> Callable[..., str]:
    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return call
