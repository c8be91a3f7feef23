"""The page's style sheet, and its script, which sorts and searches the table of films."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf8; --card: #ffffff; --ink: #1d2126; --soft: #5c6570; --line: #e2dfd9;
  --kept: #14866a; --fill: #14866a; --bar: #6b8fb3; --mark: #b4531f; --bad: #a6341b; --shade: #f1efea }
@media (prefers-color-scheme: dark) {
  :root { --bg: #15181b; --card: #1e2226; --ink: #e8e6e1; --soft: #a0a8b0; --line: #343a40; --kept: #35b592;
    --fill: #1a8c70; --bar: #6f98c2; --mark: #f0995f; --bad: #f08a70; --shade: #262b30 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.2rem; margin: 44px 0 4px }
h3 { font-size: 1rem; margin: 24px 0 4px }
p { margin: 4px 0 12px; max-width: 72ch }
.soft { color: var(--soft) }
small, .small { font-size: .84rem }
.lead { font-size: 1.7rem; line-height: 1.25; margin: 18px 0 6px; max-width: none }
.lead b { color: var(--kept) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 0;
  padding: 0 }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px }
.cards dt { color: var(--soft); font-size: .84rem }
.cards dd { margin: 0; font-size: 1.3rem; font-weight: 600 }
svg { display: block; max-width: 100% }
svg text { fill: var(--ink); font-size: 12px }
svg .soft { fill: var(--soft) }
.share { width: 100%; height: 46px; border-radius: 8px; margin: 10px 0 16px }
.share text { fill: #fff; font-size: 14px; font-weight: 600 }
[hidden] { display: none !important }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line);
  font-size: .92rem }
th, td { text-align: left; vertical-align: top; padding: 8px 12px; border-top: 1px solid var(--line) }
thead th { border-top: 0; color: var(--soft); font-weight: 600; white-space: nowrap; background: var(--shade) }
td.n, th.n { text-align: right; white-space: nowrap }
thead button { all: unset; cursor: pointer }
thead button:focus-visible { outline: 2px solid var(--mark) }
th.wide { width: 45% }
.sort th:first-child { width: 28% }
th[aria-sort=ascending] button::after { content: " \\25B2" }
th[aria-sort=descending] button::after { content: " \\25BC" }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--shade); border-radius: 4px;
  padding: 1px 5px }
.meter { display: block; width: 110px; height: 8px; border-radius: 4px; background: var(--shade); overflow: hidden;
  margin-top: 8px }
  .meter i { display: block; height: 100%; background: var(--fill) }
.bad { color: var(--bad) }
input[type=search] { font: inherit; color: inherit; background: var(--card); width: 100%;
  max-width: 340px; padding: 7px 12px; border: 1px solid var(--line); border-radius: 8px; margin: 0 0 10px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 14px; margin-top: 12px }
.charts figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px }
.charts figcaption { font-size: .84rem; color: var(--soft) }
.charts figcaption b { color: var(--ink); font-size: .95rem }
.charts svg { width: 100%; height: auto; margin: 6px 0 2px }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 10px; margin: 8px 0 18px }
.sheet figure { margin: 0; min-width: 0 }
.sheet img, .sheet .none { width: 100%; aspect-ratio: 1; object-fit: cover;
  border-radius: 8px; background: var(--shade); display: block; border: 2px solid var(--kept) }
.sheet .out img, .sheet .out .none { border-color: var(--mark) }
.sheet .none { display: grid; place-items: center; color: var(--soft); font-size: .78rem }
.sheet figcaption { font-size: .74rem; line-height: 1.35; margin-top: 4px }
.sheet .name { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
details { margin: 10px 0 }
summary { cursor: pointer; color: var(--soft) }
ul.plain { margin: 4px 0; padding-left: 20px }
footer { margin-top: 48px; color: var(--soft); font-size: .84rem; border-top: 1px solid var(--line);
  padding-top: 12px }
@media (max-width: 640px) {
  main { padding: 20px 14px 40px }
  .lead { font-size: 1.3rem }
  .cards { grid-template-columns: 1fr 1fr }
  table.stack thead { display: none }
  table.stack tr { display: block; border-top: 1px solid var(--line); padding: 8px 12px }
  table.stack td { display: flex; gap: 10px; border: 0; padding: 2px 0; text-align: left; white-space: normal }
  table.stack td::before { content: attr(data-label); color: var(--soft); flex: 0 0 92px; font-size: .84rem }
  table.stack td:first-child { display: block }
  table.stack td:empty { display: none }
  table.sort td:first-child { font-weight: 600 }
  table.stack td:first-child::before { content: none }
  .sheet { grid-template-columns: repeat(3, 1fr) }
  }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sort")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && column === 0);
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[column].dataset.value;
      const order = (a, b) => column === 0 ? value(a).localeCompare(value(b)) : value(a) - value(b);
      body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
    });
  });
  const search = document.getElementById(table.dataset.search);
  if (!search) continue;
  search.hidden = false;
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
"""
