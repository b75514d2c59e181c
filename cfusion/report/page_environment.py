"""Where the pages' templates are read from: one way for the report, the comparison and the explanation of a slide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2

import cfusion
from cfusion.report.narrow_tables import name_cells


def page_environment(package: str, **filters: Callable[..., Any]) -> jinja2.Environment:
    """Templates in `templates/` of a package; HTML is escaped, and what a template names must be given.

    Args:
        package: Import name, such as `cfusion.report`.
        filters: By the name that templates call them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package), autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(filters, name_cells=name_cells)
    environment.globals["version"] = cfusion.__version__
    return environment
