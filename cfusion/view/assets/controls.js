// The controls of the heatmap: magnification, score, colours, range and opacity.

import { Scores, short } from "./heatmap.js";
import { make, magnified } from "./panels.js";

const byId = (id) => document.getElementById(id);
const after = (list, value) => list[(list.indexOf(value) + 1) % list.length];
const code = (words) => make("code", { textContent: words });
const noScores = () => ["No scores for this slide. Compute them with ", code("cfusion explain"), " and give the folder with ", code("--explanations"), "."];

export class Controls {
  // `ask` fetches an address, `redraw` draws the overlay, `showError` shows an error.
  constructor(overlay, palettes, { ask, redraw, showError }) {
    Object.assign(this, { overlay, palettes, ask, redraw, showError });
    Object.assign(this, { slide: null, magnification: null, method: null, palette: {}, held: new Map() });
    byId("show").addEventListener("change", (event) => this.setVisible(event.target.checked));
    byId("opacity").addEventListener("input", (event) => this.setOpacity(Number(event.target.value)));
    for (const id of ["range", "noise"]) byId(id).addEventListener("change", () => this.refresh());
    byId("palette").addEventListener("change", (event) => this.choosePalette(event.target.value));
    byId("heatmap-form").addEventListener("submit", (event) => event.preventDefault());
  }

  get explanation() {
    return this.slide?.explanation ?? null;
  }

  // Show another slide or none; keep the current choices that the slide has.
  setSlide(slide) {
    this.slide = slide;
    this.held.clear();
    this.overlay.picture = null;
    this.showPanel();
    return this.refresh();
  }

  showPanel() {
    const { explanation } = this;
    byId("heatmap-form").hidden = !explanation;
    const trouble = this.slide?.explanation_trouble;
    byId("heatmap-none").replaceChildren(...(explanation ? [] : trouble ? [trouble] : noScores()));
    if (!explanation) return;
    const { magnifications, methods } = explanation;
    const names = Object.keys(magnifications);
    if (!names.includes(this.magnification)) this.magnification = names.at(-1); // the coarsest
    const scored = this.scored();
    if (!scored.includes(this.method)) this.method = scored[0];
    const levels = names.map((name) => ({ value: name, words: magnified(name) }));
    segments("magnifications", levels, this.magnification, (name) => this.choose({ magnification: name }));
    const scores = Object.keys(methods).map((name) => ({ value: name, words: name, off: !scored.includes(name) }));
    segments("methods", scores, this.method, (name) => this.choose({ method: name }));
  }

  // The methods with scores at the chosen magnification, in the order of the explanation.
  scored() {
    const { verdicts } = this.explanation.magnifications[this.magnification];
    return Object.keys(this.explanation.methods).filter((name) => name in verdicts);
  }

  choose(change) {
    Object.assign(this, change);
    this.showPanel();
    return this.refresh();
  }

  refresh() {
    return this.showScores().catch(this.showError);
  }

  get kind() {
    return this.explanation.methods[this.method].signed ? "diverging" : "sequential";
  }

  async fetched(what) {
    const address = `/api/slides/${this.slide.key}/scores/${this.magnification}/${what}`; // fetched once per slide
    if (!this.held.has(address)) this.held.set(address, await this.ask(address, "bytes"));
    return this.held.get(address);
  }

  async showScores() {
    const { slide, explanation, magnification, method } = this;
    if (!explanation || !method) return;
    const coords = await this.fetched("coords");
    if (slide !== this.slide || magnification !== this.magnification || method !== this.method) return;
    const [values, clear] = await Promise.all([this.fetched(method), this.fetched(`${method}?stands-out`)]);
    if (slide !== this.slide || magnification !== this.magnification || method !== this.method) return;
    const { side_px: side, verdicts } = explanation.magnifications[magnification];
    const { unit, signed, meaning, scale } = explanation.methods[method];
    const colours = this.showPalettes();
    const full = byId("range").value === "full";
    const high = full ? scale.most : scale.high;
    const low = signed ? -high : scale.low;
    this.overlay.scores = new Scores(side, new Int32Array(coords), new Float32Array(values), new Uint8Array(clear));
    this.overlay.picture = this.overlay.scores.coloured(colours, low, high, byId("noise").checked ? null : this.palettes.faded);
    byId("meaning").textContent = meaning;
    byId("meaning").className = signed ? "soft" : "caution"; // attention is no direction
    byId("verdict").textContent = verdicts[method];
    byId("noise-row").hidden = !explanation.tested;
    byId("faded").hidden = !explanation.tested || byId("noise").checked;
    byId("clear").hidden = !signed;
    showColourBar(colours, low, high, unit, signed, scale.clipped && !full);
    byId("stage").dataset.shown = `${magnification}/${method}/${this.palette[this.kind]}`;
    this.redraw();
  }

  showPalettes() {
    const { kind } = this;
    const names = Object.keys(this.palettes[kind]);
    this.palette[kind] ??= names[0];
    const chosen = this.palette[kind];
    const options = names.map((name) => make("option", { value: name, textContent: name.replace("_r", ""), selected: name === chosen }));
    byId("palette").replaceChildren(...options);
    return this.palettes[kind][chosen];
  }

  choosePalette(name) {
    this.palette[this.kind] = name;
    return this.refresh();
  }

  setOpacity(percent) {
    const value = Math.max(0, Math.min(100, percent));
    byId("opacity").value = value;
    byId("opacity-words").textContent = `${value}%`;
    this.overlay.opacity = value / 100;
    this.redraw();
  }

  changeOpacity(by) {
    this.setOpacity(Number(byId("opacity").value) + by);
  }

  setVisible(visible) {
    byId("show").checked = this.overlay.visible = visible;
    this.redraw();
  }

  toggle() {
    this.setVisible(!this.overlay.visible);
  }

  nextMagnification() {
    if (this.explanation) this.choose({ magnification: after(Object.keys(this.explanation.magnifications), this.magnification) });
  }

  nextMethod() {
    if (!this.explanation) return;
    this.choose({ method: after(this.scored(), this.method) });
  }

  nextPalette() {
    if (this.explanation) this.choosePalette(after(Object.keys(this.palettes[this.kind]), this.palette[this.kind]));
  }
}

// A row of radio buttons; redrawn only if the options change, to keep the focus.
function segments(id, options, chosen, pick) {
  const holder = byId(id);
  const signature = JSON.stringify(options);
  if (holder.dataset.options !== signature) {
    holder.dataset.options = signature;
    const focused = holder.contains(document.activeElement);
    holder.replaceChildren(
      ...options.map(({ value, words, off }) => {
        const input = make("input", { type: "radio", name: id, value, disabled: Boolean(off) });
        if (off) input.title = "not scored at this magnification";
        input.addEventListener("change", () => pick(value));
        return make("label", {}, input, make("span", { textContent: words }));
      }),
    );
    if (focused) holder.querySelector(`input[value="${chosen}"]`)?.focus();
  }
  for (const input of holder.querySelectorAll("input")) input.checked = input.value === chosen;
}

function showColourBar(colours, low, high, unit, signed, clipped) {
  const bar = byId("colours");
  const strip = new ImageData(256, 1);
  colours.forEach(([red, green, blue], i) => strip.data.set([red, green, blue, 255], 4 * i));
  bar.getContext("2d").putImageData(strip, 0, 0);
  bar.setAttribute("aria-label", `Colours from ${short(low)} to ${short(high)} ${unit}`);
  byId("colour-low").textContent = `${clipped && signed ? "≤ " : ""}${short(low)}`;
  byId("colour-mid").textContent = signed ? "0" : short((low + high) / 2);
  byId("colour-high").textContent = `${clipped ? "≥ " : ""}${short(high)}`;
  byId("colour-unit").textContent = signed ? `${unit}: lowers it · raises it` : unit;
}
