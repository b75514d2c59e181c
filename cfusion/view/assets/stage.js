// Shows the slide: deep zoom with OpenSeadragon, or one still picture if OpenSeadragon was not fetched.
// In both, `frame()` returns { x, y, scale }: the slide's corner in CSS px, and CSS px per level-0 px.

const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export class DeepStage {
  constructor(element, on) {
    this.element = element;
    this.holder = document.createElement("div");
    this.holder.className = "deep";
    element.prepend(this.holder);
    this.viewer = OpenSeadragon({
      element: this.holder,
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "BOTTOM_RIGHT",
      navigatorAutoFade: false,
      navigatorOpacity: 1,
      navigatorSizeRatio: 0.16,
      tabIndex: -1,
      keyboardNavEnabled: false,
      animationTime: calm() ? 0 : 0.5,
      blendTime: 0.1,
      maxZoomPixelRatio: 4,
      visibilityRatio: 0.5,
      imageLoaderLimit: 12,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { dblTapToZoom: true },
    });
    this.viewer.addHandler("update-viewport", on.change);
    this.viewer.addHandler("resize", on.change);
    this.viewer.addHandler("open", on.open);
    this.viewer.addHandler("open-failed", on.fail);
    this.viewer.addHandler("tile-load-failed", (event) => {
      if (event.message !== "Image load aborted.") on.fail(); // cancelled tiles are not errors
    });
    this.viewer.addHandler("canvas-click", (event) => {
      if (event.quick) on.click(event.position.x, event.position.y);
    });
  }

  open(slide) {
    this.viewer.open({
      width: slide.width,
      height: slide.height,
      tileSize: slide.tile_px,
      tileOverlap: slide.overlap_px,
      minLevel: 0,
      maxLevel: slide.levels - 1,
      getTileUrl: (level, x, y) => `/slides/${slide.key}/tiles/${level}/${x}_${y}.jpg?v=${slide.version}`,
    });
  }

  close() {
    this.viewer.close();
  }

  frame() {
    const image = this.viewer.world.getItemAt(0);
    if (!image) return null;
    const corner = image.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const { x: width } = image.getContentSize();
    const end = image.imageToViewerElementCoordinates(new OpenSeadragon.Point(width, 0));
    return { x: corner.x, y: corner.y, scale: (end.x - corner.x) / width };
  }

  zoomBy(factor) {
    this.viewer.viewport.zoomBy(factor).applyConstraints();
  }

  panBy(right, down) {
    const bounds = this.viewer.viewport.getBounds();
    this.viewer.viewport.panBy(new OpenSeadragon.Point(right * bounds.width, down * bounds.height)).applyConstraints();
  }

  home() {
    this.viewer.viewport.goHome();
  }
}

export class StillStage {
  constructor(element, on) {
    this.element = element;
    this.picture = document.createElement("img");
    this.picture.className = "still";
    element.prepend(this.picture);
    this.picture.addEventListener("load", on.open);
    this.picture.addEventListener("error", () => this.picture.getAttribute("src") && on.fail());
    new ResizeObserver(on.change).observe(element);
    this.picture.addEventListener("click", (event) => {
      const box = element.getBoundingClientRect();
      on.click(event.clientX - box.x, event.clientY - box.y);
    });
  }

  open(slide) {
    this.slide = slide;
    this.picture.alt = `The whole slide ${slide.id}`;
    this.picture.src = `/slides/${slide.key}/still.jpg?size=large&v=${slide.version}`;
  }

  close() {
    this.picture.removeAttribute("src");
    this.slide = null;
  }

  frame() {
    if (!this.slide || !this.picture.naturalWidth) return null;
    const { clientWidth: width, clientHeight: height } = this.element;
    const scale = Math.min(width / this.slide.width, height / this.slide.height);
    return { x: (width - this.slide.width * scale) / 2, y: (height - this.slide.height * scale) / 2, scale };
  }

  zoomBy() {}
  panBy() {}
  home() {}
}
