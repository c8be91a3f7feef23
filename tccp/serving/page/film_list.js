// The list of films; it comes from the server, so it survives a reload.

import { call, hasEnded, previewOf, removeVideo } from "./api.js";
import { byId, confirmed, make, notice, setText, show, timeText } from "./dom.js";

const POLL_MS = 4000;
const PAGE = 20;
export const STATUS = {
  queued: "Waiting",
  in_progress: "In work",
  completed: "Ready",
  failed: "Failed",
  canceled: "Cancelled",
  expired: "Expired",
};

export const titleOf = (video) => video.prompt || `Film of ${timeText(video.created_at)}`;

/** Asks, then cancels a running film or deletes an ended one. Resolves to the API's answer, or null. */
export async function cancelOrDelete(video) {
  const running = !hasEnded(video);
  const text = running
    ? `Cancel "${titleOf(video)}"? What is made of it is lost.`
    : `Delete "${titleOf(video)}" and its files? This cannot be undone.`;
  const yes = running ? "Cancel the film" : "Delete";
  const no = running ? "Go on making it" : "Keep it";
  return (await confirmed(text, yes, no)) ? removeVideo(video.id) : null;
}

export class FilmList {
  constructor() {
    this.list = byId("list");
    this.rows = new Map(); // video id to its row, kept so that the focus stays where it is
    this.wanted = PAGE;
    byId("list-more").addEventListener("click", () => {
      this.wanted += PAGE;
      this.load();
    });
    document.addEventListener("visibilitychange", () => !document.hidden && this.open && this.load());
  }

  start() {
    this.open = true;
    this.load();
  }

  stop() {
    this.open = false;
    clearTimeout(this.timer);
  }

  async load() {
    clearTimeout(this.timer);
    try {
      const videos = [];
      let more = true;
      while (more && videos.length < this.wanted) {
        const after = videos.length ? `&after=${videos.at(-1).id}` : "";
        const page = await call("GET", `v1/videos?limit=${PAGE}&order=desc${after}`);
        videos.push(...page.data);
        more = page.has_more && page.data.length > 0;
      }
      this.draw(videos, more);
      notice(byId("list-error"), "");
    } catch (error) {
      notice(byId("list-error"), error.message);
    }
    if (this.open && !document.hidden) this.timer = setTimeout(() => this.load(), this.active ? POLL_MS : 5 * POLL_MS);
  }

  draw(videos, more) {
    this.active = videos.some((video) => !hasEnded(video));
    const ids = new Set(videos.map((video) => video.id));
    for (const [id, row] of this.rows) {
      if (!ids.has(id)) row.remove(), this.rows.delete(id);
    }
    videos.forEach((video, i) => {
      let row = this.rows.get(video.id);
      if (!row) this.rows.set(video.id, (row = this.row(video)));
      this.update(row, video);
      if (this.list.children[i] !== row) this.list.insertBefore(row, this.list.children[i] ?? null);
    });
    show(byId("list-empty"), videos.length === 0);
    show(byId("list-more"), more);
  }

  row(video) {
    const button = make("button", { type: "button" });
    const row = make(
      "li",
      {},
      make("img", { className: "thumb", alt: "", width: 96, height: 54, hidden: true }),
      make("div", { className: "about" },
        make("a", { href: `#${video.id}` }), make("span", { className: "status" }), make("span", { className: "hint" })),
      button,
    );
    button.addEventListener("click", () => this.remove(row.video));
    return row;
  }

  update(row, video) {
    row.video = video;
    const title = titleOf(video);
    const running = !hasEnded(video);
    setText(row.querySelector("a"), title);
    const status = row.querySelector(".status");
    status.dataset.status = video.status;
    setText(status, video.status === "in_progress" ? `${STATUS.in_progress}, ${video.progress} %` : STATUS[video.status]);
    const about = [video.prompt ? timeText(video.created_at) : null, video.seconds ? `${Number(video.seconds)} s` : null];
    if (video.status === "completed") about.push("AI-generated");
    if (video.error) about.push(video.error.message);
    setText(row.querySelector(".hint"), about.filter(Boolean).join(" · "));
    const button = row.querySelector("button");
    setText(button, running ? "Cancel" : "Delete");
    button.setAttribute("aria-label", `${running ? "Cancel" : "Delete"}: ${title}`);
    const thumb = row.querySelector("img");
    const source = video.previews ? previewOf(video.id, video.previews - 1) : null;
    if (source && thumb.getAttribute("src") !== source) {
      thumb.onload = () => show(thumb);
      thumb.onerror = () => show(thumb, false);
      thumb.src = source;
    }
  }

  async remove(video) {
    try {
      if (await cancelOrDelete(video)) await this.load();
    } catch (error) {
      notice(byId("list-error"), error.message);
      return;
    }
    // The row may be gone, and the focus with it.
    if (document.activeElement === document.body) byId("list-title").focus();
  }
}
