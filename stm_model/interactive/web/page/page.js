// The page of `stm interact`: shows frames and sends strokes; the state is the server's.

const KEPT_PICTURES = 60;

class Page {
  constructor(root) {
    this.root = root;
    this.get = (name) => root.querySelector(`#stm-${name}`);
    // kept in sessionStorage: after a reload it is the same tab
    this.tab = sessionStorage.getItem("stm-tab") ?? crypto.randomUUID?.() ?? String(Math.random());
    sessionStorage.setItem("stm-tab", this.tab);
    this.status = null;
    this.frame = 0;
    this.label = 1;
    this.tool = "pen";
    this.masks = true;
    this.stroke = null;
    this.sending = new Set();
    this.previewing = false;
    this.previews = new Map();
    this.pictures = new Map();
    this.queue = Promise.resolve();
    this.listen();
    this.act("enter").then(() => this.show(0));
  }

  // ---- talking to the server

  async ask(path, body, type = "application/json") {
    const response = await fetch(path, { method: "POST", body, headers: { "x-stm-tab": this.tab, "content-type": type } });
    if (response.ok) return response;
    const answer = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
    if (response.status === 409) this.update({ ...this.status, yours: false });
    throw new Error(answer.error);
  }

  // one request at a time, in the order of the user's actions
  act(action, content = {}) {
    this.queue = this.queue.then(async () => {
      try {
        const response = await this.ask(`/stm/do/${action}`, JSON.stringify(content));
        this.say("");
        this.update(await response.json());
        return true;
      } catch (error) {
        this.say(error.message, true);
        return false;
      }
    });
    return this.queue;
  }

  async upload(kind, input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    this.say(`loading ${file.name} …`);
    try {
      const name = encodeURIComponent(file.name);
      const response = await this.ask(`/stm/upload/${kind}?name=${name}`, file, "application/octet-stream");
      this.update(await response.json());
      this.say(`${file.name} is loaded`);
      this.show(Math.min(this.frame, this.status.video.frames - 1));
    } catch (error) {
      this.say(error.message, true);
    }
  }

  // one at a time: the next one shows what was drawn meanwhile
  async preview() {
    if (this.previewing || !this.status.objects.length) return;
    const frame = this.frame, version = this.status.version;
    this.previewing = true;
    this.get("badge").textContent = "preview …";
    try {
      const response = await this.ask("/stm/preview", JSON.stringify({ frame }));
      if (version !== this.status.version) return;
      this.previews.set(frame, URL.createObjectURL(await response.blob()));
      if (frame === this.frame) this.show(frame);
    } catch (error) {
      this.get("badge").textContent = "";
      this.say(error.message, true);
    } finally {
      this.previewing = false;
      if (frame === this.frame && version !== this.status.version) this.preview();
    }
  }

  // ---- what is shown

  update(status) {
    const before = this.status;
    this.status = status;
    if (before?.version !== status.version) {
      for (const url of this.previews.values()) URL.revokeObjectURL(url);
      this.previews.clear();
      this.pictures.clear();
    }
    const { video, job, objects } = status;
    this.get("name").textContent = video.name;
    this.get("size").textContent = `${video.width}×${video.height}, ${video.frames} frames`;
    this.get("rounds").textContent = status.rounds ? `round ${status.rounds}` : "";
    this.get("step").textContent = `step ${status.position} of ${status.steps.length - 1}: ${status.steps[status.position]}`;
    this.get("frame").max = video.frames - 1;
    const running = Boolean(job?.running);
    for (const name of ["track", "export", "open", "load"]) this.get(name).disabled = running;
    this.get("run").hidden = running;
    this.get("stop").hidden = !running;
    this.get("undo").disabled = running || status.position === 0;
    this.get("redo").disabled = running || status.position === status.steps.length - 1;
    this.get("progress").hidden = !running;
    if (running) {
      if (job.total) this.get("progress").value = job.done / job.total;
      else this.get("progress").removeAttribute("value");
      this.say(`${job.name}: ${job.done} of ${job.total || "…"} frames`);
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.act("status"), 300);
    } else if (before?.job?.running) {
      this.say(job.error ?? `${job.name}: done`, Boolean(job.error));
    }
    if (!objects.includes(this.label) && this.label !== 0) this.label = Math.min(this.label, this.next());
    const taken = this.get("taken");
    if (!status.yours && !taken.open) taken.showModal();
    if (status.yours && taken.open) taken.close();
    if (video.damage && !before) this.say(video.damage, true);
    this.showTools();
    if (before?.version !== status.version) this.show(Math.min(this.frame, video.frames - 1));
  }

  showTools() {
    const { objects, files } = this.status;
    const labels = [...objects];
    if (this.label && !labels.includes(this.label)) labels.push(this.label);
    this.get("objects").replaceChildren(...labels.map((label) => {
      const button = document.createElement("button");
      const swatch = document.createElement("span");
      swatch.className = "stm-swatch";
      swatch.style.background = this.color(label);
      button.append(swatch, `object ${label}`);
      button.classList.toggle("stm-on", label === this.label);
      button.onclick = () => this.choose(label);
      return button;
    }));
    this.get("background").classList.toggle("stm-on", this.label === 0);
    for (const tool of ["pen", "fill", "erase"]) this.get(tool).classList.toggle("stm-on", tool === this.tool);
    this.get("masks").classList.toggle("stm-on", this.masks);
    this.get("files").replaceChildren(...files.map((name) => Object.assign(document.createElement("a"), {
      href: `/stm/file/${encodeURIComponent(name)}`, textContent: name, className: "stm-button", download: "",
    })));
  }

  show(frame) {
    this.frame = Math.max(0, Math.min(frame, this.status.video.frames - 1));
    this.get("frame").value = this.frame;
    this.get("position").textContent = `frame ${this.frame} of ${this.status.video.frames - 1}`;
    const preview = this.masks ? this.previews.get(this.frame) : undefined;
    this.get("badge").textContent = preview ? "preview: run to see all frames" : "";
    const wanted = preview ?? this.address(this.frame);
    this.wanted = wanted;
    const image = this.fetched(wanted);
    const put = () => {
      if (this.wanted !== wanted) return;
      this.get("picture").src = wanted;
      this.get("picture").dataset.frame = this.frame;
      for (const near of [this.frame + 1, this.frame - 1]) {
        if (near >= 0 && near < this.status.video.frames) this.fetched(this.address(near));
      }
    };
    image.decode().then(put, put);
    this.draw();
    this.drawMarks();
  }

  address(frame) {
    return `/stm/frame/${frame}?masks=${this.masks}&version=${this.status.version}`;
  }

  fetched(address) {
    let image = this.pictures.get(address);
    if (!image) {
      image = new Image();
      image.src = address;
      this.pictures.set(address, image);
      if (this.pictures.size > KEPT_PICTURES) this.pictures.delete(this.pictures.keys().next().value);
    }
    return image;
  }

  color(label) {
    if (!label) return "#ffffff";
    const { colors } = this.status;
    return colors[(label - 1) % colors.length];
  }

  // the picture's box within the stage, in CSS pixels
  box() {
    const stage = this.get("stage").getBoundingClientRect();
    const { width, height } = this.status.video;
    const scale = Math.min(stage.width / width, stage.height / height);
    return {
      left: (stage.width - width * scale) / 2, top: (stage.height - height * scale) / 2,
      width: width * scale, height: height * scale,
    };
  }

  draw() {
    const canvas = this.get("canvas");
    const { width, height } = this.get("stage").getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.lineCap = context.lineJoin = "round";
    const drawn = this.masks ? [...(this.status.scribbles[this.frame] ?? [])] : [];
    for (const { path, object_id } of drawn) this.line(context, path, object_id, false);
    for (const stroke of [...this.sending, this.stroke]) {
      if (stroke && (stroke === this.stroke || stroke.frame === this.frame)) {
        this.line(context, stroke.path, stroke.label, stroke.tool !== "pen");
      }
    }
  }

  line(context, path, label, closed) {
    const box = this.box();
    context.beginPath();
    for (const [x, y] of path) context.lineTo(box.left + x * box.width, box.top + y * box.height);
    if (path.length === 1) context.lineTo(box.left + path[0][0] * box.width + 0.1, box.top + path[0][1] * box.height);
    if (closed) context.closePath();
    // a dark edge keeps every color visible on every picture
    context.lineWidth = 6;
    context.strokeStyle = "#000a";
    context.stroke();
    context.lineWidth = 3.5;
    context.strokeStyle = this.color(label);
    context.stroke();
  }

  drawMarks() {
    const canvas = this.get("marks");
    canvas.width = canvas.clientWidth;
    const context = canvas.getContext("2d");
    const last = Math.max(1, this.status.video.frames - 1);
    for (const frame of this.status.annotated) {
      // the slider's thumb stops half its width from the ends
      const x = 8 + (frame / last) * (canvas.width - 16);
      context.fillStyle = "#005a9c";
      context.fillRect(x - 2, 1, 4, 9);
    }
  }

  say(text, bad = false) {
    this.get("message").textContent = text;
    this.get("message").classList.toggle("stm-bad", bad);
  }

  // ---- what the user does

  next() {
    return Math.max(0, ...this.status.objects) + 1;
  }

  choose(label) {
    if (label === 0 || this.status.objects.includes(label) || label === this.next()) this.label = label;
    this.showTools();
  }

  use(tool) {
    this.tool = tool;
    this.showTools();
  }

  toggleMasks() {
    this.masks = !this.masks;
    this.showTools();
    this.show(this.frame);
  }

  nextAnnotated() {
    const { annotated } = this.status;
    const after = annotated.find((frame) => frame > this.frame) ?? annotated[0];
    if (after !== undefined) this.show(after);
  }

  place(event) {
    const stage = this.get("stage").getBoundingClientRect();
    const box = this.box();
    const inside = (value) => Math.max(0, Math.min(1, value));
    return [
      inside((event.clientX - stage.left - box.left) / box.width),
      inside((event.clientY - stage.top - box.top) / box.height),
    ];
  }

  begin(event) {
    if (this.stroke || this.status.job?.running || !this.status.yours) return;
    const label = event.button === 2 ? 0 : this.label;
    const tool = label === 0 ? "pen" : this.tool;
    this.stroke = { path: [this.place(event)], label, tool, frame: this.frame };
    this.get("canvas").setPointerCapture(event.pointerId);
    this.draw();
  }

  extend(event) {
    if (!this.stroke) return;
    const box = this.box();
    for (const part of event.getCoalescedEvents?.() ?? [event]) {
      const [x, y] = this.place(part);
      const [lastX, lastY] = this.stroke.path.at(-1);
      if (Math.hypot((x - lastX) * box.width, (y - lastY) * box.height) >= 2) this.stroke.path.push([x, y]);
    }
    this.draw();
  }

  async end() {
    if (!this.stroke) return;
    const stroke = this.stroke;
    const { path, label, tool, frame } = stroke;
    this.stroke = null;
    this.sending.add(stroke);
    const content = { frame, object: label, path };
    const action = tool === "pen" ? "scribble" : "paint";
    const done = await this.act(action, action === "paint" ? { ...content, erase: tool === "erase" } : content);
    this.sending.delete(stroke);
    this.draw();
    if (done && frame === this.frame && action === "scribble") this.preview();
  }

  key(event) {
    if (event.ctrlKey && event.key.toLowerCase() === "z") return event.shiftKey ? this.act("redo") : this.act("undo");
    if (event.ctrlKey || event.metaKey || event.altKey || this.root.querySelector("dialog[open]")) return undefined;
    const far = event.shiftKey ? 10 : 1;
    const keys = {
      arrowleft: () => this.show(this.frame - far),
      arrowright: () => this.show(this.frame + far),
      home: () => this.show(0),
      end: () => this.show(this.status.video.frames - 1),
      p: () => this.nextAnnotated(),
      n: () => this.choose(this.next()),
      b: () => this.choose(0),
      s: () => this.use("pen"),
      f: () => this.use("fill"),
      e: () => this.use("erase"),
      z: () => this.act("undo"),
      y: () => this.act("redo"),
      r: () => this.act("run"),
      t: () => this.act("track", { frame: this.frame, direction: "both" }),
      o: () => this.toggleMasks(),
      h: () => this.get("keys").showModal(),
      escape: () => this.status.job?.running && this.act("stop"),
    };
    for (let label = 1; label <= 9; label += 1) keys[label] = () => this.choose(label);
    const action = keys[event.key.toLowerCase()];
    if (!action) return undefined;
    event.preventDefault();
    return action();
  }

  listen() {
    const click = (name, action) => this.get(name).addEventListener("click", action);
    click("new", () => this.choose(this.next()));
    click("background", () => this.choose(0));
    for (const tool of ["pen", "fill", "erase"]) click(tool, () => this.use(tool));
    for (const action of ["undo", "redo", "run", "stop", "export"]) click(action, () => this.act(action));
    click("track", () => this.act("track", { frame: this.frame, direction: "both" }));
    click("masks", () => this.toggleMasks());
    click("help", () => this.get("keys").showModal());
    click("save", () => { window.location.href = "/stm/file/session.stm"; });
    click("take", () => this.act("enter", { take: true }));
    this.get("taken").addEventListener("cancel", (event) => event.preventDefault());
    this.get("open").addEventListener("change", (event) => this.upload("video", event.target));
    this.get("load").addEventListener("change", (event) => this.upload("session", event.target));
    const slider = this.get("frame");
    slider.addEventListener("input", () => this.show(Number(slider.value)));
    const canvas = this.get("canvas");
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.extend(event));
    canvas.addEventListener("pointerup", () => this.end());
    canvas.addEventListener("pointercancel", () => { this.stroke = null; this.draw(); });
    document.addEventListener("keydown", (event) => this.status && this.key(event));
    window.addEventListener("resize", () => this.status && this.show(this.frame));
    window.addEventListener("pagehide", () => {
      fetch("/stm/do/leave", { method: "POST", body: "{}", keepalive: true, headers: { "x-stm-tab": this.tab } });
    });
  }
}

window.stmPage = new Page(document.body);
