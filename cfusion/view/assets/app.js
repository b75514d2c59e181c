// The page: which slide is shown, which scores lie over it, and what a key, a click or an error does.

import { limits, Overlay, Scores, short } from "./heatmap.js";
import { magnified, make, matching, showBanner, showList, showPatient, showTile } from "./panels.js";
import { DeepStage, StillStage } from "./stage.js";

const byId = (id) => document.getElementById(id);
const overlay = new Overlay(byId("overlay"));
const page = { state: null, palettes: null, slide: null, stage: null, magnification: null, method: null, palette: {}, held: new Map() };

async function ask(address, as = "json") {
  const answer = await fetch(address).catch(() => null);
  if (!answer) throw { message: "The viewer does not answer.", remedy: "Start it again.", status: 0 };
  if (!answer.ok) {
    const { error, remedy } = await answer.json().catch(() => ({ error: `HTTP ${answer.status}`, remedy: "" }));
    throw { message: error, remedy, status: answer.status };
  }
  return as === "json" ? answer.json() : answer.arrayBuffer();
}

const told = (error) => (error.message ? showBanner(error.message, error.remedy) : showBanner("The page failed.", String(error)));
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
  page.state = await ask("/api/state");
  refreshList();
  if (page.state.probing) setTimeout(() => refreshState().catch(told), 1000);
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
  const entry = page.state.slides.find((slide) => slide.key === key);
  Object.assign(overlay, { picture: null, boxes: [] });
  page.slide = null;
  page.held.clear();
  page.stage.close();
  byId("stage").dataset.state = "opening";
  byId("slides").classList.remove("open");
  byId("slides-toggle").setAttribute("aria-expanded", "false");
  byId("slide-name").textContent = entry?.id ?? "CrossFusion";
  byId("slide-facts").textContent = "";
  byId("tile-body").replaceChildren(make("p", { className: "soft", textContent: "Click the slide, or press Enter for the tile in the middle." }));
  showBanner("");
  refreshList();
  try {
    const slide = await ask(`/api/slides/${encodeURIComponent(key)}`);
    if (page.asked !== key) return;
    page.slide = slide;
    document.title = `${slide.id} · CrossFusion`;
    byId("slide-facts").textContent = facts(slide);
    page.stage.open(slide);
    showPatient(slide.patient, page.state.run);
    showHeatmapPanel();
    await showScores();
  } catch (error) {
    byId("stage").dataset.state = "failed";
    showPatient(null, page.state.run);
    showHeatmapPanel();
    told(error);
    await refreshState();
  }
}

function facts({ width, height, mpp, vendor }) {
  const size = mpp ? ` (${((width * mpp) / 1000).toFixed(1)} × ${((height * mpp) / 1000).toFixed(1)} mm)` : "";
  return `${width.toLocaleString("en")} × ${height.toLocaleString("en")} px${size}, ${mpp ? `${Number(mpp.toPrecision(4))} µm/px` : "µm/px unknown"}${vendor ? `, ${vendor}` : ""}`;
}

// A tile did not come: ask for the slide itself, which says why.
async function tileFailed() {
  if (!page.slide || page.checking) return;
  page.checking = true;
  try {
    await ask(`/api/slides/${page.slide.key}`);
    showBanner("A part of the slide cannot be read.", "It stays blank; the file may be damaged there.");
  } catch (error) {
    byId("stage").dataset.state = "failed";
    told(error);
    await refreshState().catch(told);
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
    if (error.status !== 404) told(error);
    else letTileGo(error.message);
  }
}

function letTileGo(words = "Click the slide, or press Enter for the tile in the middle.") {
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

// --- the heatmap ----------------------------------------------------------------------------------------------------

function showHeatmapPanel() {
  const explanation = page.slide?.explanation;
  byId("heatmap-form").hidden = !explanation;
  byId("heatmap-none").textContent = explanation
    ? ""
    : page.slide?.explanation_trouble || "No scores for this slide. `cfusion explain` makes them; name their folder with --explanations.";
  if (!explanation) return;
  const names = Object.keys(explanation.magnifications);
  if (!names.includes(page.magnification)) page.magnification = names[0];
  segments("magnifications", names.map((name) => [name, magnified(name)]), page.magnification, (name) => choose({ magnification: name }));
  showMethods();
}

function showMethods() {
  const { methods, magnifications } = page.slide.explanation;
  const here = Object.keys(magnifications[page.magnification].ranges);
  if (!here.includes(page.method)) page.method = here[0];
  segments("methods", Object.keys(methods).map((name) => [name, name, !here.includes(name)]), page.method, (name) => choose({ method: name }));
}

function segments(id, options, chosen, pick) {
  const holder = byId(id);
  const same = [...holder.querySelectorAll("input")].map((input) => input.value + input.disabled).join() === options.map(([value, , off]) => value + Boolean(off)).join();
  if (!same) {
    holder.replaceChildren(
      ...options.map(([value, words, off]) => {
        const input = make("input", { type: "radio", name: id, value, disabled: Boolean(off) });
        if (off) input.title = "not scored at this magnification";
        input.addEventListener("change", () => pick(value));
        return make("label", {}, input, make("span", { textContent: words }));
      }),
    );
  }
  for (const input of holder.querySelectorAll("input")) input.checked = input.value === chosen;
}

async function choose(change) {
  Object.assign(page, change);
  showHeatmapPanel();
  await showScores().catch(told);
}

function kindOf() {
  return page.slide.explanation.methods[page.method].signed ? "diverging" : "sequential";
}

async function fetched(what) {
  const { key } = page.slide;
  const address = `/api/slides/${key}/scores/${page.magnification}/${what}`;
  if (!page.held.has(address)) page.held.set(address, await ask(address, "bytes"));
  return page.held.get(address);
}

async function showScores() {
  const explanation = page.slide?.explanation;
  if (!explanation || !page.method) return;
  const { key } = page.slide;
  const [magnification, method] = [page.magnification, page.method];
  const [coords, values] = [await fetched("coords"), await fetched(method)];
  if (page.slide?.key !== key || magnification !== page.magnification || method !== page.method) return;
  const { side_px: side, ranges } = explanation.magnifications[magnification];
  overlay.scores = new Scores(side, new Int32Array(coords), new Float32Array(values));
  const kind = kindOf();
  const names = Object.keys(page.palettes[kind]);
  page.palette[kind] ??= names[0];
  byId("palette").replaceChildren(...names.map((name) => make("option", { value: name, textContent: name.replace("_r", ""), selected: name === page.palette[kind] })));
  const colours = page.palettes[kind][page.palette[kind]];
  const { unit, signed, meaning } = explanation.methods[method];
  const [low, high] = limits(ranges[method], signed, byId("range").value === "full");
  overlay.picture = overlay.scores.coloured(colours, low, high);
  byId("meaning").textContent = meaning;
  showColourBar(colours, low, high, unit, signed);
  byId("stage").dataset.shown = `${magnification}/${method}/${page.palette[kind]}`;
  redraw();
}

function showColourBar(colours, low, high, unit, signed) {
  const bar = byId("colours");
  const strip = new ImageData(256, 1);
  colours.forEach((colour, i) => strip.data.set([...colour, 255], 4 * i));
  bar.getContext("2d").putImageData(strip, 0, 0);
  bar.setAttribute("aria-label", `Colours from ${short(low)} to ${short(high)} ${unit}`);
  byId("colour-low").textContent = short(low);
  byId("colour-mid").textContent = signed ? "0" : short((low + high) / 2);
  byId("colour-high").textContent = short(high);
  byId("colour-unit").textContent = signed ? `${unit}: lowers it · raises it` : unit;
}

function setOpacity(percent) {
  const value = Math.max(0, Math.min(100, percent));
  byId("opacity").value = value;
  byId("opacity-words").textContent = `${value}%`;
  overlay.opacity = value / 100;
  redraw();
}

function showHeatmap(visible) {
  byId("show").checked = overlay.visible = visible;
  redraw();
}

const after = (list, value) => list[(list.indexOf(value) + 1) % list.length];

function nextOf(id, change) {
  const values = [...byId(id).querySelectorAll("input:enabled")].map((input) => input.value);
  if (page.slide?.explanation && values.length) choose(change(values));
}

function nextPalette() {
  if (!page.slide?.explanation) return;
  const kind = kindOf();
  page.palette[kind] = after(Object.keys(page.palettes[kind]), page.palette[kind]);
  showScores().catch(told);
}

// --- keys -----------------------------------------------------------------------------------------------------------

const MOVES = { ArrowLeft: [-0.2, 0], ArrowRight: [0.2, 0], ArrowUp: [0, -0.2], ArrowDown: [0, 0.2] };
const KEYS = {
  "+": () => page.stage.zoomBy(1.5),
  "=": () => page.stage.zoomBy(1.5),
  "-": () => page.stage.zoomBy(1 / 1.5),
  0: () => page.stage.home(),
  h: () => showHeatmap(!overlay.visible),
  m: () => nextOf("magnifications", (values) => ({ magnification: after(values, page.magnification) })),
  s: () => nextOf("methods", (values) => ({ method: after(values, page.method) })),
  c: nextPalette,
  "[": () => setOpacity(Number(byId("opacity").value) - 10),
  "]": () => setOpacity(Number(byId("opacity").value) + 10),
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
  [page.palettes] = await Promise.all([ask("/api/palettes"), refreshState()]);
  const deep = page.state.deep_zoom;
  if (deep) await loadScript("/assets/openseadragon.min.js");
  const on = {
    change: redraw,
    open: () => (byId("stage").dataset.state = "open"),
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
  byId("show").addEventListener("change", (event) => showHeatmap(event.target.checked));
  byId("opacity").addEventListener("input", (event) => setOpacity(Number(event.target.value)));
  byId("range").addEventListener("change", () => showScores().catch(told));
  byId("palette").addEventListener("change", (event) => {
    page.palette[kindOf()] = event.target.value;
    showScores().catch(told);
  });
  byId("heatmap-form").addEventListener("submit", (event) => event.preventDefault());
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

start().catch(told);
