// Draws scores as colours over the slide. Tiles are drawn once as pixels of a small picture, which every frame scales.

const ALIGNED = 0.01; // tolerance for corners on the grid, as a share of a tile's side; corners are rounded to px
const FINER = 8; // pixels along the side of a tile that is not on the grid
const MOST_PIXELS = 16e6;

export class Scores {
  // `clear` is 0 for the tiles that may be noise.
  constructor(side, coords, values, clear) {
    Object.assign(this, { side, coords, values, clear });
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < coords.length; i += 2) {
      left = Math.min(left, coords[i]);
      top = Math.min(top, coords[i + 1]);
      right = Math.max(right, coords[i]);
      bottom = Math.max(bottom, coords[i + 1]);
    }
    Object.assign(this, { left, top });
    const off = (at) => Math.abs(at / side - Math.round(at / side));
    const limit = ALIGNED + 1 / side;
    const onGrid = coords.every((at, i) => off(at - (i % 2 ? top : left)) <= limit);
    this.per = onGrid ? 1 : FINER;
    const size = () => [right - left, bottom - top].map((span) => Math.round((span / side) * this.per) + this.per);
    while (this.per > 1 && size()[0] * size()[1] > MOST_PIXELS) this.per /= 2;
    [this.width, this.height] = size();
    this.unit = side / this.per;
  }

  // Colour the tiles with `palette` from `low` to `high`, those that may be noise with `faded` unless it is null; tiles
  // without a score stay transparent.
  coloured(palette, low, high, faded) {
    const picture = new ImageData(this.width, this.height);
    const pixels = new Uint32Array(picture.data.buffer);
    const pack = ([r, g, b, a = 255]) => (a << 24) | (b << 16) | (g << 8) | r;
    const packed = palette.map(pack);
    const grey = faded && pack(faded);
    const span = high - low || 1;
    for (let i = 0; i < this.values.length; i++) {
      const value = this.values[i];
      if (Number.isNaN(value)) continue;
      const colour = grey !== null && this.clear[i] === 0 ? grey : packed[Math.max(0, Math.min(255, Math.round((255 * (value - low)) / span)))];
      const x = Math.round((this.coords[2 * i] - this.left) / this.unit);
      const y = Math.round((this.coords[2 * i + 1] - this.top) / this.unit);
      for (let row = y; row < y + this.per; row++) pixels.fill(colour, row * this.width + x, row * this.width + x + this.per);
    }
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.width, this.height];
    canvas.getContext("2d").putImageData(picture, 0, 0);
    return canvas;
  }
}

export class Overlay {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    Object.assign(this, { scores: null, picture: null, opacity: 0.6, visible: true, boxes: [] });
  }

  // Draw the visible coloured tiles and the outlines of the selected tile and its parents at the stage's frame.
  draw(frame) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const ratio = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.context.clearRect(0, 0, width, height);
    if (!frame) return;
    if (this.visible && this.picture) this.drawScores(frame, width, height);
    for (const box of this.boxes) this.outline(frame, box);
  }

  drawScores(frame, width, height) {
    const { scores, picture, context } = this;
    const step = scores.unit * frame.scale;
    const x = frame.x + scores.left * frame.scale;
    const y = frame.y + scores.top * frame.scale;
    const first = (from, limit) => Math.min(limit, Math.max(0, Math.floor(-from / step)));
    const last = (from, end, limit) => Math.min(limit, Math.max(0, Math.ceil((end - from) / step)));
    const [x0, y0] = [first(x, picture.width), first(y, picture.height)];
    const [columns, rows] = [last(x, width, picture.width) - x0, last(y, height, picture.height) - y0];
    if (columns <= 0 || rows <= 0) return;
    context.save();
    context.globalAlpha = this.opacity;
    context.imageSmoothingEnabled = step < 1;
    context.drawImage(picture, x0, y0, columns, rows, x + x0 * step, y + y0 * step, columns * step, rows * step);
    context.restore();
  }

  outline(frame, { x_px, y_px, side_px }) {
    const at = [frame.x + x_px * frame.scale, frame.y + y_px * frame.scale, side_px * frame.scale, side_px * frame.scale];
    for (const [style, width] of [["#fff", 4], ["#111", 2]]) {
      this.context.strokeStyle = style;
      this.context.lineWidth = width;
      this.context.strokeRect(...at);
    }
  }
}

// A score with three significant digits; a very small or large one with a power of ten, as on the pages.
export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e6) return Number(value.toPrecision(3)).toString().replace("-", "−");
  const [mantissa, power] = value.toExponential(1).split("e");
  const raised = [...power.replace("+", "")].map((sign) => (sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign])).join("");
  return `${Number(mantissa)}`.replace("-", "−") + `\u00a0×\u00a010${raised}`; // in a narrow table it stays on one line
}
