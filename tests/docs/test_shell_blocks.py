"""Every shell block of the documentation runs, in order, as printed, or says in the source why it cannot run here.

A comment before a block or at the head of a page says what the reader does not see:
`<!-- not run: REASON -->`, `<!-- leaves with CODE -->`, `<!-- set-up: cohort -->` (a small cohort in ./study with
study.yaml, its features and shards).
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from factories import make_cohort

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
QUICK = ("docs/howto/score-predictions.md", "docs/howto/disk-and-memory.md", "docs/howto/shell.md")
"""Pages that take seconds; the others are run with the slow tests."""
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<note>[^\n]*?) -->\n(?: *\n)*(?P=indent))?```bash\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_SET_UP = re.compile(r"^<!-- set-up: (\w+) -->$", re.MULTILINE)


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
    for match in _BLOCK.finditer(text):
        note = match["note"] or ""
        kind, _, rest = note.partition(": ")
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        leaves = re.fullmatch(r"leaves with (\d+)", note)
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


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[] if name(p) in QUICK else pytest.mark.slow) for p in RUN], ids=name
)
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


def _cohort(folder: Path) -> None:
    files = make_cohort(folder / "study", patients=60)
    values = files.config(Path("runs/study")).model_dump(mode="json")
    values["cohort"] = {"name": "study", "table": "study/clinical.csv"}
    values["data"] = {"shards": "study/shards"}
    values["train"] |= {"epochs": 2}
    values["tracking"] = {"experiment": "study"}
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


SET_UPS = {"cohort": _cohort}
