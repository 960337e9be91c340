"use strict";
// The address holds what is shown: #<anchor>?q=<search>. Without this script the links and the details still work.
const box = document.getElementById("search");
for (const item of document.querySelectorAll("#fidelity li")) item.dataset.text = item.textContent.toLowerCase();
for (const run of document.querySelectorAll("#runs details")) {
  run.dataset.text = [...run.querySelectorAll("summary, dd")].map((part) => part.textContent).join(" ").toLowerCase();
}
const searched = [...document.querySelectorAll("[data-text]")];
const KINDS = { number: "td", claim: "#claims tr", setting: "tr:not(#claims tr)", "ledger entry": "#fidelity li", run: "#runs details" };

function address() {
  const [anchor, query = ""] = location.hash.slice(1).split("?q=");
  return { anchor: decoded(anchor), query: decoded(query.replaceAll("+", " ")) };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a lone % that somebody typed into the address
  }
}

function find(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  for (const element of searched) {
    const found = words.every((word) => element.dataset.text.includes(word));
    element.classList.toggle(element.tagName === "TD" ? "dim" : "hidden", !found);
  }
  for (const row of document.querySelectorAll("tbody tr:has(td[data-text])")) hideEmpty(row);
  for (const section of document.querySelectorAll("main > section:not(#summary)")) {
    hideEmpty(section, words.length > 0);
    section.classList.toggle("searched", words.length > 0);
  }
  document.getElementById("found").textContent = words.length ? counted() : "";
}

// "5 numbers, 1 ledger entry"
function counted() {
  const parts = Object.entries(KINDS).map(([name, kind]) => {
    const found = searched.filter((element) => element.matches(kind) && matches(element)).length;
    return found ? `${found} ${found > 1 ? name.replace(/y$/, "ie") + "s" : name}` : "";
  });
  return parts.filter(Boolean).join(", ") || "nothing found";
}

const matches = (element) => !element.classList.contains("dim") && !element.classList.contains("hidden");

function hideEmpty(part, always = true) {
  part.classList.toggle("hidden", always && ![...part.querySelectorAll("[data-text]")].some(matches));
}

function open(anchor) {
  const target = anchor && document.getElementById(anchor);
  if (!target) return;
  for (let part = target; part; part = part.parentElement) {
    if (part.tagName === "DETAILS") part.open = true;
    part.classList.remove("hidden");
  }
  fill(target);
  target.scrollIntoView();
  if (target.tagName === "DETAILS") target.firstElementChild.focus({ preventScroll: true }); // the keyboard goes along
}

function fill(details) {
  for (const place of details.querySelectorAll(".run[data-run]")) {
    const run = document.getElementById(`run/${place.dataset.run}`);
    if (run && place.children.length === 1) place.append(run.querySelector(".record").cloneNode(true));
  }
}

function show() {
  const { anchor, query } = address();
  box.value = query;
  find(query);
  open(anchor);
}

box.addEventListener("input", () => {
  history.replaceState(null, "", box.value ? `#?q=${encodeURIComponent(box.value)}` : location.pathname);
  find(box.value);
  const first = box.value && document.querySelector("main > section:not(#summary, .hidden)");
  if (first && first.getBoundingClientRect().top < 0) first.scrollIntoView();
});
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target === box) return;
  event.preventDefault();
  box.focus();
});
document.addEventListener("toggle", (event) => event.target.open && fill(event.target), true);
addEventListener("hashchange", show);
show();
