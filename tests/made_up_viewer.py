"""A folder of slides with an explanation and a run, for the tests of the viewer."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from slide_factory import tissue_picture, write_slide

from cfusion.explanation.result import Explanation, TileScores, write_explanation
from cfusion.view.api import Viewer
from cfusion.view.explanations import Explanations
from cfusion.view.patient_curve import CohortCurves
from cfusion.view.served_slides import SlideFolder
from cfusion.view.server import listen, make_server

SIZE = (2048, 1536)
SIDES = {"x20": 256.0, "x10": 512.0, "x5": 1024.0}
EXPLAINED, PLAIN, DAMAGED = "PT-0001-a", "PT-0002-a", "PT-0003-a"
CURVE = pd.DataFrame({"months": [0.0, 6, 12, 24], "survival": [1.0, 0.8, 0.6, 0.5], "survival_sd": [0, 0.1, 0.1, 0.1]})


@dataclass(frozen=True)
class Files:
    """Where a made-up viewer's files lie."""

    slides: Path
    explanations: Path
    run: Path

    def viewer(self, **changes: Any) -> Viewer:
        parts = {"curves": CohortCurves(self.run), **changes}
        return Viewer(SlideFolder(self.slides), Explanations(self.explanations), **parts)


def make_files(folder: Path) -> Files:
    """Three slides, one explained and one damaged; a run with their patients."""
    slides = folder / "slides"
    slides.mkdir(parents=True)
    for seed, name in enumerate((EXPLAINED, PLAIN)):
        write_slide(slides / f"{name}.svs", tissue_picture(*SIZE, seed=seed), power=20, level_sizes=((512, 384),))
    (slides / f"{DAMAGED}.svs").write_bytes(b"II*\0" + bytes(500))
    write_explanation(explanation(EXPLAINED), folder / "explanations" / EXPLAINED / "explanation.zarr")
    (folder / "run").mkdir()
    table = predictions()
    table.to_csv(folder / "run" / "predictions.csv", index=False)
    clinical = table.rename(columns={"case_id": "patient", "survival_months": "time"})[["patient", "time", "event"]]
    clinical.assign(slide=clinical["patient"] + "-a").to_csv(folder / "clinical.csv", index=False)
    (folder / "run" / "config.yaml").write_text(f"cohort: {{name: made_up, table: {folder / 'clinical.csv'}}}\n")
    return Files(slides, folder / "explanations", folder / "run")


def explanation(slide_id: str, **attrs: Any) -> Explanation:
    """Scores of the tiles on tissue: the left half raises the risk, the right half lowers it.

    The models agree on all but the attention of the left half; attention is stored first, as it once was.
    """
    levels: dict[str, TileScores] = {}
    for name, side in SIDES.items():
        columns, rows = (int(np.ceil(n / side)) for n in SIZE)
        grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
        centre = (grid + 0.5) * side
        near = np.hypot(*(centre - np.array(SIZE) / 2).T) < 500 + side / 2
        coords = (grid[near] * side).astype(np.int32)
        sign = np.where(coords[:, 0] < SIZE[0] / 2, 1.0, -1.0)
        occlusion = sign * 0.2 if name == "x5" else np.full(len(coords), np.nan)
        mean = np.stack([1 + 0.5 * sign, sign * 0.1, occlusion]).astype(np.float32)
        p = np.where(np.isnan(mean), np.nan, 0.01).astype(np.float32)
        p[0, sign > 0] = 0.4
        levels[name] = TileScores(coords, side, mean, np.abs(mean) / 10, p=p)
    attributes = {
        "encoder": "made-up",
        "model": "crossfusion",
        "cohort": "made_up",
        "mpp": 0.5,
        "slide_size_px": list(SIZE),
        "risk_cutoff": None,
        "ranking": {"cindex": 0.7, "chance": 0.5, "p": 0.001, "patients": 40, "events": 25},
    }  # as a model that was taken from a training in progress has none
    methods = ("attention", "gradient", "occlusion")
    return Explanation(slide_id, methods, levels, CURVE, (-2.0, -2.2, -2.4), attributes | attrs)


def predictions(patients: int = 40) -> pd.DataFrame:
    """Two folds, with curves; patient number i has risk i."""
    rng = np.random.default_rng(0)
    risk = np.arange(patients, dtype=float)
    table = pd.DataFrame({
        "model": "crossfusion", "cohort": "made_up", "protocol": "strict", "fold": np.arange(patients) % 2,
        "case_id": [f"PT-{i:04d}" for i in range(patients)], "risk": risk,
        "survival_months": rng.exponential(30, patients).round(2) + 0.1, "event": rng.random(patients) < 0.6,
    })  # fmt: skip
    for k, month in enumerate((6.0, 12.0, 24.0, 60.0), start=1):
        table[f"survival_{k}"], table[f"edge_{k}"] = np.exp(-month / 60 * (0.5 + risk / patients)), month
    return table


class Client:
    """Asks a running viewer."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.address = f"http://127.0.0.1:{port}/"

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content; the path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def json(self, path: str, status: int = 200) -> Any:
        found, _, content = self.ask(path)
        assert found == status, content
        return json.loads(content)

    def keys(self) -> dict[str, str]:
        """Key of every slide, by its id."""
        return {slide["id"]: slide["key"] for slide in self.json("/api/state")["slides"]}


@contextlib.contextmanager
def running(viewer: Viewer) -> Iterator[Client]:
    """A viewer that answers in a thread of this process."""
    server = make_server(viewer)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


def until(condition: Callable[[], bool], tries: int = 400) -> None:
    """Wait for what another thread or process does."""
    for _ in range(tries):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError("did not become true")
