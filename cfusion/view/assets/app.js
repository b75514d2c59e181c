// The page: chooses the slide and its scores, and handles keys, clicks and errors.

import { Controls } from "./controls.js";
import { Overlay } from "./heatmap.js";
import { make, matching, showBanner, showList, showPatient, showTile } from "./panels.js";
import { DeepStage, StillStage } from "./stage.js";

const byId = (id) => document.getElementById(id);
const overlay = new Overlay(byId("overlay"));
const page = { state: null, slide: null, asked: null, stage: null, controls: null, checking: false };
const CLICK = "Click the slide, or press Enter for the tile in the middle.";

async function ask(address, as = "json") {
  const answer = await fetch(address).catch(() => null);
  if (!answer) throw { message: "The viewer does not answer.", remedy: "Restart it.", status: 0 };
  if (!answer.ok) {
    const { error, remedy } = await answer.json().catch(() => ({ error: `HTTP ${answer.status}`, remedy: "" }));
    throw { message: error, remedy, status: answer.status };
  }
  return as === "json" ? answer.json() : answer.arrayBuffer();
}

const showError = (error) => (error.message ? showBanner(error.message, error.remedy) : showBanner("The page failed.", String(error)));
const redraw = () => {
  overlay.draw(page.stage?.frame() ?? null);
  showScale();
};

// --- the list -------------------------------------------------------------------------------------------------------

const listed = () => matching(page.state.slides, byId("search").value);

function refreshList() {
  showList(listed(), page.state.slides.length, page.slide?.key ?? page.asked, (key) => (location.hash = key));
}

async function refreshState() {
  const before = JSON.stringify(page.state?.slides);
  page.state = await ask("/api/state");
  if (JSON.stringify(page.state.slides) !== before) refreshList();
  if (page.state.probing) setTimeout(() => refreshState().catch(showError), 2000);
}

function step(by) {
  const slides = listed();
  const at = slides.findIndex((slide) => slide.key === page.asked);
  const next = slides[Math.max(0, Math.min(slides.length - 1, at + by))];
  if (next) location.hash = next.key;
}

// --- one slide ------------------------------------------------------------------------------------------------------

async function openSlide(key) {
  page.asked = key;
  page.slide = null;
  page.stage.close();
  byId("stage").dataset.state = "opening";
  delete byId("stage").dataset.shown;
  toggleSlides(false);
  const name = page.state.slides.find((slide) => slide.key === key)?.id ?? "CrossFusion";
  byId("slide-name").textContent = byId("slide-name").title = name; // a long name is cut at the end
  byId("slide-facts").textContent = "";
  letTileGo();
  showBanner("");
  showNote("");
  refreshList();
  try {
    const slide = await ask(`/api/slides/${encodeURIComponent(key)}`);
    if (page.asked !== key) return;
    page.slide = slide;
    document.title = `${slide.id} · CrossFusion`;
    byId("slide-facts").textContent = facts(slide);
    showPatient(slide.patient, page.state.run);
    await Promise.all([page.controls.setSlide(slide), openStage(slide)]);
  } catch (error) {
    if (page.asked !== key) return;
    byId("stage").dataset.state = "failed";
    showPatient(null, page.state.run);
    page.controls.setSlide(null);
    showError(error);
    await refreshState();
  }
}

async function openStage(slide, ready = slide.ready) {
  if (!ready) showNote("This slide has no pyramid, so it must be read completely once. This can take minutes.");
  while (!ready) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    if (page.slide !== slide) return;
    ({ ready } = await ask(`/api/slides/${slide.key}`));
  }
  if (page.slide !== slide) return;
  showNote("");
  page.stage.open(slide);
}

function showNote(words) {
  byId("note").textContent = words;
}

function facts({ width, height, mpp, vendor }) {
  const size = mpp ? ` (${((width * mpp) / 1000).toFixed(1)} × ${((height * mpp) / 1000).toFixed(1)} mm)` : "";
  const parts = [
    `${width.toLocaleString("en")} × ${height.toLocaleString("en")} px${size}`,
    mpp ? `${Number(mpp.toPrecision(4))} µm/px` : "µm/px unknown",
    vendor,
  ];
  return parts.filter(Boolean).join(", ");
}

// A tile failed to load: request the slide itself, whose answer gives the cause.
async function tileFailed() {
  if (!page.slide || page.checking) return;
  page.checking = true;
  try {
    const { ready } = await ask(`/api/slides/${page.slide.key}`);
    if (!ready) await openStage(page.slide, ready);
    else showBanner("A part of the slide cannot be read.", "It stays blank; the file may be damaged.");
  } catch (error) {
    byId("stage").dataset.state = "failed";
    showError(error);
    await refreshState().catch(showError);
  } finally {
    page.checking = false;
  }
}

async function readTile(left, top) {
  const frame = page.stage.frame();
  if (!frame || !page.slide) return;
  const { key } = page.slide;
  const [x, y] = [(left - frame.x) / frame.scale, (top - frame.y) / frame.scale];
  try {
    const answer = await ask(`/api/slides/${key}/lineage?x=${x.toFixed(1)}&y=${y.toFixed(1)}`);
    if (page.slide?.key !== key) return;
    overlay.boxes = answer.tiles;
    showTile(answer, page.slide, page.slide.explanation);
    redraw();
  } catch (error) {
    if (error.status !== 404) showError(error);
    else letTileGo(error.message);
  }
}

function letTileGo(words = CLICK) {
  overlay.boxes = [];
  byId("tile-body").replaceChildren(make("p", { className: "soft", textContent: words }));
  redraw();
}

function showScale() {
  const frame = page.stage?.frame();
  const mpp = page.slide?.mpp;
  byId("scale").hidden = !frame || !mpp;
  if (!frame || !mpp) return;
  const perPx = mpp / frame.scale;
  const power = 10 ** Math.floor(Math.log10(perPx * 120));
  const um = [5, 2, 1].map((n) => n * power).find((n) => n <= perPx * 120);
  byId("scale-bar").style.width = `${um / perPx}px`;
  byId("scale-words").textContent = um >= 1000 ? `${um / 1000} mm` : `${Number(um.toPrecision(1))} µm`;
}

// --- keys -----------------------------------------------------------------------------------------------------------

const MOVES = { ArrowLeft: [-0.2, 0], ArrowRight: [0.2, 0], ArrowUp: [0, -0.2], ArrowDown: [0, 0.2] };
const KEYS = {
  "+": () => page.stage.zoomBy(1.5),
  "=": () => page.stage.zoomBy(1.5),
  "-": () => page.stage.zoomBy(1 / 1.5),
  0: () => page.stage.home(),
  h: () => page.controls.toggle(),
  m: () => page.controls.nextMagnification(),
  s: () => page.controls.nextMethod(),
  c: () => page.controls.nextPalette(),
  "[": () => page.controls.changeOpacity(-10),
  "]": () => page.controls.changeOpacity(10),
  "/": openSearch,
  n: () => step(1),
  p: () => step(-1),
  "?": () => byId("help").showModal(),
  Escape: () => letTileGo(),
};

function openSearch() {
  toggleSlides(true);
  byId("search").focus();
  byId("search").select();
}

function toggleSlides(open) {
  byId("slides").classList.toggle("open", open);
  byId("slides-toggle").setAttribute("aria-expanded", String(byId("slides").classList.contains("open")));
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const { target, key } = event;
  if (target.id === "search") {
    if (key === "Escape" || key === "Enter") {
      if (key === "Enter" && listed()[0]) location.hash = listed()[0].key;
      byId("stage").focus();
      event.preventDefault();
    }
    return;
  }
  const control = target.matches("input, select, button, a");
  if (key in MOVES && !control) page.stage.panBy(...MOVES[key]);
  else if (key === "Enter" && !control) readTile(byId("stage").clientWidth / 2, byId("stage").clientHeight / 2);
  else if (key in KEYS && !(target.matches("select") && key.length === 1)) KEYS[key]();
  else return;
  event.preventDefault();
}

// --- start ----------------------------------------------------------------------------------------------------------

function loadScript(address) {
  return new Promise((resolve, reject) => {
    const script = make("script", { src: address });
    script.addEventListener("load", resolve);
    script.addEventListener("error", () => reject({ message: "OpenSeadragon cannot be loaded.", remedy: "Run cfusion view --fetch." }));
    document.head.append(script);
  });
}

async function start() {
  const [palettes] = await Promise.all([ask("/api/palettes"), refreshState()]);
  page.controls = new Controls(overlay, palettes, { ask, redraw, showError });
  const deep = page.state.deep_zoom;
  if (deep) await loadScript("/assets/openseadragon.min.js");
  const on = {
    change: redraw,
    open: () => {
      byId("stage").dataset.state = "open";
      redraw();
    },
    fail: tileFailed,
    click: readTile,
  };
  page.stage = deep ? new DeepStage(byId("stage"), on) : new StillStage(byId("stage"), on);
  byId("zoom").hidden = !deep;
  byId("footer").append(
    ...(deep
      ? ["Deep zoom by OpenSeadragon, ", make("a", { href: "/assets/openseadragon-LICENSE.txt", textContent: "BSD-3-Clause" }), ". "]
      : [make("b", { textContent: "A still picture, no deep zoom: " }), `${page.state.deep_zoom_trouble} Run `, make("code", { textContent: "cfusion view --fetch" }), " (needs npm). "]),
    `For research; not a medical device. cfusion ${page.state.version}`,
  );
  byId("search").addEventListener("input", refreshList);
  byId("slides-toggle").addEventListener("click", () => toggleSlides());
  byId("help-open").addEventListener("click", () => byId("help").showModal());
  for (const button of byId("zoom").querySelectorAll("button")) {
    const factor = Number(button.dataset.zoom);
    button.addEventListener("click", () => (factor ? page.stage.zoomBy(factor) : page.stage.home()));
  }
  document.addEventListener("keydown", pressed);
  addEventListener("hashchange", () => openSlide(location.hash.slice(1)));
  const asked = location.hash.slice(1);
  const first = page.state.slides.find((slide) => slide.key === asked) ?? page.state.slides.find((slide) => !slide.trouble) ?? page.state.slides[0];
  history.replaceState(null, "", `#${first.key}`);
  await openSlide(first.key);
}

start().catch(showError);
