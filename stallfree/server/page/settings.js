// What the reader sets for the answers to come: the system prompt and the sampling. An empty field leaves the choice to the server.

const $ = (id) => document.getElementById(id);
const SAMPLING = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens" }; // the API's names and the fields' ids

// Fields of a request: only those that are not empty.
export function sampling() {
  const values = Object.entries(SAMPLING).map(([name, id]) => [name, $(id).valueAsNumber]);
  return Object.fromEntries(values.filter(([, value]) => !Number.isNaN(value)));
}

// The system's message, or none.
export function system() {
  const content = $("system").value;
  return content.trim() ? [{ role: "system", content }] : [];
}

// A field that is wrong can be shown only while the settings are open.
export function openWhenWrong() {
  $("settings").addEventListener("invalid", () => ($("settings").open = true), { capture: true });
}

// Shows the server's own values in the empty fields. If they cannot be had, the fields say "default".
export async function showDefaults(headers) {
  let defaults = {};
  try {
    const response = await fetch("v1/models", { headers });
    defaults = (await response.json()).data[0].default_sampling;
  } catch {
    // The server went away, or wants another key. Its next run is asked again.
  }
  for (const name of ["temperature", "top_p"]) $(SAMPLING[name]).placeholder = defaults[name] ?? "default";
}
