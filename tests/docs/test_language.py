"""Texts use plain technical English: words that make a sentence read as translated do not occur."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUFFIXES = {
    ".cff", ".css", ".def", ".html", ".j2", ".js", ".md", ".py", ".sbatch", ".sh", ".toml", ".txt", ".yaml", ".yml",
}  # fmt: skip
WORDS = re.compile(
    r"""\b(?:
        told | said\s+of | (?:can|could|cannot|to)(?:\s+not)?\s+be\s+had | so\s+many | alone | as\s+by\s+default
        | anew | dear | (?<!--)beside | bears? | deals? | dealt | judge[sd]? | do(?:es)?\s+what\s+is\s+(?:left|missing)
        | the\s+others\s+go\s+on | of\s+(?:its|their)\s+own | is\s+there\b(?!\?)
        | whole(?![-\s]\s*slide|\s+(?:number|minute|month|week|day))
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Words to avoid. `whole-slide image` and `whole number` are terms; `… is there?` is a question; `--beside` is the name
of an option."""

EXEMPT = {
    "tests/docs/test_language.py": "the list itself",
    "tests/material/": "outputs of other programs, stored as they are",
}
"""Files or folders that are not searched, with the reason."""

QUOTED = {
    ("cfusion/training/group/member.py", '"judged"'): "key of a checkpoint",
    ("tests/models/test_seeded.py", '"whole"'): "key of a stored record",
}
"""File and text that is removed before the search, with the reason."""


def hits(path: str, text: str) -> list[str]:
    """Return `file:line: word` for every word to avoid in a text; an underscore separates words."""
    for file, quoted in QUOTED:
        if file == path:
            text = text.replace(quoted, "")
    text = text.replace("_", " ")
    return [f"{path}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}" for m in WORDS.finditer(text)]


def texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [p for p in listed.stdout.splitlines() if Path(p).suffix in SUFFIXES and (ROOT / p).is_file()]
    return {p: (ROOT / p).read_text(encoding="utf-8") for p in paths if not p.startswith(tuple(EXEMPT))}


def test_a_word_to_avoid_is_reported_with_its_line():
    assert hits("a.md", "One.\nThe user is told.\n") == ["a.md:2: told"]
    assert hits("a.py", "def test_the_whole_run(): ...\n") == ["a.py:1: whole"]
    assert hits("a.md", "A whole-slide image has a whole number of levels. What is there?\n") == []
    assert hits("a.md", "--beside FILE stands\nbeside it.\n") == ["a.md:2: beside"]


def test_no_text_has_a_word_to_avoid():
    found = [hit for path, text in texts().items() for hit in hits(path, text)]
    assert not found, "\n".join(["Rewrite these sentences in plain English:", *found])


def test_every_exemption_is_needed():
    searched = texts()
    assert all(quoted in searched[file] for file, quoted in QUOTED)
    assert all((ROOT / path).exists() for path in EXEMPT)
