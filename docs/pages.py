"""Pages of the site that are made from the code: commands, settings, modules, errors, changes and figures."""

from __future__ import annotations

import ast
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo

import cfusion
from cfusion.cli.main import app
from cfusion.config import Config, Section
from cfusion.program import MODULES, TEXTS
from cfusion.runs.run import RECORDED_ASIDE
from launch.sweep.plan import SweepConfig
from launch.tasks.slurm_options import ClusterProfile
from preprocess import descriptor
from preprocess.encoders import StainTexture
from preprocess.encoders.cards import CARDS
from preprocess.settings import PreprocessConfig

ROOT = Path(__file__).parents[1]
SEARCH_BOOST = {"tutorials": 4, "howto": 3, "explanation": 2}
"""Factor of the search's score, by folder."""

API_BOOST = 0.5
MAPPED = ("cfusion", "preprocess", "launch", "benchmarks", "docs")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages; called by MkDocs."""
    pages = {
        "errors.md": (ROOT / "cfusion" / "errors.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "figures.md": (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"),
        "reference/cli.md": command_reference(),
        "reference/python.md": python_reference(),
        "reference/configuration.md": configuration_reference(),
        "reference/identity.md": identity_reference(),
        "reference/encoders.md": encoder_reference(),
        "reference/map.md": module_map(),
        **module_pages(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rank what one reads first above pages for looking up; called by MkDocs."""
    folder = page.file.src_uri.partition("/")[0]
    boost = API_BOOST if page.file.src_uri.startswith("reference/api/") else SEARCH_BOOST.get(folder, 1)
    page.meta.setdefault("search", {"boost": boost})
    return markdown


# --- commands ---------------------------------------------------------------------------------------------------------


def command_reference() -> str:
    """Every command with its help, arguments and options, as `cfusion COMMAND --help` shows them."""
    lines = ["# Commands", "", "The help of every command, as `cfusion COMMAND --help` shows it. Exit codes:", ""]
    lines += [
        "0", ":   done", "",
        "2", ":   invalid input, reported in one line with the [page that explains it](../errors.md)", "",
        "3", ":   finished, but some items failed (listed)", "",
        "75", ":   stopped on request, state saved; run the same command again to resume", "",
    ]  # fmt: skip
    for path, command in _walk(typer.main.get_command(app), "cfusion"):
        lines += _describe(path, command)
    return "\n".join(lines)


def _walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", {})
    if not children:
        yield path, command
    for name, child in children.items():
        yield from _walk(child, f"{path} {name}")


def _describe(path: str, command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([path, *(_placeholder(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {path}", "", "```text", usage, "```", "", *_prose(command.help or ""), ""]
    if arguments or options:
        lines += ["| | meaning | default |", "|---|---|---|"]
        lines += [f"| `{_placeholder(p)}` | {_cell(p.help)} | {_default(p)} |" for p in arguments]
        lines += [f"| `{', '.join(p.opts)}` | {_cell(p.help)} | {_default(p)} |" for p in options]
    return [*lines, ""]


def _placeholder(parameter: Any) -> str:
    name = parameter.name.upper() + ("…" if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return f"`{value}`" if value not in (None, False, "", (), []) else ""


def _prose(text: str) -> list[str]:
    """Help as Markdown: paragraphs that are command lines become a block."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\b", "").strip()):
        if re.match(r"\s*(cfusion|torchrun|python|accelerate) ", paragraph):
            lines += ["```sh", *(line.strip() for line in paragraph.strip().splitlines()), "```", ""]
        else:
            lines += [" ".join(paragraph.split()), ""]
    return lines


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


# --- settings ---------------------------------------------------------------------------------------------------------


def configuration_reference() -> str:
    """Every setting with its type, default and meaning, from the fields of `cfusion.config`."""
    lines = [
        "# Configuration", "",
        "A run is one YAML file with the sections below; `section.key=value` on the command line overrides one key. "
        "Unknown keys are errors, with the nearest valid name. `cfusion train CONFIG --print-config` shows what a file "
        "means with all its defaults.", "", "## The run", "",
        *_table({k: f for k, f in Config.model_fields.items() if not _is_section(f)}),
    ]  # fmt: skip
    for name, field in Config.model_fields.items():
        if _is_section(field):
            lines += _section(name, f"{field.annotation.__doc__}", field.annotation)  # type: ignore[union-attr]
    lines += _section("Preprocessing", "What the options of `cfusion preprocess` set.", PreprocessConfig)
    lines += _section("Sweep", "The file of `cfusion sweep`.", SweepConfig)
    lines += _section("Cluster", "`~/.config/cfusion/cluster.yaml`: options of a site's SLURM.", ClusterProfile)
    return "\n".join(lines)


def identity_reference() -> str:
    """What decides the numbers of a run and what does not, from the marks that the code itself reads."""
    settings = [f"| `{key}` | {_cell(reason)} |" for key, reason in Config.asides().items()]
    recorded = [f"| `{key}` | {_cell(reason)} |" for key, reason in RECORDED_ASIDE.items()]
    modules = [
        f"| `cfusion.{name}` | {'yes' if module.computes else 'no'} | {_cell(module.what)} |"
        for name, module in MODULES.items()
    ]
    return "\n".join([
        "# What decides the numbers", "",
        "A run is known by what decides its numbers. A run with the same identity continues in its folder, and a sweep "
        "does not train it again; if something below that decides is different, the folder is refused and a sweep "
        "trains the run again.", "",
        "| what | decides |", "|---|---|",
        "| settings | all but those [below](#settings-that-do-not-decide) |",
        "| outcome tables and tables of the slides | their content, not their path; of several cohorts, their names |",
        "| model that training starts from | its weights, not where they are |",
        "| folds and test patients | who is in which, not the files they come from |",
        "| shards | their index, which holds a checksum of every tar, not their path or address |",
        "| code of the program | the modules [below](#modules), without texts |",
        "| model of your own | the file's content; for an installed package also its version |",
        "| versions of Python and torch, platform | no; they are recorded |", "",
        "`run.json` has the digests. If code changed and you know that the numbers are the same, `cfusion train CONFIG "
        "--same-code DIGEST` continues a run of the earlier code, and `code: DIGEST` in a sweep's file counts and "
        "continues its runs.", "",
        "## Settings that do not decide", "", "| setting | why |", "|---|---|", *settings, "",
        "## Records that do not decide", "", "| in `run.json` | why |", "|---|---|", *recorded, "",
        "## Modules", "",
        "Numbers, operators and names of a module that computes count. These do not:", "",
        *(f"- {text}" for text in TEXTS), "",
        "| module | decides | what it does |", "|---|---|---|", *modules, "",
    ])  # fmt: skip


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _section(name: str, text: str, section: Any) -> list[str]:
    heading = f"## `{name}`" if name.islower() else f"## {name}"
    return [heading, "", text, "", *_table(section.model_fields)]


def _table(fields: dict[str, FieldInfo]) -> list[str]:
    rows = [
        f"| `{key}` | {_cell(_type(field.annotation) + _range(field))} | {_cell(_value(field))} | "
        f"{_cell(field.description)} |"
        for key, field in fields.items()
    ]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if a is type(None) else _type(a) for a in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}
    name = getattr(origin or annotation, "__name__", str(annotation))
    return {"dict": "mapping", **names}.get(name, name)


def _range(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{s} {getattr(m, k):g}" for m in field.metadata for k, s in signs.items() if hasattr(m, k)]
    return f" ({', '.join(found)})" if found else ""


def _value(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    if value is None:
        return "none"
    shown = (
        ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) if isinstance(value, tuple) else value
    )
    shown = str(shown).lower() if isinstance(shown, bool) else f"{shown:g}" if isinstance(shown, float) else shown
    return f"`{shown}`" if shown not in ("", {}) else "empty"


# --- encoders ---------------------------------------------------------------------------------------------------------


def encoder_reference() -> str:
    """Every encoder known by name, with width, licence and model card."""
    rows = [
        f"| [`{name}`]({card.source}) | {card.dim} | {card.licence}{', gated' if card.gated else ''} "
        f"| {'yes' if card.weights_tried else 'no'} |"
        for name, card in CARDS.items()
    ]
    return "\n".join([
        "# Encoders", "",
        "Names of `cfusion preprocess --encoder`. Each runs as its model card, which the name leads to, says. Besides, "
        "`timm:NAME` and `hf:OWNER/NAME` take anything that timm can build.", "",
        "The tests check shapes, parameter counts and the names of the weights of all; weights were tried where the "
        "table says so.", "",
        "| name | width | licence | weights tried |", "|---|---|---|---|",
        f"| `{StainTexture.name}` | {descriptor.DIM} | this program's own: nothing learnt | none |", *rows, "",
    ])  # fmt: skip


# --- modules ----------------------------------------------------------------------------------------------------------


def module_pages() -> dict[str, str]:
    """A page for each package, with the docstrings of its modules; one for the modules right below `cfusion`."""
    packages = [ROOT / "preprocess", ROOT / "launch"]
    packages += [folder for folder in (ROOT / "cfusion").iterdir() if (folder / "__init__.py").exists()]
    pages = {f"reference/api/{p.name}.md": _package_page(p) for p in packages if p.name != "cli"}
    return {"reference/api/cfusion.md": _package_page(ROOT / "cfusion", deep=False), **pages}


def module_map() -> str:
    """Every module and script, folder by folder, with the first line of its docstring or head comment."""
    files = [f for top in MAPPED for f in (ROOT / top).rglob("*") if f.suffix in (".py", ".sh")]
    lines = [
        "# Map of the modules", "",
        "Every module and script with its first line, generated from the files. `tests/` mirrors these folders.", "",
    ]  # fmt: skip
    for folder in sorted({f.parent for f in files}, key=lambda f: (MAPPED.index(f.relative_to(ROOT).parts[0]), f)):
        lines += [f"## {folder.relative_to(ROOT)}/", ""]
        if (folder / "__init__.py").exists():
            lines += [first_line(folder / "__init__.py"), ""]
        modules = sorted(f for f in files if f.parent == folder and f.name != "__init__.py")
        rows = [f"| `{f.name}` | {_cell(first_line(f))} |" for f in modules]
        lines += ["| module | what it is for |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(lines)


def first_line(file: Path) -> str:
    """The first line of a module's docstring, or of the comment below a script's `#!` line; may be empty."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".sh":
        head = text.splitlines()[1:2]
        return head[0].removeprefix("#").strip() if head and head[0].startswith("#") else ""
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def python_reference() -> str:
    """The hand-written head of the page on Python, and the public names with where each is explained."""
    head = (ROOT / "docs" / "reference" / "python.head.md").read_text(encoding="utf-8")
    rows = []
    for name in cfusion._API:
        thing = getattr(cfusion, name)
        summary = (inspect.getdoc(thing) or "").partition("\n\n")[0]
        rows.append(f"| [`cfusion.{name}`][{thing.__module__}.{thing.__qualname__}] | {_cell(summary)} |")
    return "\n".join([head, "| name | |", "|---|---|", *rows, ""])


def _package_page(folder: Path, deep: bool = True) -> str:
    name = ".".join(folder.relative_to(ROOT).parts)
    modules = sorted(folder.rglob("*.py") if deep else folder.glob("*.py"))
    dotted = [
        ".".join(m.relative_to(ROOT).with_suffix("").parts) for m in modules if m.stem not in ("__init__", "__main__")
    ]
    return "\n".join([f"# {name}", "", *(f"::: {module}\n" for module in dotted)])
