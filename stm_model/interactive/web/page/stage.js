// The frame: its picture, zoomed and moved, and what is drawn on it.

const KEPT_PICTURES = 60;
const MAX_ZOOM = 16;

export class Stage {
  // `on.stroke` gets a finished stroke; `on.begin` says whether one may begin; `on.pen` is the tool and its color
  constructor(get, on) {
    this.on = on;
    [this.stage, this.picture, this.canvas] = ["stage", "picture", "canvas"].map(get);
    this.size = { width: 1, height: 1 };
    this.view = { zoom: 1, x: 0.5, y: 0.5 };
    this.pictures = new Map();
    this.pointers = new Map();
    this.stroke = null;
    this.sending = new Set();
    this.drawn = [];
    this.hover = null;
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  // ---- the picture

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

  // shows a picture once it is here, unless another one is wanted by then
  show(address, frame) {
    this.wanted = address;
    const put = () => {
      if (this.wanted !== address) return;
      this.picture.src = address;
      this.picture.dataset.frame = frame;
    };
    return this.fetched(address).decode().then(put, put);
  }

  // where the frame lies within the stage, in CSS pixels
  box() {
    const stage = this.stage.getBoundingClientRect();
    const fit = Math.min(stage.width / this.size.width, stage.height / this.size.height);
    const scale = fit * this.view.zoom;
    const place = (room, length, middle) => {
      if (length <= room) return (room - length) / 2;
      return Math.max(room - length, Math.min(0, room / 2 - middle * length));
    };
    const width = this.size.width * scale, height = this.size.height * scale;
    return { left: place(stage.width, width, this.view.x), top: place(stage.height, height, this.view.y), width, height, scale };
  }

  // keeps the point of the stage in its place
  zoom(factor, point) {
    const { width, height } = this.stage.getBoundingClientRect();
    const [x, y] = point ?? [width / 2, height / 2];
    const before = this.box();
    this.view.zoom = Math.max(1, Math.min(MAX_ZOOM, this.view.zoom * factor));
    const { scale } = this.box();
    const at = [(x - before.left) / before.scale, (y - before.top) / before.scale];
    this.view.x = (at[0] + (width / 2 - x) / scale) / this.size.width;
    this.view.y = (at[1] + (height / 2 - y) / scale) / this.size.height;
    this.settle();
  }

  // by CSS pixels
  move(right, down) {
    const box = this.box();
    this.view.x -= right / box.width;
    this.view.y -= down / box.height;
    this.settle();
  }

  // what lies beyond an edge is not kept: moving back answers at once
  settle() {
    const { width, height } = this.stage.getBoundingClientRect();
    const box = this.box();
    this.view.x = (width / 2 - box.left) / box.width;
    this.view.y = (height / 2 - box.top) / box.height;
    this.draw();
  }

  fit() {
    this.view = { zoom: 1, x: 0.5, y: 0.5 };
    this.draw();
  }

  // ---- what is drawn

  draw() {
    const { width, height } = this.stage.getBoundingClientRect();
    const box = this.box();
    for (const side of ["left", "top", "width", "height"]) this.picture.style[side] = `${box[side]}px`;
    this.picture.classList.toggle("stm-pixels", box.scale > 4);
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.lineCap = context.lineJoin = "round";
    for (const { path, color } of this.drawn) this.line(context, box, { path, color, tool: "pen" });
    for (const stroke of this.sending) if (stroke.frame === this.on.frame()) this.line(context, box, stroke);
    if (this.stroke) this.line(context, box, this.stroke);
    const { tool, brush } = this.on.pen();
    if (tool !== "brush" || !this.hover) return;
    context.beginPath();
    context.arc(...this.hover, Math.max(1, (brush * box.scale) / 2), 0, 2 * Math.PI);
    for (const [lineWidth, strokeStyle] of [[3, "#000a"], [1.5, "#fff"]]) {
      Object.assign(context, { lineWidth, strokeStyle });
      context.stroke();
    }
  }

  line(context, box, { path, color, tool, brush, erase }) {
    context.beginPath();
    for (const [x, y] of path) context.lineTo(box.left + x * box.width, box.top + y * box.height);
    if (path.length === 1) context.lineTo(box.left + path[0][0] * box.width + 0.1, box.top + path[0][1] * box.height);
    if (tool === "brush") {
      Object.assign(context, { lineWidth: Math.max(1, brush * box.scale), strokeStyle: `${erase ? "#ffffff" : color}a0` });
      context.stroke();
      return;
    }
    if (tool === "outline") context.closePath();
    // a dark edge keeps every color visible on every picture
    for (const [lineWidth, strokeStyle] of [[6, "#000a"], [3.5, erase ? "#ffffff" : color]]) {
      Object.assign(context, { lineWidth, strokeStyle });
      context.stroke();
    }
  }

  // ---- pointers: one draws, two or the middle button zoom and move

  at(event) {
    const { left, top } = this.stage.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  inFrame([x, y]) {
    const box = this.box();
    const inside = (value) => Math.max(0, Math.min(1, value));
    return [inside((x - box.left) / box.width), inside((y - box.top) / box.height)];
  }

  begin(event) {
    this.pointers.set(event.pointerId, this.at(event));
    this.canvas.setPointerCapture(event.pointerId);
    if (this.pointers.size > 1 || event.button === 1) this.stroke = null;
    else if (this.on.begin()) this.stroke = { ...this.on.pen(event.button === 2), path: [this.inFrame(this.at(event))] };
    this.draw();
  }

  extend(event) {
    this.hover = event.pointerType === "touch" ? null : this.at(event);
    const before = this.pointers.get(event.pointerId), now = this.at(event);
    if (this.stroke) {
      const box = this.box();
      for (const part of event.getCoalescedEvents?.() ?? [event]) {
        const [x, y] = this.inFrame(this.at(part));
        const [lastX, lastY] = this.stroke.path.at(-1);
        if (Math.hypot((x - lastX) * box.width, (y - lastY) * box.height) >= 2) this.stroke.path.push([x, y]);
      }
    } else if (before) {
      const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
      this.pointers.set(event.pointerId, now);
      if (other) {
        const apart = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
        this.zoom(apart(now) / apart(before), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
      }
      const share = other ? 0.5 : 1;
      this.move((now[0] - before[0]) * share, (now[1] - before[1]) * share);
    }
    this.draw();
  }

  async end(event) {
    this.pointers.delete(event.pointerId);
    const stroke = this.stroke;
    this.stroke = null;
    if (!stroke || event.type === "pointercancel") return this.draw();
    this.sending.add(stroke);
    await this.on.stroke(stroke);
    this.sending.delete(stroke);
    return this.draw();
  }

  listen() {
    const on = (name, action, options) => this.canvas.addEventListener(name, action, options);
    on("contextmenu", (event) => event.preventDefault());
    on("pointerdown", (event) => this.begin(event));
    on("pointermove", (event) => this.extend(event));
    on("pointerup", (event) => this.end(event));
    on("pointercancel", (event) => this.end(event));
    on("pointerleave", () => { this.hover = null; this.draw(); });
    on("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), this.at(event));
    }, { passive: false });
  }
}
