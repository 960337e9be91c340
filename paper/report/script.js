"use strict";
// The address holds what is shown: #<anchor>?q=<search>. Without this script the links and the details still work.
const box = document.getElementById("search");
const searched = [...document.querySelectorAll("[data-text]")];

function address() {
  const [anchor, query = ""] = decodeURIComponent(location.hash.slice(1)).split("?q=");
  return { anchor, query };
}

function find(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  for (const element of searched) {
    const found = words.every((word) => element.dataset.text.includes(word));
    element.classList.toggle(element.tagName === "TD" ? "dim" : "hidden", !found);
  }
  for (const row of document.querySelectorAll("tbody tr:has(td[data-text])")) hideEmpty(row);
  for (const section of document.querySelectorAll("main > section.part")) hideEmpty(section, words.length > 0);
  const found = searched.filter((element) => element.tagName === "TD" && matches(element));
  document.getElementById("found").textContent = words.length ? `${found.length} numbers` : "";
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
});
document.addEventListener("toggle", (event) => event.target.open && fill(event.target), true);
addEventListener("hashchange", show);
show();
