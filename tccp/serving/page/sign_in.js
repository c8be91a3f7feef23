// Asks for a token where the server needs one. The server keeps it in a cookie that scripts cannot read.

import { byId, fieldError, show } from "./dom.js";

const MARK = "tccp-signed-in";
let waiting = null;

/** Resolves when the person has signed in. Several callers wait for the same dialog. */
export function signIn() {
  waiting ??= ask().finally(() => (waiting = null));
  return waiting;
}

function ask() {
  const dialog = byId("sign-in");
  const form = dialog.querySelector("form");
  const field = form.querySelector(".field");
  const input = byId("token");
  dialog.showModal();
  return new Promise((resolve) => {
    const stay = (event) => event.preventDefault(); // without a token there is nothing to see behind the dialog
    const submit = async (event) => {
      event.preventDefault();
      const problem = await send(input.value.trim());
      fieldError(field, problem);
      if (problem) return input.focus();
      input.value = "";
      dialog.removeEventListener("cancel", stay);
      form.removeEventListener("submit", submit);
      dialog.close();
      sessionStorage.setItem(MARK, "yes");
      showSignOut();
      resolve();
    };
    dialog.addEventListener("cancel", stay);
    form.addEventListener("submit", submit);
  });
}

/** Returns what is wrong with the token, or an empty text. */
async function send(token) {
  if (!token) return "Enter the token.";
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("v1/session", { method: "POST", headers, body: JSON.stringify({ token }) });
    if (response.ok) return "";
    const answer = await response.json().catch(() => null);
    return answer?.error?.message ?? `The server answers with status ${response.status}. Try again later.`;
  } catch {
    return "The server cannot be reached. Check the connection and try again.";
  }
}

export function showSignOut() {
  const button = byId("sign-out");
  show(button, sessionStorage.getItem(MARK) === "yes");
  button.onclick = async () => {
    await fetch("v1/session", { method: "DELETE" }).catch(() => null);
    sessionStorage.removeItem(MARK);
    location.assign("./");
    location.reload();
  };
}
