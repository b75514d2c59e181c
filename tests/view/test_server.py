"""Test the viewer's server: answers, refusals and load."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from made_up_viewer import (
    DAMAGED,
    EXPLAINED,
    PLAIN,
    SIDES,
    SIZE,
    Client,
    Files,
    explanation,
    make_files,
    predictions,
    running,
    until,
)
from PIL import Image
from slide_factory import break_tile, tissue_picture, write_slide

from cfusion.cli.cmd_view import view
from cfusion.errors import ConfigError, DataError
from cfusion.explanation.result import read_explanation, write_explanation
from cfusion.survival.groups import kaplan_meier
from cfusion.view.api import Viewer
from cfusion.view.explanations import Explanations
from cfusion.view.patient_curve import CohortCurves, patient_panel
from cfusion.view.served_slides import MAX_OPEN, SlideFolder
from cfusion.view.server import listen
from preprocess import deepzoom
from preprocess.overview import read_overview
from preprocess.slides import Overview, Slide, open_slide

ASSETS = Path(__file__).parents[2] / "cfusion" / "view" / "assets"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("viewer"))


@pytest.fixture(scope="module")
def client(files: Files):
    with running(files.viewer()) as client:
        yield client


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)))


# --- answers ---


def test_the_list_marks_damaged_and_explained_slides(client: Client):
    until(lambda: not client.json("/api/state")["probing"])
    slides = {slide["id"]: slide for slide in client.json("/api/state")["slides"]}
    assert list(slides) == [EXPLAINED, PLAIN, DAMAGED]
    assert slides[EXPLAINED]["explained"]
    assert not slides[PLAIN]["explained"]
    assert slides[PLAIN]["trouble"] is None
    assert re.search("format|damaged", slides[DAMAGED]["trouble"])
    assert client.json(f"/api/slides/{slides[DAMAGED]['key']}", 422)["error"] in slides[DAMAGED]["trouble"]


def test_explained_slides_come_first(files: Files, tmp_path: Path):
    write_explanation(explanation(PLAIN), tmp_path / "explanation.zarr")
    with running(Viewer(SlideFolder(files.slides), Explanations(tmp_path))) as client:
        assert list(client.keys()) == [PLAIN, EXPLAINED, DAMAGED]


def test_no_message_contains_the_path_of_the_folder(client: Client, files: Files):
    until(lambda: not client.json("/api/state")["probing"])
    answers = client.ask("/api/state")[2] + client.ask(f"/api/slides/{client.keys()[DAMAGED]}")[2]
    assert f"{DAMAGED}.svs" in answers.decode()
    assert str(files.slides.parent) not in answers.decode()


def test_a_slide_is_described(client: Client):
    slide = client.json(f"/api/slides/{client.keys()[EXPLAINED]}")
    assert (slide["width"], slide["height"], slide["mpp"]) == (*SIZE, 0.5)
    explanation = slide["explanation"]
    assert list(explanation["methods"]) == ["occlusion", "gradient", "attention"]
    assert list(explanation["magnifications"]["x20"]["verdicts"]) == ["gradient", "attention"]
    scale = explanation["methods"]["occlusion"]["scale"]
    assert (scale["high"], scale["low"], scale["most"]) == pytest.approx((0.2, -0.2, 0.2))
    assert explanation["models"] == 3
    assert "fold ensemble of 3: risk \u22122.200" in slide["patient"]["words"]


def test_scores_come_as_they_were_written(client: Client, files: Files):
    key, written = client.keys()[EXPLAINED], read_explanation(files.explanations / EXPLAINED)
    for name, level in written.levels.items():
        address = f"/api/slides/{key}/scores/{name}"
        coords = np.frombuffer(client.ask(f"{address}/coords")[2], "<i4").reshape(-1, 2)
        np.testing.assert_array_equal(coords, level.coords)
        np.testing.assert_array_equal(np.frombuffer(client.ask(f"{address}/gradient")[2], "<f4"), level.mean[1])
    clear = np.frombuffer(client.ask(f"/api/slides/{key}/scores/x20/attention?stands-out")[2], "u1")
    np.testing.assert_array_equal(clear, written.stands_out("x20", "attention"))
    assert 0 < clear.sum() < len(clear)
    assert client.ask(f"/api/slides/{key}/scores/x40/gradient")[0] == 404
    assert client.ask(f"/api/slides/{key}/scores/x20/magic")[0] == 404
    assert client.ask(f"/api/slides/{client.keys()[PLAIN]}/scores/x20/coords")[0] == 404


def test_a_click_finds_the_tile_and_its_parents(client: Client):
    key = client.keys()[EXPLAINED]
    answer = client.json(f"/api/slides/{key}/lineage?x=900&y=700")
    assert [(t["name"], t["x_px"], t["y_px"]) for t in answer["tiles"]] == [
        ("x20", 768, 512), ("x10", 512, 512), ("x5", 0, 0),
    ]  # fmt: skip
    assert answer["tiles"][0]["scores"]["gradient"] == {"mean": pytest.approx(0.1), "sd": pytest.approx(0.01)}
    assert "occlusion" not in answer["tiles"][0]["scores"]
    assert "occlusion" in answer["tiles"][2]["scores"]
    glass = client.json(f"/api/slides/{key}/lineage?x=3&y=3")["tiles"][0]
    assert (glass["tile"], glass["scores"], glass["x_px"]) == (None, {}, 0)
    assert client.ask(f"/api/slides/{key}/lineage?x=2048&y=3")[0] == 404


def test_without_scores_a_click_finds_the_grid_of_the_slides_resolution(client: Client):
    tiles = client.json(f"/api/slides/{client.keys()[PLAIN]}/lineage?x=900&y=700")["tiles"]
    assert {t["name"]: t["side_px"] for t in tiles} == SIDES
    assert tiles[0]["tile"] is None


def test_magnifications_without_scores_show_their_patches_too(files: Files, tmp_path: Path):
    full = explanation(EXPLAINED)
    part = dataclasses.replace(full, levels={"x20": full.levels["x20"]})
    write_explanation(part, tmp_path / "explanation.zarr")
    slide = files.slides / f"{EXPLAINED}.svs"
    with running(Viewer(SlideFolder(slide), Explanations(tmp_path))) as client:
        tiles = client.json(f"/api/slides/{client.keys()[EXPLAINED]}/lineage?x=900&y=700")["tiles"]
    assert [(t["name"], t["x_px"], t["y_px"], bool(t["scores"])) for t in tiles] == [
        ("x20", 768, 512, True), ("x10", 512, 512, False), ("x5", 0, 0, False),
    ]  # fmt: skip


def test_names_are_never_parsed_as_markup(files: Files, tmp_path: Path):
    name = "<script>alert(1)<b>\"'&"
    table = predictions().replace({"case_id": {"PT-0001": name}, "cohort": {"made_up": name}})
    (tmp_path / "run").mkdir()
    table.to_csv(tmp_path / "run" / "predictions.csv", index=False)
    figure = patient_panel(CohortCurves(tmp_path / "run"), name, None)["figure"]
    tree = ElementTree.fromstring(figure)
    assert name in tree.get("aria-label")
    assert {node.tag for node in tree.iter()} <= {"svg", "title", "desc", "path", "text"}


def test_a_patch_is_the_area_average_of_its_square(client: Client, tmp_path: Path):
    key = client.keys()[PLAIN]
    status, headers, content = client.ask(f"/slides/{key}/patch.jpg?x=512&y=512&side=512")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    full = tissue_picture(*SIZE, seed=1)[512:1024, 512:1024].astype(float)
    expected = full.reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
    assert np.abs(picture(content) - expected).mean() < 4  # two JPEG compressions apart
    assert client.ask(f"/slides/{key}/patch.jpg?x=512&y=512&side=20000")[0] == 422


def test_the_patient_lies_within_the_cohorts_kaplan_meier_curve(client: Client, files: Files):
    patient = client.json(f"/api/slides/{client.keys()[EXPLAINED]}")["patient"]
    curves = CohortCurves(files.run)
    table = curves.cases
    observed = kaplan_meier(table["survival_months"].to_numpy(), table["event"].to_numpy())
    assert curves.observed(None)[2] == observed
    assert patient["case"] == "PT-0001"
    assert f"at {table.loc['PT-0001', 'survival_months']:.1f} months" in patient["words"]
    assert "above 0% of the patients of its fold" in patient["words"]
    assert curves.percentile("PT-0039") == 100
    assert "style=" not in patient["figure"]
    for css in ("line cohort", "line patient", "line ensemble", "band cohort"):
        assert css in patient["figure"]
    assert curves.case_of("nobody") is None


def test_without_its_table_a_run_knows_patients_by_the_names_of_slides(tmp_path: Path, files: Files):
    run = shutil.copytree(files.run, tmp_path / "run")
    (run / "config.yaml").unlink()
    curves = CohortCurves(run)
    assert curves.case_of("PT-0007") == "PT-0007"
    assert curves.case_of("PT-0007-a") == "PT-0007"
    assert curves.case_of("PT-00070") is None
    assert curves.case_of(EXPLAINED) == "PT-0001"
    slide = shutil.copy(files.slides / f"{EXPLAINED}.svs", tmp_path / "stranger.svs")
    with running(Viewer(SlideFolder(slide), Explanations(None), curves)) as client:
        patient = client.json(f"/api/slides/{client.keys()['stranger']}")["patient"]
    assert patient == {"case": None, "words": "The run has no patient for the slide stranger."}


# --- refusals ---


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd", "/assets/../api.py", "/assets/..%2fapi.py", "/assets/%2e%2e/api.py",
        "/assets//etc/passwd", "/slides/../../etc/passwd/still.jpg", "/slides/%2fetc%2fpasswd/still.jpg",
        "/slides/PT-0001-a/still.jpg", "/slides/PT-0001-a.svs", "/assets/", "/assets/..\\api.py", "/slides",
    ],
)  # fmt: skip
def test_no_address_leads_to_a_file(client: Client, path: str):
    status, _, content = client.ask(path)
    assert status == 404
    assert set(json.loads(content)) == {"error", "remedy"}


def test_a_link_out_of_the_folder_is_refused(files: Files, tmp_path: Path):
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "inside.svs").symlink_to(files.slides / f"{PLAIN}.svs")
    shutil.copy(files.slides / f"{PLAIN}.svs", folder / "real.svs")
    (folder / "near.svs").symlink_to(folder / "real.svs")
    with running(Viewer(SlideFolder(folder), Explanations(None))) as client:
        until(lambda: not client.json("/api/state")["probing"])
        slides = {slide["id"]: slide for slide in client.json("/api/state")["slides"]}
        assert "leads out of the served folder" in slides["inside"]["trouble"]
        assert client.ask(f"/slides/{slides['inside']['key']}/still.jpg")[0] == 422
        assert client.ask(f"/slides/{slides['near']['key']}/still.jpg")[0] == 200


def test_a_link_that_is_named_is_followed(files: Files, tmp_path: Path):
    (tmp_path / "named.svs").symlink_to(files.slides / f"{PLAIN}.svs")
    (tmp_path / "folder").symlink_to(files.slides)
    for given, name in ((tmp_path / "named.svs", "named"), (tmp_path / "folder", PLAIN)):
        with running(Viewer(SlideFolder(given), Explanations(None))) as client:
            assert client.ask(f"/slides/{client.keys()[name]}/still.jpg")[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("lineage?x=abc&y=1", 400), ("lineage?y=1", 400), ("lineage?x=nan&y=1", 400), ("lineage?x=inf&y=1", 400),
        ("lineage?x=1e999&y=1", 400), ("scores/x20", 404), ("scores/x20/coords/more", 404),
    ],
)  # fmt: skip
def test_malformed_requests_have_their_own_status(client: Client, path: str, status: int):
    assert client.json(f"/api/slides/{client.keys()[EXPLAINED]}/{path}", status)["error"]


@pytest.mark.parametrize(
    "tile", ["99/0_0", "11/99_0", "0/0_1", "-1/0_0", "11/0", "x/0_0", "11/0_0_0", "9" * 30 + "/0_0"]
)
def test_a_tile_that_does_not_exist_is_refused(client: Client, tile: str):
    assert client.json(f"/slides/{client.keys()[EXPLAINED]}/tiles/{tile}.jpg", 404)["error"]


def test_non_http_bytes_are_refused_and_the_server_continues(client: Client):
    for words in (b"\x16\x03\x01\x00\xff" * 20, b"GET / HTTP/9.9\r\n\r\n", b"GET  /\r\nnonsense\r\n\r\n", b"\r\n" * 50):
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as raw:
            raw.sendall(words)
            raw.shutdown(socket.SHUT_WR)
            answer = raw.recv(1000)
            assert not answer or re.match(rb"HTTP/1.1 4\d\d ", answer)
    assert client.ask("/", "POST")[0] == 405
    assert client.ask("/")[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:9000", 200), ("[::1]:80", 200), ("LOCALHOST", 200), ("evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 403), ("", 403), ("[::1", 403), ("a:b:c", 403),
    ],
)  # fmt: skip
def test_only_requests_to_this_machines_names_are_answered(client: Client, host: str, status: int):
    found, headers, _ = client.ask("/api/state", Host=host)
    assert found == status
    assert "default-src 'self'" in headers["content-security-policy"]


def test_nothing_is_loaded_from_elsewhere(client: Client):
    for path in ("/", "/api/state", "/assets/app.js", "/nothing"):
        headers = client.ask(path)[1]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; style-src 'self' 'sha256-")
        assert "http" not in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    for asset in ASSETS.iterdir():
        addresses = re.findall(r"https?://[^\s\"'`)]+", asset.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, asset


def test_every_asset_is_served_with_its_type(client: Client):
    for asset in ASSETS.iterdir():
        path = "/" if asset.name == "index.html" else f"/assets/{asset.name}"
        status, headers, content = client.ask(path)
        assert (status, content) == (200, asset.read_bytes())
        assert headers["content-type"].split("/")[0] in {"text", "image"}


# --- load and failures ---


def test_two_hundred_tiles_at_once(files: Files, tmp_path: Path):
    folder = tmp_path / "slides"
    folder.mkdir()
    for i in range(MAX_OPEN + 4):
        shutil.copy(files.slides / f"{(EXPLAINED, PLAIN)[i % 2]}.svs", folder / f"s{i:02d}.svs")
    viewer = Viewer(SlideFolder(folder), Explanations(None))
    with running(viewer) as client:
        keys = list(client.keys().values())
        levels = client.json(f"/api/slides/{keys[0]}")["levels"]
        wanted = [(keys[i % len(keys)], levels - 1, i % 8, i // 8 % 6) for i in range(200)]
        barrier, answers = threading.Barrier(200), {}

        def ask(key: str, level: int, column: int, row: int) -> None:
            barrier.wait()
            answers[key, level, column, row, threading.get_ident()] = client.ask(
                f"/slides/{key}/tiles/{level}/{column}_{row}.jpg"
            )

        threads = [threading.Thread(target=ask, args=tile) for tile in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 200
        assert {status for status, _, _ in answers.values()} == {200}
        assert len({picture(content).shape for *_, content in answers.values()}) >= 4  # corners, edges, inner tiles
        assert len(viewer.slides._open) <= MAX_OPEN
        assert client.ask("/")[0] == 200


def test_a_slide_that_vanishes_while_viewed(files: Files, tmp_path: Path):
    path = tmp_path / "slides" / "a.svs"
    path.parent.mkdir()
    shutil.copy(files.slides / f"{PLAIN}.svs", path)
    shutil.copy(path, path.with_name("b.svs"))
    with running(Viewer(SlideFolder(path.parent), Explanations(None))) as client:
        key = client.keys()["a"]
        before = client.json(f"/api/slides/{key}")["version"]
        assert client.ask(f"/slides/{key}/tiles/8/0_0.jpg")[0] == 200
        path.unlink()
        for address in (f"/slides/{key}/tiles/8/0_0.jpg", f"/slides/{key}/tiles/11/0_0.jpg", f"/api/slides/{key}"):
            answer = client.json(address, 410)
            assert "no longer exists" in answer["error"]
            assert answer["remedy"]
        slides = {slide["id"]: slide["trouble"] for slide in client.json("/api/state")["slides"]}
        assert "no longer exists" in slides["a"]
        assert slides["b"] is None
        write_slide(path, tissue_picture(1024, 512, seed=4), power=20)
        assert client.json(f"/api/slides/{key}")["width"] == 1024
        assert client.json(f"/api/slides/{key}")["version"] != before


def test_an_internal_error_fails_only_one_request(files: Files, capfd: pytest.CaptureFixture[str]):
    class Broken:
        name = "broken"

        def case_of(self, slide_id: str) -> str:
            raise ZeroDivisionError

    with running(files.viewer(curves=Broken())) as client:
        key = client.keys()[PLAIN]
        assert "see the error in its terminal" in client.json(f"/api/slides/{key}", 500)["error"]
        assert client.ask(f"/slides/{key}/still.jpg")[0] == 200
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.slow
def test_a_slide_without_a_pyramid_is_read_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_slide(tmp_path / "flat.svs", tissue_picture(4096, 3072))
    monkeypatch.setattr(deepzoom, "QUICK_PX", 1e6)
    monkeypatch.setattr(deepzoom, "DIRECT_PX", 600)
    held = threading.Event()

    def slowly(slide: Slide, um_px: float) -> Overview:
        assert held.wait(60)
        return read_overview(slide, um_px)

    monkeypatch.setattr(deepzoom, "read_overview", slowly)
    with running(Viewer(SlideFolder(tmp_path), Explanations(None))) as client:
        key = client.keys()["flat"]
        try:
            assert client.json(f"/api/slides/{key}")["ready"] is False
            assert "no pyramid" in client.json(f"/slides/{key}/tiles/6/0_0.jpg", 503)["error"]
            assert client.ask(f"/slides/{key}/still.jpg")[0] == 503
            assert client.ask(f"/slides/{key}/tiles/12/3_3.jpg")[0] == 200
        finally:
            held.set()
        until(lambda: client.json(f"/api/slides/{key}")["ready"])
        assert client.ask(f"/slides/{key}/tiles/6/0_0.jpg")[0] == 200
        assert client.ask(f"/slides/{key}/still.jpg")[0] == 200


def test_a_damaged_part_does_not_affect_the_rest(files: Files, tmp_path: Path):
    path = tmp_path / "a.svs"
    shutil.copy(files.slides / f"{PLAIN}.svs", path)
    break_tile(path, 0)
    with running(Viewer(SlideFolder(path), Explanations(None))) as client:
        key = client.keys()["a"]
        assert "cannot be read" in client.json(f"/slides/{key}/tiles/11/0_0.jpg", 422)["error"]
        assert client.ask(f"/slides/{key}/tiles/11/4_4.jpg")[0] == 200
        assert client.ask(f"/slides/{key}/still.jpg?size=large")[0] == 200


def test_a_slide_without_resolution_is_shown_without_um(tmp_path: Path):
    write_slide(tmp_path / "a.svs", tissue_picture(1024, 512), mpp=None)
    with running(Viewer(SlideFolder(tmp_path), Explanations(None))) as client:
        key = client.keys()["a"]
        assert client.json(f"/api/slides/{key}")["mpp"] is None
        answer = client.json(f"/api/slides/{key}/lineage?x=5&y=5")
        assert answer["tiles"] == []
        assert "--default-mpp" in answer["trouble"]
    with running(Viewer(SlideFolder(tmp_path, default_mpp=0.5), Explanations(None))) as client:
        assert client.json(f"/api/slides/{key}")["mpp"] == 0.5
        assert len(client.json(f"/api/slides/{key}/lineage?x=5&y=5")["tiles"]) == 3


# --- bad input ---


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"slide_digest": "0" * 64}, "digest"),
        ({"slide_size_px": [10_000, 10_000]}, "10000 × 10000 px"),
        ({"slide_size_px": None, "mpp": 0.25}, "0.25 µm/px"),
    ],
)
def test_an_explanation_of_another_slide_is_refused(files: Files, tmp_path: Path, attrs: dict, words: str):
    write_explanation(explanation(EXPLAINED, **attrs), tmp_path / "explanation.zarr")
    slide = files.slides / f"{EXPLAINED}.svs"
    if "slide_digest" in attrs and not _digest(slide):
        pytest.skip("OpenSlide gives this slide no digest")
    with running(Viewer(SlideFolder(slide), Explanations(tmp_path))) as client:
        key = client.keys()[EXPLAINED]
        answer = client.json(f"/api/slides/{key}")
        assert answer["explanation"] is None
        assert words in answer["explanation_trouble"]
        assert "another slide" in client.json(f"/api/slides/{key}/scores/x20/coords", 422)["error"]


def _digest(path: Path) -> str:
    slide = open_slide(path)
    with contextlib.closing(slide):
        return slide.quickhash


def test_folders_without_content_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="contains no slides"):
        SlideFolder(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        SlideFolder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="contains no explanation"):
        Explanations(tmp_path)
    with pytest.raises(DataError, match=r"predictions\.csv"):
        CohortCurves(tmp_path)


def test_an_explanation_that_cannot_be_read_does_not_hide_the_others(files: Files, tmp_path: Path):
    (tmp_path / "broken" / "explanation.zarr").mkdir(parents=True)
    write_explanation(explanation("good"), tmp_path / "good" / "explanation.zarr")
    assert list(Explanations(tmp_path).paths) == ["good"]


def test_a_port_in_use_is_named():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port}: is in use.*any free port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no such host", "203.0.113.7", ""])
def test_a_host_that_cannot_be_bound_is_refused(host: str):
    with pytest.raises(ConfigError, match="--host"):
        listen(host, 0).close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_when_asked_to(files: Files, number: signal.Signals, tmp_path: Path):
    command = [sys.executable, "-m", "cfusion", "view", str(files.slides)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
        assert line.startswith("3 slides at ")
        assert Client(port).json("/api/state")["deep_zoom"] is False
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0
    assert out == "stopped\n"
    assert "Traceback" not in err
    assert "cfusion view --fetch" in err


def test_the_command_refuses_bad_input(tmp_path: Path):
    with pytest.raises(ConfigError, match="no slides were named"):
        view()
    with pytest.raises(DataError, match="contains no slides"):
        view(tmp_path)
