// The page of `stm interact`: what the user does, and what is shown of it; the state is the server's.

import { Server } from "./server.js";
import { Stage } from "./stage.js";
import { Timeline } from "./timeline.js";

const HINT = "stm-hint-seen";
const DRAWING = ["pen", "brush", "outline"];
const PANNED = 60;

function time(seconds) {
  const whole = Math.ceil(seconds);
  return whole < 60 ? `${whole} s left` : `${Math.floor(whole / 60)} min ${whole % 60} s left`;
}

class Page {
  constructor(root) {
    this.root = root;
    this.get = (name) => root.querySelector(`#stm-${name}`);
    Object.assign(this, { status: null, frame: 0, label: 1, tool: "pen", erase: false, brush: 12, masks: true });
    this.previewing = false;
    this.previews = new Map();
    this.server = new Server({
      status: (status, quiet) => this.update(status, quiet),
      error: (message) => this.say(message, true),
      taken: () => this.update({ ...this.status, yours: false }),
      back: (status) => { this.update(status); this.say("the server is back"); },
    });
    this.stage = new Stage(this.get, {
      frame: () => this.frame,
      begin: () => this.begin(),
      pen: (other) => this.pen(other),
      stroke: (stroke) => this.send(stroke),
    });
    this.timeline = new Timeline(this.get, {
      show: (frame) => this.show(frame),
      ready: (frame) => this.stage.fetched(this.address(frame)).decode().catch(() => {}),
    });
    this.listen();
    this.act("enter").then((done) => done && this.show(0));
  }

  act(action, content) {
    return this.server.act(action, content);
  }

  // ---- what is shown

  update(status, quiet = false) {
    const before = this.status;
    this.status = status;
    const { video, job, objects } = status;
    const changed = before?.version !== status.version;
    if (changed) {
      for (const url of this.previews.values()) URL.revokeObjectURL(url);
      this.previews.clear();
      this.stage.pictures.clear();
      this.stage.size = video;
      this.timeline.set({ frames: video.frames, fps: video.fps, annotated: status.annotated });
      this.learnCertainty();
    }
    if (!before || before.video.name !== video.name || before.video.width !== video.width) this.newVideo(video);
    if (!quiet) this.say("");
    this.get("name").textContent = video.name;
    this.get("size").textContent = `${video.width}×${video.height}, ${video.frames} frames`;
    this.get("step").textContent = status.position ? `step ${status.position}: ${status.steps[status.position]}` : "";
    this.showJob(job, before?.job);
    const last = status.position === status.steps.length - 1;
    this.get("undo").disabled = job?.running || status.position === 0;
    this.get("redo").disabled = job?.running || last;
    if (this.label !== this.next() && !objects.includes(this.label)) this.label = objects.at(-1) ?? 1;
    const taken = this.get("taken");
    if (!status.yours && !taken.open) taken.showModal();
    if (status.yours && taken.open) taken.close();
    if (video.damage && !before) this.say(video.damage, true);
    this.get("hint").hidden = objects.length > 0 || localStorage.getItem(HINT) !== null;
    this.showTools();
    if (before && changed) this.show(Math.min(this.frame, video.frames - 1));
  }

  newVideo({ width, height }) {
    this.stage.fit();
    this.brush = Math.max(2, Math.round(Math.min(width, height) / 30));
    this.get("radius").max = Math.round(Math.min(width, height) / 3);
  }

  showJob(job, before) {
    const running = Boolean(job?.running);
    for (const name of ["write", "open", "given", "one", "load"]) this.get(name).disabled = running;
    this.get("run").hidden = this.get("track").hidden = running;
    this.get("work").hidden = this.get("exporting").hidden = !running;
    if (running) {
      const text = `${job.name}: ${job.total ? `${job.done} of ${job.total} frames` : "starting"}`;
      for (const [bar, words] of [["progress", "left"], ["written", "writing"]]) {
        if (job.total) this.get(bar).value = job.done / job.total;
        else this.get(bar).removeAttribute("value");
        this.get(words).textContent = job.left === null ? text : `${text}, ${time(job.left)}`;
      }
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.server.act("status", {}, true), 300);
    } else if (before?.running) {
      this.say(job ? job.error ?? `${job.name}: done` : "", Boolean(job?.error));
      this.get("refused").textContent = job?.error ?? "";
    }
  }

  async learnCertainty() {
    const answer = await fetch(`/stm/certainty?version=${this.status.version}`).catch(() => null);
    if (!answer?.ok) return;
    const { version, frames, below } = await answer.json();
    if (version === this.status.version) this.timeline.set({ certainty: frames, below });
  }

  showTools() {
    const { objects, names, files } = this.status;
    const known = objects.includes(this.label);
    const chips = [...objects].map((label) => this.chip(label, names[label]));
    chips.push(this.chip(this.next(), objects.length ? "New object" : "First object"));
    this.get("objects").replaceChildren(...chips);
    for (const name of ["called", "color", "remove"]) this.get(name).disabled = !known;
    const called = this.get("called");
    if (document.activeElement !== called) called.value = known ? names[this.label] : "";
    called.placeholder = "name";
    this.get("color").value = this.color(this.label);
    for (const tool of DRAWING) this.press(tool, tool === this.tool);
    this.press("erase", this.erase);
    this.press("masks", this.masks);
    this.get("width").hidden = this.tool !== "brush";
    this.get("radius").value = this.brush;
    this.get("pixels").textContent = `${this.brush} px`;
    this.get("files").replaceChildren(...files.map((name) => Object.assign(document.createElement("a"), {
      href: `/stm/file/${encodeURIComponent(name)}`, textContent: name, className: "stm-button", download: "",
    })));
    this.stage.draw();
  }

  chip(label, name) {
    const button = document.createElement("button");
    const swatch = document.createElement("span");
    swatch.className = "stm-swatch";
    swatch.style.background = this.color(label);
    button.append(swatch, name);
    button.dataset.label = label;
    button.title = label <= 9 ? `${name} (${label})` : name;
    button.setAttribute("aria-pressed", label === this.label);
    button.addEventListener("click", () => this.choose(label));
    return button;
  }

  press(name, on) {
    this.get(name).setAttribute("aria-pressed", on);
  }

  show(frame) {
    const last = this.status.video.frames - 1;
    this.frame = Math.max(0, Math.min(frame, last));
    this.timeline.set({ frame: this.frame });
    const preview = this.masks ? this.previews.get(this.frame) : undefined;
    this.get("badge").textContent = preview ? "preview: run to see all frames" : "";
    const scribbles = this.masks ? this.status.scribbles[this.frame] ?? [] : [];
    this.stage.drawn = scribbles.map(({ path, object_id }) => ({ path, color: this.color(object_id) }));
    this.stage.draw();
    this.stage.show(preview ?? this.address(this.frame), this.frame).then(() => {
      for (const near of [this.frame + 1, this.frame - 1]) {
        if (near >= 0 && near <= last) this.stage.fetched(this.address(near));
      }
    });
  }

  address(frame) {
    return `/stm/frame/${frame}?masks=${this.masks}&version=${this.status.version}`;
  }

  // one at a time: the next one shows what was drawn meanwhile
  async preview() {
    if (this.previewing || !this.status.objects.length) return;
    const frame = this.frame, version = this.status.version;
    this.previewing = true;
    this.get("badge").textContent = "preview …";
    try {
      const response = await this.server.ask("/stm/preview", JSON.stringify({ frame }));
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

  color(label) {
    return label ? this.status.colors[label] : "#ffffff";
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
    if (this.status.objects.includes(label) || label === this.next()) this.label = label;
    this.showTools();
  }

  use(tool) {
    this.tool = tool;
    this.showTools();
  }

  flip(what) {
    this[what] = !this[what];
    this.showTools();
    this.show(this.frame);
  }

  resize(brush) {
    this.brush = Math.max(1, Math.min(brush, Number(this.get("radius").max)));
    this.use("brush");
  }

  // `other`: with the right mouse button
  pen(other = false) {
    const { tool, label, frame, brush } = this;
    const erase = other || this.erase;
    return { tool, label, frame, brush, erase, color: this.status ? this.color(label) : "#ffffff" };
  }

  // whether a stroke may begin
  begin() {
    if (!this.status?.yours || this.status.job?.running) return false;
    this.timeline.pause();
    this.understood();
    return true;
  }

  async send({ tool, label, frame, brush, erase, path }) {
    if (tool === "pen") {
      // what is not the object is drawn as background
      const done = await this.act("scribble", { frame, object: erase ? 0 : label, path });
      if (done && frame === this.frame) this.preview();
    } else if (tool === "brush" || path.length > 2) {
      await this.act("paint", { frame, object: label, path, brush: tool === "brush" ? brush : 0, erase });
    }
  }

  understood() {
    localStorage.setItem(HINT, "yes");
    this.get("hint").hidden = true;
  }

  look() {
    const { label } = this;
    const name = this.get("called").value.trim() || `object ${label}`;
    const color = this.get("color").value;
    if (name !== this.status.names[label] || color !== this.color(label)) {
      this.act("describe", { object: label, name, color }).then(() => this.showTools());
    }
  }

  async upload(kind, input, more) {
    const [file] = input.files;
    input.value = "";
    this.get("file").open = false;
    if (!file) return;
    this.say(`loading ${file.name} …`);
    try {
      this.update(await this.server.upload(kind, file, more));
      this.say(`${file.name} is loaded`);
      this.show(this.frame);
    } catch (error) {
      this.say(error.message, true);
    }
  }

  async export() {
    const formats = [...this.get("formats").querySelectorAll(":checked")].map((box) => box.value);
    this.get("refused").textContent = "";
    if (!(await this.act("export", { formats }))) this.get("refused").textContent = this.get("message").textContent;
  }

  track() {
    return this.act("track", { frame: this.frame, direction: "both" });
  }

  key(event) {
    const { target } = event, key = event.key.toLowerCase();
    if (this.root.querySelector("dialog[open]")) {
      if (key === "escape" && this.get("taken").open) event.preventDefault();
      return undefined;
    }
    if (event.ctrlKey && key === "z") return event.shiftKey ? this.act("redo") : this.act("undo");
    if (event.ctrlKey || event.metaKey || event.altKey) return undefined;
    // what is typed, and what presses the control that has the focus
    if (target.matches("input[type=text]")) return key === "enter" && target.blur();
    if (target.matches("button, summary, a, input[type=file], input[type=color]") && [" ", "enter"].includes(key)) return undefined;
    if (target === this.get("radius") && /^arrow|^home|^end/.test(key)) return undefined;
    const far = event.shiftKey ? 10 : 1;
    const pan = (right, down) => () => this.stage.move(right * PANNED, down * PANNED);
    const keys = {
      " ": () => this.timeline.toggle(),
      arrowleft: () => this.show(this.frame - far),
      arrowright: () => this.show(this.frame + far),
      home: () => this.show(0),
      end: () => this.show(this.status.video.frames - 1),
      p: () => this.timeline.next(this.status.annotated),
      u: () => this.timeline.next(this.timeline.uncertain()),
      n: () => this.choose(this.next()),
      delete: () => this.status.objects.includes(this.label) && this.act("remove", { object: this.label }),
      s: () => this.use("pen"),
      d: () => this.use("brush"),
      f: () => this.use("outline"),
      e: () => this.flip("erase"),
      "[": () => this.resize(Math.floor(this.brush / 1.25)),
      "]": () => this.resize(Math.ceil(this.brush * 1.25)),
      "+": () => this.stage.zoom(1.5),
      "=": () => this.stage.zoom(1.5),
      "-": () => this.stage.zoom(1 / 1.5),
      0: () => this.stage.fit(),
      i: pan(0, 1), k: pan(0, -1), j: pan(1, 0), l: pan(-1, 0),
      z: () => this.act("undo"),
      y: () => this.act("redo"),
      r: () => this.act("run"),
      t: () => this.track(),
      o: () => this.flip("masks"),
      x: () => this.get("export").showModal(),
      h: () => this.get("keys").showModal(),
      escape: () => this.status.job?.running && this.act("stop"),
    };
    for (let label = 1; label <= 9; label += 1) keys[label] = () => this.choose(label);
    const action = keys[key];
    if (!action) return undefined;
    event.preventDefault();
    return action();
  }

  listen() {
    const on = (kind, actions) => {
      for (const [name, action] of Object.entries(actions)) this.get(name).addEventListener(kind, action);
    };
    on("click", {
      ...Object.fromEntries(DRAWING.map((tool) => [tool, () => this.use(tool)])),
      ...Object.fromEntries(["undo", "redo", "run", "stop"].map((action) => [action, () => this.act(action)])),
      cancel: () => this.act("stop"),
      remove: () => this.act("remove", { object: this.label }),
      erase: () => this.flip("erase"),
      masks: () => this.flip("masks"),
      track: () => this.track(),
      back: () => this.show(this.frame - 1),
      forward: () => this.show(this.frame + 1),
      closer: () => this.stage.zoom(1.5),
      farther: () => this.stage.zoom(1 / 1.5),
      fit: () => this.stage.fit(),
      results: () => this.get("export").showModal(),
      write: () => this.export(),
      help: () => this.get("keys").showModal(),
      understood: () => this.understood(),
      save: () => { this.get("file").open = false; },
      take: () => this.act("enter", { take: true }),
    });
    on("change", {
      called: () => this.look(),
      color: () => this.look(),
      open: (event) => this.upload("video", event.target),
      load: (event) => this.upload("session", event.target),
      given: (event) => this.upload("masks", event.target, { frame: this.frame }),
      one: (event) => this.upload("masks", event.target, { frame: this.frame, label: this.label }),
    });
    this.get("radius").addEventListener("input", (event) => this.resize(Number(event.target.value)));
    this.get("taken").addEventListener("cancel", (event) => event.preventDefault());
    document.addEventListener("keydown", (event) => this.status && this.key(event));
    document.addEventListener("click", ({ target }) => {
      if (!this.get("file").contains(target)) this.get("file").open = false;
    });
  }
}

window.stmPage = new Page(document.body);
