// The panels next to the slide: list, tile and patient. They draw their arguments and keep no state.

import { short } from "./heatmap.js";

const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const magnified = (name) => `${name.replace("x", "")}x`;

// The slides whose name contains every word of the search.
export function matching(slides, words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  return slides.filter((slide) => wanted.every((word) => slide.name.toLowerCase().includes(word)));
}

export function showList(slides, total, current, choose) {
  const item = (slide) => {
    const picture = slide.trouble
      ? make("span", { className: "no-picture", textContent: "!", ariaHidden: "true" })
      : make("img", { loading: "lazy", fetchPriority: "low", alt: "", width: 48, height: 48, src: `/slides/${slide.key}/still.jpg?v=${slide.version}` });
    picture.addEventListener("error", () => picture.removeAttribute("src"), { once: true }); // a blank square
    const said = slide.trouble ?? (slide.explained ? "explained" : "");
    const button = make(
      "button",
      { className: slide.trouble ? "slide trouble" : "slide" },
      picture,
      make("span", {}, make("b", { textContent: slide.id }), said ? make("small", { textContent: said }) : null),
    );
    button.title = slide.name;
    button.dataset.key = slide.key;
    if (slide.key === current) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => choose(slide.key));
    return make("li", {}, button);
  };
  const focused = document.activeElement?.closest("#list button")?.dataset.key;
  byId("list").replaceChildren(...slides.map(item));
  if (focused) byId("list").querySelector(`[data-key="${focused}"]`)?.focus();
  const found = slides.length === total ? `${total} slide${total === 1 ? "" : "s"}` : `${slides.length} of ${total} slides`;
  byId("count").textContent = slides.length ? found : "No matching slide.";
}

export function showTile(answer, slide, explanation) {
  const { x_px: x, y_px: y, mpp, tiles, trouble } = answer;
  const um = (px) => `${((px * mpp) / 1000).toFixed(3)} mm`;
  const facts = make("dl", { className: "facts" });
  const fact = (name, value) => facts.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
  fact("Point", `${Math.round(x)}, ${Math.round(y)} px`);
  if (mpp) fact("", `${Math.round(x * mpp)}, ${Math.round(y * mpp)} µm`);
  const finest = tiles[0];
  if (finest) {
    fact(`${magnified(finest.name)} tile`, `${finest.x_px}, ${finest.y_px} px`);
    if (mpp) fact("", `${Math.round(finest.x_px * mpp)}, ${Math.round(finest.y_px * mpp)} µm, side ${(finest.side_px * mpp).toFixed(0)} µm`);
  }
  const pictures = tiles.map((tile) => {
    const words = `${magnified(tile.name)}: ${mpp ? `${(tile.side_px * mpp).toFixed(0)} µm` : `${tile.side_px} px`}`;
    const picture = make("img", { alt: `Patch at ${words} wide`, width: 256, height: 256 });
    picture.src = `/slides/${slide.key}/patch.jpg?x=${tile.x_px}&y=${tile.y_px}&side=${tile.side_px}&v=${slide.version}`;
    return make("figure", {}, picture, make("figcaption", { textContent: words }));
  });
  const body = [facts, make("div", { className: "patches" }, ...pictures)];
  if (trouble) body.push(make("p", { className: "soft", textContent: trouble }));
  if (explanation) body.push(...scoreTable(tiles, explanation));
  byId("tile-body").replaceChildren(...body);
}

function scoreTable(tiles, explanation) {
  if (tiles.every((tile) => tile.tile === null)) {
    return [make("p", { className: "soft", textContent: "No tile was scored here: too little tissue." })];
  }
  const methods = Object.entries(explanation.methods);
  const head = make("tr", {}, make("th", { textContent: "" }));
  for (const [name, { unit }] of methods) head.append(make("th", { scope: "col" }, name, make("small", { textContent: unit })));
  const rows = tiles.map((tile) => {
    const row = make("tr", {}, make("th", { scope: "row", textContent: magnified(tile.name) }));
    for (const [name] of methods) {
      const score = tile.scores[name];
      const spread = score && score.sd !== null ? make("small", { textContent: `± ${short(score.sd)}` }) : null;
      row.append(make("td", {}, short(score?.mean), spread));
    }
    return row;
  });
  const caption = explanation.models > 1 ? `Mean ± sd of ${explanation.models} folds` : "One model";
  const table = make("table", {}, make("caption", { textContent: caption }), make("thead", {}, head), make("tbody", {}, ...rows));
  return [make("div", { className: "scroll" }, table)];
}

export function showPatient(patient, run) {
  const body = byId("patient-body");
  if (!patient) {
    const words = run ? "The patient is unknown." : "Start the viewer with --run and the folder of a finished run to compare the patient with the cohort.";
    body.replaceChildren(make("p", { className: "soft", textContent: words }));
    return;
  }
  const parts = [];
  if (patient.figure) {
    const holder = document.createElement("template");
    holder.innerHTML = patient.figure; // written by the viewer's server, which escapes every name
    const figure = holder.content.firstElementChild;
    parts.push(make("figure", { className: "curve" }, figure, legend(patient.figure)));
  }
  if (patient.case) parts.push(make("p", {}, make("b", { textContent: patient.case })));
  parts.push(make("p", { className: "soft", textContent: patient.words }));
  body.replaceChildren(...parts);
}

function legend(figure) {
  const names = { cohort: "cohort, Kaplan–Meier (95%)", patient: "this patient, out of fold", ensemble: "this slide, all folds" };
  const shown = Object.entries(names).filter(([css]) => figure.includes(`line ${css}`));
  return make("figcaption", { className: "legend" }, ...shown.map(([css, words]) => make("span", { className: css, textContent: words })));
}

export function showBanner(message, remedy = "") {
  const banner = byId("banner");
  banner.hidden = !message;
  banner.replaceChildren(...(message ? [make("b", { textContent: message }), ` ${remedy}`] : []));
}
