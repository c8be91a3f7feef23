// Small helpers for elements, texts and errors beside fields.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; strings become text, never HTML. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "for" || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export function show(element, shown = true) {
  element.hidden = !shown;
}

/** Sets the text only if it changes, so that screen readers do not repeat it. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows a line of text, or hides the element if there is none. */
export function notice(element, text) {
  setText(element, text ?? "");
  show(element, Boolean(text));
}

export function bytesText(count) {
  if (count < 1000) return `${count} bytes`;
  const units = ["kB", "MB", "GB"];
  let value = count / 1000;
  let unit = 0;
  while (value >= 1000 && unit < 2) (value /= 1000), unit++;
  return `${value.toFixed(value < 10 ? 1 : 0)} ${units[unit]}`;
}

export function durationText(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.round((whole % 3600) / 60)} min`;
}

export function timeText(unixSeconds) {
  const time = new Date(unixSeconds * 1000);
  const today = new Date().toDateString() === time.toDateString();
  return today
    ? `today, ${time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}`
    : time.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/** Shows an error beside a field; an empty text removes it. */
export function fieldError(field, text) {
  let line = field.querySelector(":scope > .error");
  const inputs = field.querySelectorAll("input, select, textarea");
  if (!text) {
    line?.remove();
    field.classList.remove("wrong");
    for (const input of inputs) {
      input.removeAttribute("aria-invalid");
      describe(input, line?.id, false);
    }
    return;
  }
  if (!line) {
    line = make("p", { className: "error", id: `error-${field.dataset.param.split(" ")[0]}`, role: "alert" });
    field.append(line);
  }
  setText(line, text);
  field.classList.add("wrong");
  for (const input of inputs) {
    input.setAttribute("aria-invalid", "true");
    describe(input, line.id, true);
  }
}

function describe(input, id, add) {
  if (!id) return;
  const ids = (input.getAttribute("aria-describedby") ?? "").split(" ").filter((one) => one && one !== id);
  if (add) ids.push(id);
  if (ids.length) input.setAttribute("aria-describedby", ids.join(" "));
  else input.removeAttribute("aria-describedby");
}

/** The field of a form that an error of the API names: `steps`, `body.steps` or `person.0` mean the same field. */
export function fieldOf(form, param) {
  const parts = (param ?? "").split(/[.[\]]+/).filter(Boolean);
  for (const field of form.querySelectorAll("[data-param]")) {
    if (field.dataset.param.split(" ").some((name) => parts.includes(name))) return field;
  }
  return null;
}

/** Puts an error of the API beside its field, or into `otherwise`; moves the focus there. */
export function placeError(form, error, otherwise) {
  const field = fieldOf(form, error.param);
  if (!field || field.hidden) {
    notice(otherwise, error.message);
    otherwise.focus();
    return;
  }
  fieldError(field, error.message);
  goTo(field);
}

/** Unfolds what hides a field and moves the focus to its first control. */
export function goTo(field) {
  const folded = field.closest("details");
  if (folded) folded.open = true;
  const control = [...field.querySelectorAll("input, select, textarea, button")].find((one) => one.offsetParent !== null);
  (control ?? field).focus();
}

/** Asks before something is lost. Resolves to true or false. */
export function confirmed(text, yes, no) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  byId("confirm-no").textContent = no;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
