// The time line: where was drawn, where masks are uncertain; playing.

const THUMB = 8;
const AHEAD = 4;

export class Timeline {
  // `show` a frame; `ready` resolves when the picture of a frame can be shown
  constructor(get, { show, ready }) {
    Object.assign(this, { show, ready, frame: 0, frames: 1, annotated: [], certainty: [], below: 0, playing: false });
    [this.slider, this.marks, this.button, this.position, this.doubt] = ["frame", "marks", "play", "position", "doubt"].map(get);
    this.slider.addEventListener("input", () => show(Number(this.slider.value)));
    this.button.addEventListener("click", () => this.toggle());
    this.doubt.addEventListener("click", () => this.next(this.uncertain()));
    new ResizeObserver(() => this.draw()).observe(this.marks);
  }

  set(values) {
    Object.assign(this, values);
    this.slider.max = this.frames - 1;
    this.slider.value = this.frame;
    this.position.textContent = `${this.frame} / ${this.frames - 1}`;
    const doubtful = this.certainty.filter((value) => this.isLow(value)).length;
    this.doubt.hidden = !doubtful;
    this.doubt.textContent = `${doubtful} uncertain ›`;
    this.slider.setAttribute("aria-valuetext", `frame ${this.frame}${this.isLow(this.certainty[this.frame]) ? ", uncertain" : ""}`);
    this.draw();
  }

  isLow(value) {
    return value != null && value < this.below;
  }

  // the worst frame of each run of uncertain frames
  uncertain() {
    const worst = [];
    this.certainty.forEach((value, frame) => {
      if (!this.isLow(value)) return;
      if (!this.isLow(this.certainty[frame - 1])) worst.push(frame);
      else if (value < this.certainty[worst.at(-1)]) worst[worst.length - 1] = frame;
    });
    return worst;
  }

  next(frames) {
    const after = frames.find((frame) => frame > this.frame) ?? frames[0];
    if (after !== undefined) this.show(after);
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.marks;
    const ratio = window.devicePixelRatio || 1;
    this.marks.width = width * ratio;
    this.marks.height = height * ratio;
    const context = this.marks.getContext("2d");
    context.scale(ratio, ratio);
    // the slider's thumb stops half its width from the ends
    const step = (width - 2 * THUMB) / Math.max(1, this.frames - 1);
    const color = (name) => getComputedStyle(this.marks).getPropertyValue(name);
    const [sure, unsure, mark] = ["--sure", "--unsure", "--accent"].map(color);
    const bar = (frame, fill, top, bottom, least) => {
      const thick = Math.max(least, step);
      context.fillStyle = fill;
      context.fillRect(THUMB + frame * step - thick / 2, top, thick + 0.5, bottom - top);
    };
    this.certainty.forEach((value, frame) => value != null && bar(frame, sure, height - 6, height, 1));
    // the less certain, the higher
    this.certainty.forEach((value, frame) => {
      if (this.isLow(value)) bar(frame, unsure, 8 + (height - 18) * Math.max(0, (2 * value) / this.below - 1), height, 2);
    });
    for (const frame of this.annotated) {
      context.fillStyle = mark;
      context.beginPath();
      context.arc(THUMB + frame * step, 4, 3.5, 0, 2 * Math.PI);
      context.fill();
    }
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  pause() {
    this.playing = false;
    this.button.textContent = "Play";
  }

  // in step with the video, or slower where pictures come later; none is left out
  async play() {
    // paused and played again while a picture is awaited, the loop that waits ends
    const run = (this.playing = {});
    this.button.textContent = "Pause";
    if (this.frame === this.frames - 1) this.show(0);
    while (this.playing === run && this.frame < this.frames - 1) {
      const due = performance.now() + 1000 / this.fps;
      for (let ahead = AHEAD; ahead > 1; ahead -= 1) this.ready(Math.min(this.frame + ahead, this.frames - 1));
      await this.ready(this.frame + 1);
      await new Promise((resolve) => setTimeout(resolve, due - performance.now()));
      if (this.playing === run) this.show(this.frame + 1);
    }
    if (this.playing === run) this.pause();
  }
}
