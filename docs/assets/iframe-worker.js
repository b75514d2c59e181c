// Search works from the disk too: browsers start no worker for file: pages, so a hidden frame takes the worker's place.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      this.ready = new Promise((resolve) => (frame.onload = resolve))
      const page = this.inside.document
      page.open()
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside.importScripts = async (...sources) => {
        for (const source of sources) {
          await new Promise((done) => {
            const script = page.createElement("script")
            script.onload = script.onerror = done
            script.src = source
            page.body.appendChild(script)
          })
        }
      }
      page.write(`<body><script src="${url}"></` + "script>")
      page.close()
    }
    async postMessage(data) {
      await this.ready
      this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }
    terminate() {}
  }
}
