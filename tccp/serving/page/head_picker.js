// Shows a frame of the scene with the heads that the server finds; the person picks one or draws a box.

import { byId, make, setText, show } from "./dom.js";

const SIDES = ["Left", "Top", "Right", "Bottom"];
const LEAST_PX = 8; // as the server's smallest box
const DRAG_PX = 5; // shorter moves are clicks

export class HeadPicker {
  constructor(onChange) {
    this.onChange = onChange;
    this.frame = byId("head-frame");
    this.choices = byId("head-choices");
    this.picture = make("img", { alt: "A frame of the scene", draggable: false });
    this.heads = [];
    this.box = null;
    this.drawn = make("div", { className: "drawn", tabIndex: 0, role: "group", "aria-describedby": "head-help" });
    this.drawn.append(make("span", { className: "corner" }));
    this.numbers = SIDES.map((side, i) => {
      const input = make("input", { type: "number", step: 1, id: `box-${i}`, inputMode: "numeric" });
      input.addEventListener("input", () => this.fromNumbers());
      byId("head-numbers").querySelector(".numbers").append(make("label", { for: input.id }, side, input));
      return input;
    });
    this.frame.addEventListener("pointerdown", (event) => this.press(event));
    this.frame.addEventListener("click", (event) => this.dragged && event.preventDefault(), true);
    this.drawn.addEventListener("keydown", (event) => this.key(event));
  }

  /** found: the answer of POST /v1/heads. searched: whether the server has looked for heads. */
  open({ width, height, frame, heads }, searched = true) {
    Object.assign(this, { width, height, heads: heads.map((head) => head.box), box: null, searched });
    this.picture.src = frame;
    this.frame.style.aspectRatio = `${width} / ${height}`;
    this.frame.style.maxWidth = `min(100%, calc(60vh * ${width / height}))`;
    this.marks = this.heads.map((box, i) => {
      const mark = make("label", { className: "mark", for: `head-${i}` }, make("span", {}, `${i + 1}`));
      this.place(mark, box);
      return mark;
    });
    this.frame.replaceChildren(this.picture, ...this.marks, this.drawn);
    const one = this.heads.length === 1;
    const radios = this.heads.map((_, i) => this.radio(`${i}`, `head-${i}`, one ? "The head that was found" : `Head ${i + 1}`));
    if (!searched) radios.push(this.radio("auto", "head-auto", "The server finds it when it makes the film"));
    radios.push(this.radio("draw", "head-draw", "Draw a box"));
    this.choices.replaceChildren(...radios);
    this.choose(one ? "0" : searched ? null : "auto");
  }

  radio(value, id, text) {
    const input = make("input", { type: "radio", name: "head", value, id });
    input.addEventListener("change", () => this.choose(value));
    return make("label", { className: "check" }, input, ` ${text}`);
  }

  /** choice: number of a head, "draw", or null for none yet. */
  choose(choice) {
    this.choice = choice;
    for (const input of this.choices.querySelectorAll("input")) input.checked = input.value === choice;
    this.marks.forEach((mark, i) => mark.classList.toggle("picked", choice === `${i}`));
    const draws = choice === "draw";
    this.frame.classList.toggle("draws", draws);
    show(byId("head-numbers"), draws);
    show(this.drawn, draws);
    if (draws && !this.box) this.setBox(this.firstBox());
    this.onChange();
  }

  /** Options of the API: none where one head is found, since the server then needs no help; null if one must choose. */
  get options() {
    if (this.choice === null) return null;
    if (this.choice === "draw") return { box: this.box.join(",") };
    if (this.choice === "auto" || this.heads.length === 1) return {};
    const [x0, y0, x1, y1] = this.heads[Number(this.choice)];
    return { person: [(x0 + x1) / 2, (y0 + y1) / 2] };
  }

  firstBox() {
    if (this.heads.length) return this.heads[0];
    const side = Math.min(this.width, this.height) / 2;
    const [x, y] = [(this.width - side) / 2, (this.height - side) / 3];
    return [x, y, x + side, y + side];
  }

  setBox(box, fromNumbers = false) {
    const most = [this.width, this.height, this.width, this.height];
    this.box = box.map((value, i) => Math.round(Math.min(most[i], Math.max(0, value))));
    this.place(this.drawn, this.box);
    const [x0, y0, x1, y1] = this.box;
    const label = `Box from ${x0}, ${y0} to ${x1}, ${y1}; arrow keys move it, Shift and arrow keys change its size`;
    this.drawn.setAttribute("aria-label", label);
    this.numbers.forEach((input, i) => {
      Object.assign(input, { min: 0, max: most[i] });
      if (!fromNumbers) input.value = this.box[i];
    });
    this.onChange();
  }

  fromNumbers() {
    const given = this.numbers.map((input) => (input.value === "" ? NaN : Number(input.value)));
    const [x0, y0, x1, y1] = given;
    if (x1 - x0 >= LEAST_PX && y1 - y0 >= LEAST_PX) this.setBox(given, true);
  }

  place(element, [x0, y0, x1, y1]) {
    const percent = (value, whole) => `${(100 * value) / whole}%`;
    element.style.left = percent(x0, this.width);
    element.style.top = percent(y0, this.height);
    element.style.width = percent(x1 - x0, this.width);
    element.style.height = percent(y1 - y0, this.height);
  }

  /** The place of a pointer in pixels of the scene. */
  at(event) {
    const area = this.frame.getBoundingClientRect();
    const x = ((event.clientX - area.left) / area.width) * this.width;
    const y = ((event.clientY - area.top) / area.height) * this.height;
    return [Math.min(this.width, Math.max(0, x)), Math.min(this.height, Math.max(0, y))];
  }

  /** A drag draws a new box; within the drawn box it moves it, at its corner it changes its size. */
  press(event) {
    this.dragged = false;
    const draws = this.choice === "draw";
    // A finger on the frame scrolls the page until the person says that it draws.
    if (event.button !== 0 || (event.pointerType === "touch" && !draws)) return;
    event.preventDefault();
    const [x, y] = this.at(event);
    const before = this.box;
    let change;
    if (draws && event.target.classList.contains("corner")) {
      change = ([u, v]) => [before[0], before[1], Math.max(before[0] + LEAST_PX, u), Math.max(before[1] + LEAST_PX, v)];
    } else if (draws && event.target === this.drawn) {
      change = ([u, v]) => this.moved(before, u - x, v - y);
    } else {
      change = ([u, v]) => [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)];
    }
    const [startX, startY] = [event.clientX, event.clientY];
    const move = (moved) => {
      if (!this.dragged && Math.hypot(moved.clientX - startX, moved.clientY - startY) < DRAG_PX) return;
      if (!this.dragged && !draws) this.choose("draw");
      this.dragged = true;
      this.setBox(change(this.at(moved)));
    };
    const done = () => {
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", done);
      window.removeEventListener("pointercancel", done);
      if (!this.dragged) return;
      const [x0, y0, x1, y1] = this.box;
      if (x1 - x0 < LEAST_PX || y1 - y0 < LEAST_PX) this.setBox(before ?? this.firstBox());
      this.drawn.focus({ preventScroll: true });
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", done);
    window.addEventListener("pointercancel", done);
  }

  moved([x0, y0, x1, y1], right, down) {
    const dx = Math.min(this.width - x1, Math.max(-x0, right));
    const dy = Math.min(this.height - y1, Math.max(-y0, down));
    return [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = steps[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const unit = Math.max(1, Math.round(Math.max(this.width, this.height) / 100));
    const [dx, dy] = step.map((part) => part * unit);
    if (!event.shiftKey) return this.setBox(this.moved(this.box, dx, dy));
    const [x0, y0, x1, y1] = this.box;
    this.setBox([x0, y0, Math.max(x0 + LEAST_PX, x1 + dx), Math.max(y0 + LEAST_PX, y1 + dy)]);
  }

  /** What a line above the picture says. */
  get summary() {
    if (!this.searched) return "The server could not look for heads now. It does so when it makes the film, or you draw a box.";
    if (this.heads.length === 1) return "One head is found. If it is the wrong place, draw a box on the picture.";
    if (this.heads.length > 1) return `${this.heads.length} heads are found. Pick the one to replace, or draw a box.`;
    return "No head is found in this frame. Draw a box around the head to replace.";
  }

  say(text) {
    setText(byId("head-status"), text);
  }
}
