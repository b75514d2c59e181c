// Search works from the disk too: browsers start no worker for file: pages, so a hidden frame takes the worker's place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      window.addEventListener("message", (event) => {
        if (event.source !== this.inside) return
        const message = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(message)
        if (this.onmessage) this.onmessage(message)
      })
      const load = (source) => `<script src="${source}"></` + "script>"
      this.ready = new Promise((resolve) => {
        frame.onload = resolve
        this.inside.document.open()
        this.inside.document.write(`<script>
          postMessage = (data) => parent.postMessage(data, "*")
          importScripts = (...sources) => sources.reduce((before, source) => before.then(() => new Promise((done) => {
            const script = document.createElement("script")
            script.src = source
            script.onload = script.onerror = done
            document.body.appendChild(script)
          })), Promise.resolve())
        </` + "script>" + load(url))
        this.inside.document.close()
      })
    }
    postMessage(data) {
      this.ready.then(() => this.inside.postMessage(data, "*"))
    }
    terminate() {}
  }
}
