// The film beside its scene, or wiped against it, in step. The sound is the film's.
// The scene is the file that was chosen in this tab; after a reload, it can be chosen again.

import { byId, make, setText, show } from "./dom.js";

const FRAME_S = 1 / 25;
const IN_STEP_S = 0.02; // closer than a frame; further apart, the scene plays a little faster or slower
const MOST_APART_S = 0.2; // further apart, it jumps
const MODES = { beside: "Side by side", wipe: "Wipe", film: "Film only" };

/** The moment of the scene that is shown at a moment of the film; the scene may be shorter than the film. */
export function sceneTime(time, duration, extend) {
  const last = Math.max(0, duration - FRAME_S);
  if (time <= last) return time;
  if (extend !== "pingpong" || duration <= FRAME_S) return last;
  const phase = time % (2 * duration);
  return phase < duration ? Math.min(phase, last) : Math.max(0, 2 * duration - phase - FRAME_S);
}

export class Player {
  /** film: its address. scene: a file, or null. extend: promise of what was done where the scene is too short. */
  constructor(place, { film, scene, extend, title }) {
    extend.then((value) => (this.extend = value), () => null);
    this.film = make("video", { src: film, playsInline: true, preload: "auto", "aria-label": title });
    this.scene = make("video", { playsInline: true, preload: "auto", muted: true, "aria-label": "The scene before" });
    this.pictures = make(
      "div",
      { className: "pictures" },
      make("figure", { className: "before" }, this.scene, make("figcaption", {}, "Before")),
      make("figure", { className: "after" }, this.film, make("figcaption", {}, "After: AI-generated")),
      make("div", { className: "seam", "aria-hidden": "true" }),
    );
    this.play = make("button", { type: "button", className: "play" }, "Play");
    this.back = make("button", { type: "button", "aria-label": "One frame back", title: "One frame back" }, "‹");
    this.next = make("button", { type: "button", "aria-label": "One frame on", title: "One frame on" }, "›");
    this.seek = make("input", { type: "range", min: 0, max: 1, step: FRAME_S, value: 0, "aria-label": "Time" });
    this.clock = make("span", { className: "clock" });
    this.mute = make("button", { type: "button" }, "Mute");
    this.wipe = make("input", { type: "range", min: 0, max: 100, value: 50, className: "wipe" });
    this.wipe.setAttribute("aria-label", "Place of the seam between before and after");
    this.modes = make("div", { className: "modes", role: "group", "aria-label": "Show" });
    for (const [mode, text] of Object.entries(MODES)) {
      const button = make("button", { type: "button", value: mode }, text);
      button.addEventListener("click", () => this.setMode(mode));
      this.modes.append(button);
    }
    this.problem = make("p", { className: "notice", hidden: true, role: "status" });
    const again = make("input", { type: "file", accept: "video/*,.mkv,.mov,.avi,.ts", id: "scene-again" });
    again.addEventListener("change", () => again.files.length && this.showScene(again.files[0]));
    this.again = make("div", { className: "field" },
      make("label", { for: "scene-again" }, "To compare it with the scene, choose the scene here"), again);
    place.replaceChildren(
      this.problem,
      this.pictures,
      this.wipe,
      make("div", { className: "controls" }, this.play, this.back, this.next, this.seek, this.clock, this.mute),
      this.modes,
      this.again,
    );
    this.listen();
    this.setWipe();
    this.showScene(scene);
  }

  showScene(file) {
    if (this.address) URL.revokeObjectURL(this.address);
    this.address = file ? URL.createObjectURL(file) : null;
    show(this.problem, false);
    show(this.again, !file);
    show(this.modes, Boolean(file));
    if (file) this.scene.src = this.address;
    this.setMode(file ? "beside" : "film");
  }

  listen() {
    const { film, scene } = this;
    this.play.addEventListener("click", () => (film.paused ? film.play().catch(() => null) : film.pause()));
    this.pictures.addEventListener("click", () => this.play.click());
    this.back.addEventListener("click", () => this.step(-1));
    this.next.addEventListener("click", () => this.step(1));
    this.mute.addEventListener("click", () => (film.muted = !film.muted));
    this.wipe.addEventListener("input", () => this.setWipe());
    this.seek.addEventListener("input", () => {
      film.currentTime = Number(this.seek.value);
      this.follow();
    });
    for (const name of ["play", "pause", "ended", "seeked", "timeupdate", "loadedmetadata", "volumechange"]) {
      film.addEventListener(name, () => this.follow());
    }
    scene.addEventListener("loadeddata", () => this.follow());
    scene.addEventListener("error", () => {
      if (!this.address) return;
      this.showScene(null);
      this.say("This browser cannot show the scene; the film it can.");
    });
    film.addEventListener("error", () => {
      show(this.pictures, false);
      this.say("This browser cannot play the film. Download it and open it in another player.");
    });
    const frame = () => {
      if (!film.isConnected) return;
      this.follow();
      if (!film.paused) requestAnimationFrame(frame);
    };
    film.addEventListener("play", () => requestAnimationFrame(frame));
  }

  say(text) {
    setText(this.problem, text);
    show(this.problem);
  }

  setMode(mode) {
    this.mode = mode;
    this.pictures.dataset.mode = mode;
    show(this.wipe, mode === "wipe");
    for (const button of this.modes.children) button.setAttribute("aria-pressed", String(button.value === mode));
    this.follow();
  }

  setWipe() {
    this.pictures.style.setProperty("--seam", `${this.wipe.value}%`);
    this.wipe.setAttribute("aria-valuetext", `${this.wipe.value} percent before`);
  }

  step(frames) {
    this.film.pause();
    const end = this.film.duration || 0;
    this.film.currentTime = Math.min(end, Math.max(0, this.film.currentTime + frames * FRAME_S));
    this.follow();
  }

  /** Brings the scene and the controls to where the film is. */
  follow() {
    const { film, scene } = this;
    const length = film.duration || 0;
    this.seek.max = length || 1;
    this.seek.value = film.currentTime;
    this.seek.setAttribute("aria-valuetext", `${film.currentTime.toFixed(1)} of ${length.toFixed(1)} seconds`);
    setText(this.clock, `${film.currentTime.toFixed(1)} / ${length.toFixed(1)} s`);
    setText(this.play, film.paused ? "Play" : "Pause");
    setText(this.mute, film.muted ? "Sound on" : "Mute");
    if (this.mode === "film" || scene.readyState < 1) return void scene.pause();
    const wanted = sceneTime(film.currentTime, scene.duration, this.extend);
    const inStep = !film.paused && wanted === film.currentTime;
    const apart = wanted - scene.currentTime;
    if (Math.abs(apart) > (inStep ? MOST_APART_S : FRAME_S / 4) && !scene.seeking) scene.currentTime = wanted;
    scene.playbackRate = inStep && Math.abs(apart) > IN_STEP_S ? (apart > 0 ? 1.25 : 0.8) : 1;
    if (inStep && scene.paused) scene.play().catch(() => null);
    if (!inStep && !scene.paused) scene.pause();
  }

  close() {
    if (this.address) URL.revokeObjectURL(this.address);
    this.address = null;
    for (const one of [this.film, this.scene]) {
      one.pause();
      one.removeAttribute("src");
      one.load();
    }
    byId("film-player").replaceChildren();
  }
}
