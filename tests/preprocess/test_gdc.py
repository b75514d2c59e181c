"""Slides from the GDC, against a small server of the tests' own."""

import hashlib
import http.server
import json
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from cfusion.console import Progress
from cfusion.errors import ConfigError, DataError
from preprocess import gdc
from preprocess.gdc import ManifestRow, client_call, download, find_rows, query_cohort, write_manifest

CONTENT = {f"id-{i}": bytes([i]) * (200_000 + i) for i in range(3)}


def rows() -> list[ManifestRow]:
    return [
        ManifestRow(key, f"slide-{key}.svs", hashlib.md5(data).hexdigest(), len(data)) for key, data in CONTENT.items()
    ]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        listed = "id\tfilename\tmd5\tsize\tstate\n" + "".join(
            f"{r.id}\t{r.filename}\t{r.md5}\t{r.size}\treleased\n" for r in rows()
        )
        self.answer(200, listed.encode())

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        key = self.path.removeprefix("/data/")
        if key not in CONTENT or key in server.broken:
            self.answer(404, b"")
            return
        if key in server.garbled:
            self.wfile.write(b"what is this\r\n\r\n")
            return
        data = server.other.pop(key, CONTENT[key])
        if key in server.chunked:
            server.chunked.remove(key)
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ffff\r\n" + data[:5000])
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        cut = server.cut.pop(key, None)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:cut])

    def answer(self, code: int, body: bytes):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.cut, server.other, server.broken, server.query = [], {}, {}, set(), None
    server.garbled, server.chunked = set(), set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_slides_arrive_and_are_not_asked_for_again(server, tmp_path: Path):
    assert download(rows(), tmp_path, api=address(server)) == {}
    for row in rows():
        assert (tmp_path / row.filename).read_bytes() == CONTENT[row.id]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(r.filename for r in rows())
    asked = len(server.asked)
    assert download(rows(), tmp_path, api=address(server)) == {}
    assert len(server.asked) == asked


def test_a_transfer_goes_on_where_it_broke_off(server, tmp_path: Path):
    server.cut["id-1"] = 70_000
    assert download(rows(), tmp_path, api=address(server)) == {}
    ranges = [r for path, r in server.asked if path == "/data/id-1"]
    assert ranges == [None, "bytes=70000-"]
    assert (tmp_path / "slide-id-1.svs").read_bytes() == CONTENT["id-1"]


def test_a_part_of_an_earlier_call_is_continued(server, tmp_path: Path):
    (tmp_path / "slide-id-2.svs.part").write_bytes(CONTENT["id-2"][:1234])
    assert download(rows()[2:], tmp_path, api=address(server)) == {}
    assert server.asked == [("/data/id-2", "bytes=1234-")]


def test_a_wrong_md5_is_fetched_again_and_never_takes_the_name(server, tmp_path: Path):
    server.other["id-0"] = b"x" * len(CONTENT["id-0"])
    assert download(rows()[:1], tmp_path, api=address(server)) == {}
    wrong = [ManifestRow("id-0", "a.svs", "0" * 32, len(CONTENT["id-0"]))]
    failed = download(wrong, tmp_path, api=address(server))
    assert failed["a.svs"].startswith("MD5 is ")
    assert not (tmp_path / "a.svs").exists()


def test_a_missing_file_is_reported_and_the_rest_arrives(server, tmp_path: Path):
    server.broken.add("id-1")
    failed = download(rows(), tmp_path, api=address(server))
    assert list(failed) == ["slide-id-1.svs"]
    assert "the server returned 404" in failed["slide-id-1.svs"]
    assert (tmp_path / "slide-id-2.svs").exists()


def test_invalid_or_truncated_answers_are_reported_or_retried(server, tmp_path: Path):
    server.garbled.add("id-1")
    server.chunked.add("id-2")
    failed = download(rows(), tmp_path, api=address(server))
    assert list(failed) == ["slide-id-1.svs"]
    assert "unreachable" in failed["slide-id-1.svs"]
    assert (tmp_path / "slide-id-2.svs").read_bytes() == CONTENT["id-2"]


def test_an_interruption_ends_the_transfers_that_are_under_way(server, tmp_path: Path, monkeypatch):
    class Interrupted(Progress):
        def advance(self, count: int = 1, note: str = "") -> None:
            raise KeyboardInterrupt

    under_way, stopped = {"id-1": threading.Event(), "id-2": threading.Event()}, []

    def transfer(url, part, size, stop):
        name = url.rpartition("/")[2]
        if name == "id-0":
            assert all(begun.wait(30) for begun in under_way.values())
        else:
            under_way[name].set()
            stopped.append(stop.wait(30))
        raise DataError("it broke off")

    monkeypatch.setattr(gdc, "progress", lambda *_: nullcontext(Interrupted("", 0)))
    monkeypatch.setattr(gdc, "_transfer", transfer)
    with pytest.raises(KeyboardInterrupt):
        download(rows(), tmp_path, api=address(server), threads=3)
    assert stopped == [True, True]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: cannot create the folder"):
        download(rows(), tmp_path / "file")


def test_a_cohort_becomes_a_query(server):
    assert find_rows("tcga_gbmlgg", address(server)) == rows()
    filters = {term["content"]["field"]: term["content"]["value"] for term in server.query["filters"]["content"]}
    assert filters["cases.project.project_id"] == ["TCGA-GBM", "TCGA-LGG"]
    assert filters["experimental_strategy"] == ["Diagnostic Slide"]
    assert server.query["return_type"] == "manifest"


def test_a_sample_sheet_is_completed_by_the_gdc(server, tmp_path: Path):
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text("id\tfilename\tCase ID\n" + "".join(f"{r.id}\t{r.filename}\tc\n" for r in rows()))
    assert find_rows(str(sheet), address(server)) == rows()
    assert server.query["filters"]["content"]["value"] == ["id-0", "id-1", "id-2"]
    sheet.write_text("id\tfilename\nid-9\tz.svs\n")
    with pytest.raises(DataError, match=r"sheet.tsv: the GDC does not know id-9 .1 of 1 files"):
        find_rows(str(sheet), address(server))


def test_no_network_is_one_line(tmp_path: Path):
    failed = download(rows()[:1], tmp_path, api="http://127.0.0.1:1")
    assert "unreachable" in failed["slide-id-0.svs"]
    with pytest.raises(DataError, match="unreachable"):
        query_cohort("blca", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="expected an http or https address"):
        query_cohort("blca", "file:///etc")
    with pytest.raises(ConfigError, match="expected a manifest file, or the name"):
        find_rows("../etc")


def test_gdc_client_does_the_transfers_where_it_is_named(tmp_path: Path):
    client = tmp_path / "gdc-client"
    client.write_text(
        "#!/bin/sh\n"
        'while read id name rest; do [ "$id" = id ] && continue; mkdir -p "$5/$id"; '
        'head -c 200000 /dev/zero > "$5/$id/$name"; done < "$3"\n'
    )
    client.chmod(0o755)
    out = tmp_path / "slides"
    failed = download(rows()[:2], out, client=str(client))
    # id-0 is 200,000 zeros, as the client makes them; id-1 is not.
    assert list(failed) == ["slide-id-1.svs"]
    assert (out / "slide-id-0.svs").read_bytes() == CONTENT["id-0"]
    with pytest.raises(DataError, match="does not run"):
        download(rows()[1:], out, client=str(tmp_path / "none"))
    assert client_call(Path("m.tsv"), Path("s")) == ["gdc-client", "download", "--manifest", "m.tsv", "--dir", "s"]


@pytest.mark.parametrize(
    ("cohort", "files"), [("blca", 457), ("coad", 459), ("gbmlgg", 1704), ("luad", 541), ("ucec", 566)]
)
def test_the_published_manifests_are_read_and_written_alike(tcga: Path, tmp_path: Path, cohort: str, files: int):
    path = tcga / "manifests" / f"tcga_{cohort}.tsv"
    found = find_rows(str(path))
    assert len(found) == len({r.filename for r in found}) == files
    write_manifest(tmp_path / "m.tsv", found)
    assert set((tmp_path / "m.tsv").read_text().splitlines()) == set(path.read_text().splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\n1\t2\n", "has no column id"),
        ("id\tfilename\tmd5\tsize\tstate\n", "lists no file"),
        (
            f"id\tfilename\tmd5\tsize\nx\ta.svs\t{'0' * 32}\t5\ny\ta.svs\t{'1' * 32}\t5\n",
            "another file is also named a.svs",
        ),
        ("id\tfilename\tmd5\tsize\nx\ta.svs\tzz\t5\n", "line 2: md5 'zz' and size '5' are not valid for a file"),
        (f"id\tfilename\tmd5\tsize\nx\t../a.svs\t{'0' * 32}\t5\n", "not a valid name"),
    ],
)
def test_an_invalid_manifest_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        find_rows(str(tmp_path / "m.tsv"))
