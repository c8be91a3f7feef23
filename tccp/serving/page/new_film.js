// The form: three files, the head, consent, options, and the start.

import { ApiError, call, newKey } from "./api.js";
import { byId, fieldError, goTo, notice, placeError, setText, show } from "./dom.js";
import { FileField, missing } from "./file_field.js";
import { HeadPicker } from "./head_picker.js";

const FILM = "video/*,.mkv,.mov,.avi,.ts";
const FIELDS = [
  {
    role: "scene",
    title: "Scene",
    hint: "The film in which the head is replaced.",
    choose: "Choose a film",
    accept: FILM,
  },
  {
    role: "audio",
    title: "Sound",
    hint: "What the person says: a sound file, or a film with sound. The new film has its length.",
    choose: "Choose a sound",
    accept: `audio/*,${FILM}`,
  },
  {
    role: "identity",
    title: "Identity",
    hint: "A picture of the person to generate, or a film of that person.",
    choose: "Choose a picture",
    accept: `image/*,.heic,.avif,${FILM}`,
  },
];
const MORE_FIELDS = [
  {
    role: "mask",
    title: "Mask film",
    hint: "As large and long as the scene, bright at the head. It takes the place of the head that you pick.",
    choose: "Choose a film",
    accept: FILM,
  },
  {
    role: "track",
    title: "Track file",
    hint: "JSON with a head box for each frame. It takes the place of the head that you pick.",
    choose: "Choose a file",
    accept: ".json,application/json",
  },
];

export class NewFilm {
  /** onMade is called with the new video. */
  constructor(onMade) {
    this.onMade = onMade;
    this.form = byId("new-film");
    this.fields = {};
    for (const [fields, parent] of [[FIELDS, byId("file-fields")], [MORE_FIELDS, byId("more-file-fields")]]) {
      for (const one of fields) this.fields[one.role] = new FileField(parent, one, (field) => this.changed(field));
    }
    this.picker = new HeadPicker(() => fieldError(byId("head-field"), ""));
    this.form.addEventListener("submit", (event) => (event.preventDefault(), this.start()));
    this.form.addEventListener("input", (event) => {
      const field = event.target.closest("[data-param]");
      if (field) fieldError(field, "");
    });
    byId("head-retry").addEventListener("click", () => this.look());
  }

  get scene() {
    return this.fields.scene;
  }

  /** Sorts files that are dropped anywhere: pictures, sounds and films. */
  takeAll(files) {
    const { scene, audio, identity } = this.fields;
    for (const file of files) {
      if (file.type.startsWith("image/")) identity.take(file);
      else if (file.type.startsWith("audio/")) audio.take(file);
      else if (!scene.file) scene.take(file);
      else audio.take(file);
    }
  }

  changed(field) {
    notice(byId("form-error"), "");
    if (field !== this.scene) return;
    if (!field.file) {
      this.looking?.abort();
      show(byId("head-field"), false);
    } else if (field.id) {
      this.look();
    } else {
      this.looking?.abort();
      this.picker.choice = undefined;
      show(byId("head-field"));
      show(byId("head-picker"), false);
      show(byId("head-retry"), false);
      this.picker.say("The server looks for heads when the scene is uploaded.");
    }
  }

  async look() {
    this.looking?.abort();
    const looking = (this.looking = new AbortController());
    fieldError(byId("head-field"), "");
    show(byId("head-retry"), false);
    show(byId("head-picker"), false);
    this.picker.say("The server looks for heads …");
    try {
      const found = await call("POST", "v1/heads", { json: { scene: this.scene.id }, signal: looking.signal });
      this.picker.open(found);
      show(byId("head-picker"));
      this.picker.say(this.picker.summary);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.param === "scene") {
        fieldError(this.scene.field, error.message);
        return show(byId("head-field"), false);
      }
      await this.offerFrame(error, looking.signal);
    }
  }

  /** Without the server's help, a box can be drawn on the frame that the browser shows. */
  async offerFrame(error, signal) {
    const shown = await this.scene.frame(1280);
    if (signal.aborted) return;
    fieldError(byId("head-field"), error.message);
    show(byId("head-retry"));
    if (!shown) return this.picker.say("The server finds the head when it makes the film.");
    this.picker.open({ ...shown, heads: [] }, false);
    fieldError(byId("head-field"), error.message);
    show(byId("head-picker"));
    this.picker.say(this.picker.summary);
  }

  /** The options that differ from the server's own. Raises ApiError for the first field that is wrong. */
  options() {
    const given = {};
    for (const input of this.form.querySelectorAll("[name]")) {
      if (input.name === "head") continue;
      if (!input.validity.valid && !input.validity.valueMissing) {
        throw new ApiError(0, { message: input.validationMessage, param: input.name });
      }
      if (input.type === "checkbox") {
        if (input.checked === input.defaultChecked) continue;
        given[input.name] = input.hasAttribute("value") ? input.value : input.checked;
      } else if (input.value.trim() !== "") {
        given[input.name] = input.type === "number" ? Number(input.value) : input.value.trim();
      }
    }
    return given;
  }

  /** Everything but the files. Raises ApiError. */
  checked() {
    const needed = { scene: "Choose a scene.", audio: "Choose a sound.", identity: "Choose a picture of the person." };
    for (const [role, message] of Object.entries(needed)) {
      if (!this.fields[role].file) throw missing(this.fields[role], message);
    }
    const options = this.options();
    if (!this.fields.mask.file && !this.fields.track.file) {
      // Undefined while the server looks: then it also finds the head by itself.
      const picked = this.picker.choice === undefined ? {} : this.picker.options;
      if (picked === null) {
        const message = this.picker.heads.length ? "Pick the head to replace, or draw a box." : "Draw a box around the head.";
        throw new ApiError(0, { message, param: "person" });
      }
      Object.assign(options, picked);
    }
    if ((options.consent ?? "").length < 3) {
      const message = "Say who agreed that this face is generated, or why nobody needs to.";
      throw new ApiError(0, { message, param: "consent" });
    }
    return options;
  }

  async start() {
    if (this.busy) return;
    notice(byId("form-error"), "");
    for (const field of this.form.querySelectorAll("[data-param]")) fieldError(field, "");
    const button = byId("start");
    const state = byId("start-state");
    this.busy = true;
    try {
      const body = this.checked();
      button.setAttribute("aria-disabled", "true");
      setText(state, "The files are being uploaded …");
      for (const [role, field] of Object.entries(this.fields)) {
        const id = await field.uploaded();
        if (id) body[role] = id;
      }
      setText(state, "The film is being started …");
      const video = await call("POST", "v1/videos", { json: body, headers: { "Idempotency-Key": this.keyOf(body) } });
      this.key = null;
      for (const field of Object.values(this.fields)) field.kept = true; // another film may use the same file
      this.onMade(video, this.scene.file);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.code === "no_such_file") this.fields[error.param]?.lost();
      placeError(this.form, error, byId("form-error"));
    } finally {
      this.busy = false;
      button.removeAttribute("aria-disabled");
      setText(state, "");
    }
  }

  /** The same request again, such as after a broken connection, has the same key: no film is made twice. */
  keyOf(body) {
    const text = JSON.stringify(body);
    if (this.key?.text !== text) this.key = { text, value: newKey() };
    return this.key.value;
  }

  focus() {
    goTo(this.scene.field);
  }
}
