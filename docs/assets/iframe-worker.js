// The search runs in a worker, which browsers do not allow a page that was opened as a file: it then runs in a hidden
// frame. Named after the script that the theme would otherwise fetch from a network for the same purpose.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.append(frame)
      this.frame = frame
      frame.contentWindow.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = new Promise((done, failed) => {
        const script = frame.contentDocument.createElement("script")
        Object.assign(script, { src: url, onload: done, onerror: failed })
        frame.contentDocument.body.append(script)
      })
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
