// Calls of the server's API. Addresses are relative, so that the page also works behind a proxy with a path.

import { signIn } from "./sign_in.js";

const ENDED = new Set(["completed", "failed", "canceled", "expired"]);
const QUIET_MS = 5000; // without news for so long, the page asks itself
const LONGEST_WAIT_MS = 20000;

/** An error as the API words it: one line, and the field that it is about. */
export class ApiError extends Error {
  constructor(status, { message, code = null, param = null }) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export const hasEnded = (video) => ENDED.has(video.status);

function errorOf(status, text) {
  try {
    const { error } = JSON.parse(text);
    if (typeof error?.message === "string") return new ApiError(status, error);
  } catch {
    // Not the server's own answer: a proxy's page.
  }
  return new ApiError(status, { message: `The server answers with status ${status}. Try again later.` });
}

const unreachable = () =>
  new ApiError(0, { message: "The server cannot be reached. Check the connection and try again." });

/** Calls the API and returns the answer's JSON. After a 401 it lets the person sign in and tries again. */
export async function call(method, path, { json, headers = {}, signal } = {}) {
  const options = { method, headers: { ...headers }, signal };
  if (json !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(json);
  }
  for (;;) {
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      throw error.name === "AbortError" ? error : unreachable();
    }
    const text = await response.text().catch(() => "");
    if (response.ok) return text ? JSON.parse(text) : null;
    if (response.status !== 401) throw errorOf(response.status, text);
    await signIn();
  }
}

/** Sends a file. onProgress gets the share that is sent. Resolves to the file object of the API. */
export async function upload(file, purpose, onProgress, signal) {
  for (;;) {
    const { status, text } = await send(file, purpose, onProgress, signal);
    if (status >= 200 && status < 300) return JSON.parse(text);
    if (status !== 401) throw errorOf(status, text);
    await signIn();
  }
}

function send(file, purpose, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell how much of a body is sent
    request.open("POST", "v1/files");
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () => resolve({ status: request.status, text: request.responseText });
    request.onerror = () => reject(unreachable());
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    const form = new FormData();
    form.append("purpose", purpose);
    form.append("file", file, file.name);
    request.send(form);
  });
}

export const video = (id) => call("GET", `v1/videos/${id}`);
export const removeVideo = (id) => call("DELETE", `v1/videos/${id}`);
export const contentOf = (id, variant) => `v1/videos/${id}/content?variant=${variant}`;
export const previewOf = (id, number) => `v1/videos/${id}/previews/${number}`;

/** A key for `Idempotency-Key`. randomUUID exists only on https and this machine. */
export function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Follows a video until it has ended: server-sent events, and where they bring no news (a proxy holds them back, or the
 * connection breaks) plain requests. onVideo gets each state; onConnection gets a line about the connection, or "".
 * Returns a function that stops it. While the tab is hidden it holds no connection: browsers open only six at a time.
 */
export function follow(id, onVideo, onConnection, onGone) {
  let source = null;
  let timer = 0;
  let wait = QUIET_MS;
  let stopped = false;

  const close = () => {
    source?.close();
    source = null;
    clearTimeout(timer);
  };
  const stop = () => {
    stopped = true;
    close();
    document.removeEventListener("visibilitychange", onVisible);
  };
  const later = (milliseconds) => {
    clearTimeout(timer);
    timer = setTimeout(ask, milliseconds);
  };
  const news = (object) => {
    if (stopped) return;
    wait = QUIET_MS;
    onConnection("");
    onVideo(object);
    if (hasEnded(object)) stop();
    else later(QUIET_MS);
  };
  const ask = async () => {
    try {
      news(await video(id));
    } catch (error) {
      if (stopped) return;
      if (error.status === 404 || error.status === 410) return stop(), onGone(error);
      onConnection(`${error.message} The work on the film goes on; this page tries again by itself.`);
      wait = Math.min(wait * 1.5, LONGEST_WAIT_MS);
      later(wait);
    }
  };
  const open = () => {
    close();
    if (stopped || document.hidden) return;
    later(0); // a first state at once, also where events do not work
    source = new EventSource(`v1/videos/${id}/events`);
    source.addEventListener("video", (event) => news(JSON.parse(event.data)));
    source.addEventListener("end", () => (source?.close(), later(0)));
  };
  const onVisible = () => open();
  document.addEventListener("visibilitychange", onVisible);
  open();
  return stop;
}
