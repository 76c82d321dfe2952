// The table of tenants: who got which share of the last minute, and who waits or was refused. Shown once there are two.

import { duration } from "./charts.js";

const $ = (id) => document.getElementById(id);

export function tenants(about) {
  $("tenants").hidden = about.tenants.length < 2;
  $("tenants-rows").replaceChildren(...about.tenants.map(row));
}

function row({ name, share, weight, ahead_s, waiting, refused, cached }) {
  const tr = document.createElement("tr");
  const head = cell("th", name || "no name");
  head.scope = "row";
  const ahead = ahead_s === null ? "–" : ahead_s > 0 ? `${duration(ahead_s)} ahead` : "next";
  const [heavy, waits, refusals] = [weight, waiting, refused].map((value) => value.toLocaleString("en"));
  const hits = cached === null ? "–" : `${(100 * cached).toFixed(0)} %`;
  const texts = [`${(100 * share).toFixed(1)} %`, heavy, ahead, hits, waits, refusals];
  tr.append(head, ...texts.map((text) => cell("td", text)));
  if (refused) tr.lastChild.dataset.state = "trouble";
  return tr;
}

export function cell(kind, text) {
  const made = document.createElement(kind);
  made.textContent = text;
  return made;
}
