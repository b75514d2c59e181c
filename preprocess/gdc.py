"""Slides from the Genomic Data Commons: manifests, and verified downloads that resume.

A slide gets its name only after its MD5 sum is verified; until then it is `NAME.part`, from which the next call
resumes.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import json
import logging
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfusion.console import progress
from cfusion.data.store import checked_name
from cfusion.errors import ConfigError, DataError
from cfusion.files import write_text

logger = logging.getLogger(__name__)

API = "https://api.gdc.cancer.gov"
"""The public endpoint; https://docs.gdc.cancer.gov/API/Users_Guide/Downloading_Files/ documents its calls."""

COLUMNS = ("id", "filename", "md5", "size", "state")
PROJECTS = {"gbmlgg": ("TCGA-GBM", "TCGA-LGG"), "coadread": ("TCGA-COAD", "TCGA-READ")}
"""Cohorts that span several projects."""

BLOCK_BYTES = 1 << 20
TIMEOUT_S = 60
ATTEMPTS = 3


@dataclass(frozen=True)
class ManifestRow:
    """One file of a manifest: UUID, name, MD5 sum, size in bytes and state."""

    id: str
    filename: str
    md5: str
    size: int
    state: str = "released"


def find_rows(source: str, api: str = API) -> list[ManifestRow]:
    """Return the files of a manifest, of a GDC sample sheet, or of a TCGA cohort such as `tcga_blca`.

    A sample sheet gives no MD5 sums and sizes, and a cohort name gives no files: the GDC is queried for them.

    Raises:
        ConfigError: The source is neither a file nor a valid cohort name.
        DataError: The file is unreadable, or the GDC is unreachable or does not know the files.
    """
    path = Path(source)
    if not path.is_file():
        return query_cohort(source, api)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).", "Expected a GDC manifest.") from error
    columns = text.splitlines()[0].split("\t") if text else []
    if {"id", "filename"} <= set(columns) and "md5" not in columns:
        return _query_ids([line.split("\t")[columns.index("id")] for line in text.splitlines()[1:]], str(path), api)
    return parse_manifest(text, str(path))


def parse_manifest(text: str, source: str) -> list[ManifestRow]:
    """Parse the rows of a manifest, each file once; `source` names it in errors.

    Raises:
        DataError: A column is missing, a row is malformed, or two files share one name.
    """
    reader = csv.DictReader(text.splitlines(), delimiter="\t")
    missing = [c for c in COLUMNS[:4] if c not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{source}: has no column {missing[0]}.", f"Expected, tab separated: {' '.join(COLUMNS)}.")
    rows: dict[str, ManifestRow] = {}
    for number, row in enumerate(reader, start=2):
        md5, size = (row["md5"] or "").lower(), row["size"] or ""
        if len(md5) != 32 or not set(md5) <= set("0123456789abcdef") or not size.isdigit():
            raise DataError(f"{source}, line {number}: md5 {md5!r} and size {size!r} are not valid for a file.")
        name = checked_name(row["filename"])
        parsed = ManifestRow(checked_name(row["id"]), name, md5, int(size), row.get("state") or "")
        if rows.setdefault(name, parsed) != parsed:
            raise DataError(f"{source}, line {number}: another file is also named {name}.")
    if not rows:
        raise DataError(f"{source}: lists no file.")
    return list(rows.values())


def write_manifest(path: Path, rows: Sequence[ManifestRow]) -> None:
    """Write a manifest that gdc-client can read."""
    lines = ["\t".join(COLUMNS), *("\t".join((r.id, r.filename, r.md5, str(r.size), r.state)) for r in rows)]
    write_text(path, "\n".join(lines) + "\n")


def query_cohort(cohort: str, api: str = API) -> list[ManifestRow]:
    """Query the GDC for the diagnostic slides of a TCGA cohort, such as `tcga_blca` or `gbmlgg`.

    Raises:
        ConfigError: This is not a valid cohort name.
        DataError: The GDC is unreachable or has no such slides.
    """
    short = cohort.lower().removeprefix("tcga").lstrip("_-")
    if not short.isalpha():
        raise ConfigError(f"{cohort!r}: expected a manifest file, or the name of a cohort such as tcga_blca.")
    projects = list(PROJECTS.get(short, (f"TCGA-{short.upper()}",)))
    wanted = {
        "cases.project.project_id": projects,
        "data_type": ["Slide Image"],
        "experimental_strategy": ["Diagnostic Slide"],
    }
    terms = [{"op": "in", "content": {"field": field, "value": value}} for field, value in wanted.items()]
    return _query({"op": "and", "content": terms}, f"{api}: {', '.join(projects)}", api)


def _query_ids(ids: list[str], source: str, api: str) -> list[ManifestRow]:
    rows = _query({"op": "in", "content": {"field": "files.file_id", "value": ids}}, source, api)
    unknown = sorted(set(ids) - {row.id for row in rows})
    if unknown:
        raise DataError(f"{source}: the GDC does not know {unknown[0]} ({len(unknown)} of {len(set(ids))} files).")
    return rows


def _query(filters: dict[str, Any], source: str, api: str) -> list[ManifestRow]:
    body = json.dumps({"filters": filters, "return_type": "manifest", "size": 20_000}).encode()
    with _request(f"{api}/files", {"Content-Type": "application/json"}, body) as answer:
        try:
            text = answer.read().decode("utf-8")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(f"{api}: cannot parse the response ({error}).", topic="network") from error
    return parse_manifest(text, source)


def client_call(manifest: Path, folder: Path, client: str = "gdc-client") -> list[str]:
    """Return the gdc-client command that downloads a manifest, as an argument list."""
    return [client, "download", "--manifest", str(manifest), "--dir", str(folder)]


def download(
    rows: Sequence[ManifestRow], folder: Path, *, api: str = API, client: str | None = None, threads: int = 4
) -> dict[str, str]:
    """Download the files of a manifest into a folder; files already there are skipped.

    Args:
        rows: Files.
        folder: Target folder; each file keeps its name.
        api: Endpoint, if no client is used.
        client: gdc-client program that does the transfers; None: download here, and resume interrupted transfers.
        threads: Number of parallel downloads.

    Returns:
        Reason for each missing file, by file name; empty if all are present.

    Raises:
        DataError: The client does not run, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot create the folder ({error.strerror}).", "Give another --out.") from error
    left = [row for row in rows if not _is_downloaded(folder / row.filename, row)]
    if client is not None and left:
        return _by_client(left, folder, client)
    failed: dict[str, str] = {}
    stop = threading.Event()
    with progress("Downloading", len(left)) as bar, ThreadPoolExecutor(threads) as pool:
        try:
            for row, why in zip(left, pool.map(lambda r: _fetch(r, folder, api, stop), left), strict=True):
                if why:
                    failed[row.filename] = why
                bar.advance(note=row.filename)
        finally:
            stop.set()
    return failed


def _is_downloaded(path: Path, row: ManifestRow) -> bool:
    return path.is_file() and path.stat().st_size == row.size


def _fetch(row: ManifestRow, folder: Path, api: str, stop: threading.Event) -> str:
    """Download one file, unless `stop` is set; return the reason if it failed, or an empty string."""
    target = folder / row.filename
    part = folder / f"{row.filename}.part"
    why = ""
    for _ in range(ATTEMPTS):
        if stop.is_set():
            return "interrupted"
        try:
            _transfer(f"{api}/data/{row.id}", part, row.size, stop)
        except DataError as error:
            why = str(error)
            continue
        found = _md5(part)
        if found == row.md5:
            part.replace(target)
            return ""
        why = f"MD5 is {found}, expected {row.md5}"
        part.unlink()
    return why


def _transfer(url: str, part: Path, size: int, stop: threading.Event) -> None:
    """Complete `part` from its current size."""
    there = part.stat().st_size if part.exists() else 0
    if there > size:
        part.unlink()
        there = 0
    if there == size:
        return
    headers = {"Range": f"bytes={there}-"} if there else {}
    with _request(url, headers) as answer:
        mode = "ab" if answer.status == 206 else "wb"
        try:
            with part.open(mode) as stream:
                while not stop.is_set() and (block := answer.read1(BLOCK_BYTES)):
                    stream.write(block)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(f"{part}: the transfer was interrupted ({error}).", topic="network") from error
    if part.stat().st_size != size:
        raise DataError(f"{part}: has {part.stat().st_size} of {size} bytes.", topic="network")


def _request(url: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> http.client.HTTPResponse:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"{url}: expected an http or https address.", topic="network")
    request = urllib.request.Request(url, body, headers or {})  # noqa: S310 (checked above)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310 (checked above)
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(f"{url}: the server returned {error.code} {error.reason}.", topic="network") from error
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: unreachable ({error}).", "Check the network connection.", topic="network") from error


def _by_client(rows: Sequence[ManifestRow], folder: Path, client: str) -> dict[str, str]:
    """Let gdc-client download into `folder/.gdc/{id}/{filename}`, then verify and move."""
    work = folder / ".gdc"
    work.mkdir(exist_ok=True)
    write_manifest(work / "manifest.tsv", rows)
    try:
        subprocess.run(client_call(work / "manifest.tsv", work, client), check=False)
    except OSError as error:
        raise DataError(
            f"{client}: does not run ({error.strerror}).", "Install gdc-client, or leave it out."
        ) from error
    failed = {}
    for row in rows:
        path = work / row.id / row.filename
        if not path.is_file():
            failed[row.filename] = "gdc-client did not fetch it"
        elif (found := _md5(path)) != row.md5:
            failed[row.filename] = f"MD5 is {found}, expected {row.md5}"
            path.unlink()
        else:
            path.replace(folder / row.filename)
            shutil.rmtree(path.parent, ignore_errors=True)
    return failed


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
