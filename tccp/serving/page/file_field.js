// A field that takes one file by choosing or dropping, and uploads it at once.

import { ApiError, call, upload } from "./api.js";
import { byId, bytesText, fieldError, make, setText, show } from "./dom.js";

const PREVIEWED = /^(image|video)\//;
let count = 0;

export class FileField {
  /**
   * role: as in the API. title, hint, choose: texts. accept: of the file input.
   * onChange is called when a file is chosen, uploaded or removed.
   */
  constructor(parent, { role, title, hint, choose, accept }, onChange = () => {}) {
    const field = byId("file-field").content.firstElementChild.cloneNode(true);
    const id = `file-${++count}`;
    const label = field.querySelector(".label");
    const hintLine = field.querySelector(".hint");
    this.role = role;
    this.title = title;
    this.field = field;
    this.drop = field.querySelector(".drop");
    this.input = field.querySelector("input");
    this.file = null;
    this.id = null; // of the uploaded file
    this.onChange = onChange;
    field.dataset.param = role;
    label.textContent = title;
    label.id = `${id}-label`;
    hintLine.textContent = hint;
    hintLine.id = `${id}-hint`;
    field.querySelector(".button").textContent = choose;
    const chooser = field.querySelector("label.choose");
    chooser.htmlFor = id;
    chooser.id = `${id}-choose`;
    Object.assign(this.input, { id, accept });
    this.input.setAttribute("aria-labelledby", `${label.id} ${chooser.id}`);
    this.input.setAttribute("aria-describedby", hintLine.id);
    field.querySelector(".remove").setAttribute("aria-label", `Remove: ${title}`);
    this.input.addEventListener("change", () => this.input.files.length && this.take(this.input.files[0]));
    field.querySelector(".remove").addEventListener("click", () => {
      this.clear();
      this.input.focus();
    });
    this.drop.addEventListener("dragover", (event) => (event.preventDefault(), this.drop.classList.add("over")));
    this.drop.addEventListener("dragleave", () => this.drop.classList.remove("over"));
    this.drop.addEventListener("drop", (event) => {
      this.drop.classList.remove("over");
      if (event.dataTransfer.files.length !== 1) return; // several: the page sorts them
      event.preventDefault();
      event.stopPropagation();
      this.take(event.dataTransfer.files[0]);
    });
    parent.append(field);
  }

  /** Shows and uploads a file. An earlier one is forgotten. */
  take(file) {
    this.forget();
    this.file = file;
    fieldError(this.field, "");
    this.field.querySelector(".name").textContent = file.name;
    show(this.drop.querySelector(".choose"), false);
    show(this.drop.querySelector(".chosen"));
    this.showThumb();
    this.start();
    this.onChange(this);
  }

  /** The id of the uploaded file; uploads it again if that has failed before. Null if none is chosen. */
  async uploaded() {
    if (!this.file) return null;
    if (!this.uploading) this.start();
    return this.uploading;
  }

  /** The server does not have the file any more: the next start uploads it again. */
  lost() {
    this.id = null;
    this.uploading = null;
  }

  clear() {
    this.forget();
    fieldError(this.field, "");
    this.input.value = "";
    show(this.drop.querySelector(".choose"));
    show(this.drop.querySelector(".chosen"), false);
    this.onChange(this);
  }

  forget() {
    this.stop?.abort();
    if (this.address) URL.revokeObjectURL(this.address);
    if (this.id && !this.kept) call("DELETE", `v1/files/${this.id}`).catch(() => null);
    Object.assign(this, { file: null, id: null, uploading: null, address: null, stop: null, kept: false });
  }

  start() {
    const { file } = this;
    const state = this.field.querySelector(".state");
    const bar = this.field.querySelector("progress");
    this.stop = new AbortController();
    bar.value = 0;
    bar.setAttribute("aria-label", `Upload: ${this.title}`);
    show(bar);
    setText(state, `${bytesText(file.size)}, is being uploaded`);
    const onProgress = (share) => (bar.value = share);
    this.uploading = upload(file, this.role, onProgress, this.stop.signal).then(
      (object) => {
        if (this.file !== file) return null;
        this.id = object.id;
        show(bar, false);
        setText(state, `${bytesText(file.size)}, uploaded`);
        this.onChange(this);
        return object.id;
      },
      (error) => {
        if (this.file !== file || error.name === "AbortError") return null;
        this.uploading = null;
        show(bar, false);
        setText(state, `${bytesText(file.size)}, not uploaded`);
        error.param = this.role;
        fieldError(this.field, error.message);
        throw error;
      },
    );
    this.uploading.catch(() => null); // said beside the field; `uploaded` throws it again
  }

  /** A frame of the film that is chosen, as the browser shows it; null if it cannot. */
  frame(width) {
    if (!this.file?.size) return Promise.resolve(null);
    const film = make("video", { muted: true, preload: "auto", playsInline: true, src: this.address });
    return new Promise((resolve) => {
      film.onerror = () => resolve(null);
      film.onloadeddata = () => {
        if (!film.videoWidth) return resolve(null); // sound only
        const scale = Math.min(1, width / film.videoWidth);
        const canvas = make("canvas", { width: film.videoWidth * scale, height: film.videoHeight * scale });
        canvas.getContext("2d").drawImage(film, 0, 0, canvas.width, canvas.height);
        resolve({ width: film.videoWidth, height: film.videoHeight, frame: canvas.toDataURL("image/jpeg", 0.9) });
      };
    });
  }

  async showThumb() {
    const thumb = this.field.querySelector(".thumb");
    show(thumb, false);
    this.address = URL.createObjectURL(this.file);
    if (!this.file.size || !PREVIEWED.test(this.file.type)) return;
    thumb.onload = () => show(thumb);
    thumb.onerror = () => show(thumb, false); // a kind that this browser cannot show, such as HEIC
    const { address } = this;
    const source = this.file.type.startsWith("image/") ? address : (await this.frame(160))?.frame;
    if (source && this.address === address) thumb.src = source;
  }
}

/** What is missing: an error for a field without a file. */
export const missing = (field, message) => new ApiError(0, { message, param: field.role });
