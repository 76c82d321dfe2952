// The table of adapters: where the weights of each are, and how many requests want it. Shown if the server has any.

import { cell } from "./tenants.js";

const $ = (id) => document.getElementById(id);

export function adapters({ adapters, num_blocks }) {
  $("adapters").hidden = adapters === null;
  if (adapters === null) return;
  const { resident, loading, away, waiting, blocks, rows } = adapters;
  const [here, coming, gone, parked] = [resident, loading, away, waiting].map((value) => value.toLocaleString("en"));
  const share = ((100 * blocks) / num_blocks).toFixed(1);
  $("adapters-note").textContent =
    `${here} resident in ${share} % of the KV blocks, ${coming} loading, ${gone} on the disk. ${parked} requests wait for one.`;
  $("adapters-rows").replaceChildren(...rows.map(row));
}

function row({ name, state, rank, requests }) {
  const tr = document.createElement("tr");
  const head = cell("th", name);
  head.scope = "row";
  tr.append(head, ...[state, rank, requests.toLocaleString("en")].map((text) => cell("td", text)));
  tr.dataset.adapter = state;
  return tr;
}
