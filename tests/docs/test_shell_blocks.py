"""Every shell block of the documentation runs, in order, as printed, or says in the source why it cannot run here.

A comment before a block or at the head of a page says what the reader does not see:
`<!-- not run: REASON -->`, `<!-- leaves with CODE -->`, and `<!-- set-up: NAME -->`: `cohort`, a small one in ./study
with study.yaml; `cohorts`, two in ./short and ./long; `trident`, the folder of another program; `two-encoders`, shards
of two; `run`, drawn slides and a run; `doors`, drawn slides, the folder of another program for them, and predictions.
`<!-- with: KEY=VALUE … -->` adds settings to each `cfusion train` and `cfusion sweep` of the block, which make a test
short and a result worse; `<!-- with everywhere: KEY=VALUE … -->` at the head of a page, to those of all blocks.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from factories import make_cohort, make_cohorts

from cfusion.config import Config, validate
from cfusion.data.shards import ShardDataset
from cfusion.data.store import FeatureStore
from cfusion.runs.crossval import cross_validate
from preprocess.extraction import preprocess_slides
from preprocess.packing import pack_store
from preprocess.phantom.draw import PHANTOMS, draw_cohort
from preprocess.settings import PreprocessConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
QUICK = ("docs/howto/shell.md",)
"""Pages that take seconds; README, CONTRIBUTING and the tutorials are slow tests, the other pages long ones."""
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<note>[^\n]*?) -->\n(?: *\n)*(?P=indent))?```bash\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_WITH = re.compile(r"^<!-- with everywhere: ([^\n]*) -->$", re.MULTILINE)
_TAKES_SETTINGS = re.compile(r"^(cfusion (?:train|sweep \w+) [^#|\n]*?)( *[#|].*)?$", re.MULTILINE)
_SET_UP = re.compile(r"^<!-- set-up: ([\w-]+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One shell block: the line where it begins, its code, the exit code it leaves with, and why it is not run."""

    line: int
    code: str
    leaves_with: int
    not_run: str


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text()
    everywhere = " ".join(_WITH.findall(text))
    for match in _BLOCK.finditer(text):
        note = match["note"] or ""
        kind, _, rest = note.partition(": ")
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        leaves = re.fullmatch(r"leaves with (\d+)", note)
        settings = rest if kind == "with" else everywhere
        if settings:
            code = _TAKES_SETTINGS.sub(rf"\1 {settings}\2", code)
        reason = rest.strip() if kind == "not run" else ""
        line = text[: match.start("code")].count("\n") + 1
        found.append(Block(line, code, int(leaves[1]) if leaves else 0, reason))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


RUN = [page for page in PAGES if any(not block.not_run for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_shell_block_is_seen(page):
    text = page.read_text()
    assert len(blocks(page)) == len(re.findall(r"^ *```bash$", text, re.MULTILINE))
    assert not re.search(r"^ *```(sh|shell|console|zsh)\b", text, re.MULTILINE), "call it bash, so that it is run"
    assert text.count("<!-- not run") == sum(bool(block.not_run) for block in blocks(page)), "a reason without a block"
    for block in blocks(page):
        assert subprocess.run(["bash", "-n"], input=block.code, text=True, check=False).returncode == 0


def test_the_quick_pages_are_there():
    assert not set(QUICK) - {name(page) for page in RUN}


def marks(page: Path) -> list[pytest.MarkDecorator]:
    if name(page) in QUICK:
        return []
    return [pytest.mark.long if "howto" in page.parts else pytest.mark.slow]


@pytest.mark.parametrize("page", [pytest.param(page, marks=marks(page)) for page in RUN], ids=name)
def test_the_blocks_of_a_page_run(page, tmp_path):
    for set_up in _SET_UP.findall(page.read_text()):
        SET_UPS[set_up](tmp_path)
    script = [f"cd {tmp_path}"]
    for block in blocks(page):
        if block.not_run:
            continue
        script.append(f"echo '{name(page)}:{block.line}' >> blocks.log")
        wanted = f"[ $code = {block.leaves_with} ] || exit 1"
        script.append(block.code if not block.leaves_with else f"set +e\n{block.code}\ncode=$?\nset -e\n{wanted}")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "CHECKOUT": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(script)],
        capture_output=True, text=True, timeout=580, env=environment, check=False,
    )  # fmt: skip
    at = (tmp_path / "blocks.log").read_text().split()[-1]
    assert done.returncode == 0, f"{at}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Warning: " not in done.stderr, done.stderr[-3000:]
    for shown in re.findall(r"^```text\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        assert shown in done.stdout, f"{name(page)} shows what no command printed:\n{shown}"


def _cohort(folder: Path) -> None:
    files = make_cohort(folder / "study", patients=60)
    values = files.config(Path("runs/study")).model_dump(mode="json", exclude_defaults=True)
    values |= {"cohort": {"name": "study", "table": "study/clinical.csv"}, "data": {"shards": "study/shards"}}
    values["train"] |= {"epochs": 6, "lr": 1e-2}
    values["tracking"] = {"experiment": "study"}
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _cohorts(folder: Path) -> None:
    """Two cohorts with their shards, in ./short and ./long."""
    make_cohorts(folder)


def _trident(folder: Path) -> None:
    """The job folder of TRIDENT for a small cohort, and its clinical table."""
    files = make_cohort(folder / "made", patients=48)
    files.table.rename(folder / "clinical.csv")
    shards = ShardDataset.open(files.shards)
    for slide in sorted(shards.slide_ids):
        for name, side in (("x20", 256), ("x10", 512), ("x5", 1024)):
            job = folder / "trident_output" / f"{name[1:]}x_256px_0px_overlap" / "features_uni_v1"
            job.mkdir(parents=True, exist_ok=True)
            arrays = shards.read(slide, (name, f"coords_{name}"))
            with h5py.File(job / f"{slide}.h5", "w") as file:
                file.create_dataset("features", data=arrays[name]).attrs["encoder"] = "uni_v1"
                coords = file.create_dataset("coords", data=arrays[f"coords_{name}"].astype("int64"))
                coords.attrs.update({"patch_size": 256, "patch_size_level0": side, "overlap": 0})


def _doors(folder: Path) -> None:
    """Drawn slides with their table, TRIDENT's features of the same slides, predictions, and study.yaml."""
    drawn = draw_cohort(dataclasses.replace(PHANTOMS[0], patients=24), folder / "drawn")
    drawn.slides.rename(folder / "slides")
    drawn.table.rename(folder / "clinical.csv")
    rng = np.random.default_rng(0)
    for slide in sorted(path.stem for path in (folder / "slides").iterdir()):
        for magnification, across in ((20, 8), (10, 4), (5, 2)):
            job = folder / "trident_output" / f"{magnification}x_256px_0px_overlap" / "features_uni_v1"
            job.mkdir(parents=True, exist_ok=True)
            side = 256 * 20 // magnification
            coords = np.stack(np.meshgrid(range(across), range(across)), axis=-1).reshape(-1, 2) * side
            with h5py.File(job / f"{slide}.h5", "w") as file:
                features = rng.standard_normal((len(coords), 16), dtype=np.float32)
                file.create_dataset("features", data=features).attrs["encoder"] = "uni_v1"
                file.create_dataset("coords", data=coords).attrs.update(
                    {"patch_size": 256, "patch_size_level0": side, "overlap": 0}
                )
    table = pd.read_csv(folder / "clinical.csv").drop_duplicates("patient").reset_index(drop=True)
    columns = {"case_id": table["patient"], "survival_months": table["time"], "event": table["event"]}
    predictions = pd.DataFrame({"model": "mine", "cohort": "study", "fold": table.index % 2, **columns})
    predictions.assign(risk=rng.standard_normal(len(table))).to_csv(folder / "predictions.csv", index=False)
    values = {
        "cohort": {"name": "study", "table": "clinical.csv"},
        "splits": {"folds": 2},
        "data": {"shards": "shards"},
        "model": {"embed_dim": 16, "num_heads": 2},
        "train": {"epochs": 1, "micro_batch": 8},
        "parallel": {"global_batch": 8},
        "evaluation": {"bootstrap": 20},
        "tracking": {"enabled": False},
        "output": "runs/study",
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(values))


def _two_encoders(folder: Path) -> None:
    """One cohort with shards of two encoders, shards/uni and shards/conch."""
    for encoder in ("uni", "conch"):
        files = make_cohort(folder / encoder, patients=48)
        index = json.loads((files.shards / "index.json").read_text())
        files.table.replace(folder / "clinical.csv")
        (folder / "shards").mkdir(exist_ok=True)
        (files.shards / "index.json").write_text(json.dumps({**index, "encoder": encoder}))
        files.shards.rename(folder / "shards" / encoder)


def _run(folder: Path) -> None:
    """Slides in study/slides, and a small model trained on them in runs/study."""
    cohort = draw_cohort(dataclasses.replace(PHANTOMS[0], patients=40), folder / "study")
    config = PreprocessConfig(slides=cohort.slides, store=folder / "features", threads=2)
    preprocess_slides(config, strict=True)
    pack_store(FeatureStore.open(config.store), folder / "shards")
    values = {
        "cohort": {"name": "study", "table": str(cohort.table)},
        "splits": {"folds": 2},
        "data": {"shards": str(folder / "shards")},
        "model": {"embed_dim": 16, "num_heads": 2},
        "train": {"epochs": 1, "micro_batch": 8},
        "parallel": {"global_batch": 8},
        "evaluation": {"bootstrap": 20},
        "tracking": {"enabled": False},
        "output": str(folder / "runs" / "study"),
    }
    cross_validate(validate(Config, values, "set-up"))


SET_UPS = {
    "cohort": _cohort, "cohorts": _cohorts, "trident": _trident, "two-encoders": _two_encoders, "run": _run,
    "doors": _doors,
}  # fmt: skip
