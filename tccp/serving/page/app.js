// The page: the form and the list of films (#), or one film (#video_...).

import { byId, notice, show } from "./dom.js";
import { FilmList } from "./film_list.js";
import { FilmView } from "./film_view.js";
import { NewFilm } from "./new_film.js";
import { showSignOut } from "./sign_in.js";

const TITLE = document.title;
const list = new FilmList();
const newFilm = new NewFilm(openMade);
const filmView = new FilmView(gone, openMade);
let chosenScene = null; // the scene of the film that is opened next

function openMade(video, scene) {
  chosenScene = scene;
  location.hash = video.id;
}

function gone(message) {
  notice(byId("page-error"), message);
  history.replaceState(null, "", location.pathname);
  route({ keepError: true });
}

function route({ keepError = false, first = false } = {}) {
  const id = location.hash.slice(1);
  const opensFilm = /^video_\w+$/.test(id);
  if (!keepError) notice(byId("page-error"), "");
  show(byId("home"), !opensFilm);
  show(byId("film"), opensFilm);
  if (opensFilm) {
    list.stop();
    filmView.open(id, chosenScene);
  } else {
    filmView.close();
    list.start();
    document.title = TITLE;
  }
  chosenScene = null;
  if (first) return;
  window.scrollTo(0, 0);
  byId(opensFilm ? "film-title" : "new-title").focus({ preventScroll: true });
}

window.addEventListener("hashchange", () => route());
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the part of the address after # names the film
  byId("main").focus();
});
// Files that are dropped beside the fields are sorted by kind; the browser must not leave the page for them.
window.addEventListener("dragover", (event) => event.preventDefault());
window.addEventListener("drop", (event) => {
  event.preventDefault();
  if (!byId("home").hidden) newFilm.takeAll(event.dataTransfer.files);
});
showSignOut();
route({ first: true });
