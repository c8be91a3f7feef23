// One film: its progress with frames as they are made, then the player, downloads, and re-making it.

import { ApiError, call, contentOf, follow, hasEnded, newKey, previewOf, video as fetchVideo } from "./api.js";
import { byId, bytesText, durationText, fieldError, make, notice, placeError, setText, show, timeText } from "./dom.js";
import { FileField, missing } from "./file_field.js";
import { cancelOrDelete, STATUS, titleOf } from "./film_list.js";
import { Player } from "./player.js";

const FRAMES_SHOWN = 12;
const STAGES = {
  preparing: "The server finds the head in the scene",
  generating: "The head is being generated",
  finishing: "The film is being written",
};
const FILES = {
  "film.mp4": ["film", "Film"],
  "landmarks.jsonl": ["landmarks", "Landmarks"],
  "report.json": ["report", "Report"],
};

export class FilmView {
  /** onGone is called with a line when the film is deleted or unknown; onMade with the video of a remix. */
  constructor(onGone, onMade) {
    this.onGone = onGone;
    this.onMade = onMade;
    this.scenes = new Map(); // scenes that were chosen in this tab, by video id
    this.remixField = new FileField(byId("remix-field"), {
      role: "landmarks",
      title: "Edited landmarks",
      hint: "A .jsonl file with a line for each frame.",
      choose: "Choose a file",
      accept: ".jsonl,.json,.txt",
    });
    byId("remix").addEventListener("submit", (event) => (event.preventDefault(), this.remix()));
    byId("film-delete").addEventListener("click", () => this.remove());
  }

  /** Opens the film with an id. scene: its file, if it was chosen in this tab. */
  open(id, scene) {
    this.close();
    if (scene) this.scenes.set(id, scene);
    this.id = id;
    this.spoken = "";
    this.shown = 0; // frames that were asked for
    this.latest = 0; // number of the large one
    byId("film-frames").replaceChildren();
    show(byId("film-latest"), false);
    for (const part of ["film-work", "film-player", "film-files", "film-remix", "film-delete"]) show(byId(part), false);
    for (const line of ["film-problem", "film-about"]) notice(byId(line), "");
    setText(byId("film-title"), "Film");
    setText(byId("film-status"), "");
    show(byId("film-warnings"), false);
    const onConnection = (text) => notice(byId("film-connection"), text);
    this.stop = follow(id, (object) => this.draw(object), onConnection, (error) => this.onGone(error.message));
  }

  close() {
    this.stop?.();
    this.player?.close();
    Object.assign(this, { stop: null, player: null, video: null, id: null });
    if (this.remixField.file) this.remixField.clear();
  }

  draw(object) {
    if (object.id !== this.id) return;
    const first = this.video === null;
    this.video = object;
    setText(byId("film-title"), titleOf(object));
    const status = byId("film-status");
    status.dataset.status = object.status;
    setText(status, STATUS[object.status] ?? object.status);
    const about = [
      object.prompt ? timeText(object.created_at) : null,
      object.seconds ? `${Number(object.seconds)} s` : null,
      object.size?.replace("x", " × "),
      `seed ${object.seed}`,
      `consent: ${object.consent}`,
      object.remixed_from_video_id ? "made from edited landmarks" : null,
    ];
    notice(byId("film-about"), about.filter(Boolean).join(" · "));
    notice(byId("film-problem"), object.error?.message);
    show(byId("film-warnings"), object.warnings.length > 0);
    byId("film-warnings").replaceChildren(...object.warnings.map((text) => make("li", {}, text)));
    const ended = hasEnded(object);
    setText(byId("film-delete"), ended ? "Delete this film" : "Cancel this film");
    show(byId("film-delete"));
    show(byId("film-work"), !ended);
    document.title = ended ? `${titleOf(object)} – TCCP` : `${object.progress} % – TCCP`;
    if (!ended) this.drawProgress(object);
    else this.drawEnded(object, first);
  }

  drawProgress(object) {
    const bar = byId("film-progress");
    if (object.status === "queued") bar.removeAttribute("value");
    else bar.value = object.progress;
    const stage = this.stageText(object);
    const eta = object.eta_s == null ? "" : `, about ${durationText(object.eta_s)} left`;
    setText(byId("film-stage"), object.status === "queued" ? `${stage}${eta}` : `${object.progress} %: ${stage}${eta}`);
    // Screen readers hear a new stage or place in the queue, and each tenth.
    const spoken = object.status === "queued" ? stage : `${stage}, ${Math.floor(object.progress / 10) * 10} percent`;
    setText(byId("film-spoken"), spoken);
    this.drawFrames(object);
  }

  stageText(object) {
    if (object.status === "queued") {
      const position = object.queue_position;
      if (position == null) return "Waiting for its turn";
      return position <= 1 ? "Next in the queue" : `Number ${position} in the queue`;
    }
    const stage = STAGES[object.stage] ?? "The server begins";
    return object.stage === "generating" ? `${stage}, part ${object.windows_done} of ${object.windows}` : stage;
  }

  drawFrames(object) {
    const frames = byId("film-frames");
    const latest = byId("film-latest");
    const from = Math.max(this.shown, object.previews - FRAMES_SHOWN);
    for (let number = from; number < object.previews; number++) {
      const picture = make("img", { alt: `Frame ${number + 1} of those made`, width: 96 });
      const item = make("li", {}, picture);
      picture.onload = () => {
        if (this.id !== object.id || number < this.latest) return;
        this.latest = number;
        latest.src = picture.src;
        show(latest);
      };
      picture.onerror = () => item.remove();
      picture.src = previewOf(object.id, number);
      frames.append(item);
    }
    this.shown = Math.max(this.shown, object.previews);
    while (frames.children.length > FRAMES_SHOWN) frames.firstElementChild.remove();
  }

  drawEnded(object, first) {
    setText(byId("film-spoken"), "");
    if (object.status === "completed") {
      this.drawPlayer(object);
      this.drawFiles(object);
      if (!first) byId("film-title").focus(); // the person has waited for this
    } else if (object.status === "expired") {
      notice(byId("film-problem"), "The film is expired: the server has removed its files.");
    }
  }

  drawPlayer(object) {
    if (this.player) return;
    const place = byId("film-player");
    show(place);
    this.player = new Player(place, {
      film: contentOf(object.id, "film"),
      scene: this.scenes.get(object.id) ?? null,
      extend: call("GET", contentOf(object.id, "report")).then((report) => report.spec.extend),
      title: `${titleOf(object)}, AI-generated`,
    });
  }

  drawFiles(object) {
    const links = Object.entries(FILES).filter(([name]) => name in object.files);
    byId("film-downloads").replaceChildren(
      ...links.map(([name, [variant, text]]) => {
        const link = make("a", { href: contentOf(object.id, variant), className: "button" }, `${text}`);
        link.setAttribute("download", `${object.id}.${name}`);
        return make("li", {}, link, make("span", { className: "hint" }, `${name}, ${bytesText(object.files[name].bytes)}`));
      }),
    );
    show(byId("film-files"), links.length > 0);
    setText(byId("film-expires"), `The film is AI-generated and marked as such. The server keeps it until ${timeText(object.expires_at)}.`);
    const landmarks = "landmarks.jsonl" in object.files;
    show(byId("film-remix"), landmarks);
    byId("remix-landmarks").href = contentOf(object.id, "landmarks");
    byId("remix-landmarks").setAttribute("download", `${object.id}.landmarks.jsonl`);
  }

  async remix() {
    const form = byId("remix");
    const line = byId("remix-error");
    const state = byId("remix-state");
    if (this.remixing) return;
    this.remixing = true;
    notice(line, "");
    fieldError(this.remixField.field, "");
    try {
      if (!this.remixField.file) throw missing(this.remixField, "Choose the edited landmarks.");
      setText(state, "The film is being started …");
      const landmarks = await this.remixField.uploaded();
      if (this.remixKey?.landmarks !== landmarks) this.remixKey = { landmarks, value: newKey() };
      const headers = { "Idempotency-Key": this.remixKey.value };
      const made = await call("POST", `v1/videos/${this.id}/remix`, { json: { landmarks }, headers });
      this.remixField.kept = true;
      this.onMade(made, this.scenes.get(this.id));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      placeError(form, error, line);
    } finally {
      this.remixing = false;
      setText(state, "");
    }
  }

  async remove() {
    const { video } = this;
    try {
      const answer = await cancelOrDelete(video);
      if (!answer) return;
      if (hasEnded(video)) this.onGone("");
      else this.draw(await fetchVideo(video.id));
    } catch (error) {
      notice(byId("film-problem"), error.message);
    }
  }
}
