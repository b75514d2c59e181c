"""Whether a run of the tests asks for those that need a GPU."""

import re


def asks_for_a_gpu(marks: str) -> bool:
    """Whether an expression of `-m` names the marker `gpu` without excluding it."""
    return re.search(r"(?<!\bnot )\bgpu\b", marks) is not None
