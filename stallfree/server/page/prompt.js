// The box to send a prompt: a streamed chat, shown as it comes, with what its reader felt of the server.

import { duration } from "./charts.js";

const $ = (id) => document.getElementById(id);

export function promptBox(authorization) {
  let stopper = null;

  $("stop").addEventListener("click", () => stopper?.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("prompt-form").requestSubmit();
  });
  $("prompt-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (stopper) return;
    stopper = new AbortController();
    $("send").hidden = true;
    $("stop").hidden = false;
    $("answer").hidden = false;
    $("answer").textContent = "";
    note("waiting for the first token");
    try {
      await stream(stopper.signal, authorization());
    } catch (error) {
      note(error.name === "AbortError" ? "stopped" : error.message || String(error), error.name !== "AbortError");
    } finally {
      stopper = null;
      $("send").hidden = false;
      $("stop").hidden = true;
    }
  });
}

async function stream(signal, headers) {
  const sent = performance.now();
  const times = [];
  let usage = null;
  const body = {
    messages: [{ role: "user", content: $("prompt").value }],
    max_tokens: $("max-tokens").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  const response = await fetch("v1/chat/completions", { method: "POST", body: JSON.stringify(body), headers, signal });
  if (!response.ok) throw new Error(await trouble(response));
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const text = event.choices[0]?.delta.content;
    if (text) {
      times.push(performance.now());
      $("answer").append(text);
      $("answer").scrollTop = $("answer").scrollHeight;
      if (times.length === 1) note(`first token after ${duration((times[0] - sent) / 1e3)}`);
    }
    usage = event.usage ?? usage;
  }
  note(summary(sent, times, usage));
}

function summary(sent, times, usage) {
  const tokens = usage?.completion_tokens ?? times.length;
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (times.length) parts.push(`TTFT ${duration((times[0] - sent) / 1e3)}`);
  if (times.length > 1) {
    const gaps = times.slice(1).map((time, i) => time - times[i]);
    parts.push(`${((tokens - 1) / ((times.at(-1) - times[0]) / 1e3)).toFixed(1)} tokens/s`);
    parts.push(`longest gap ${duration(Math.max(...gaps) / 1e3)}`);
  }
  return parts.join(" · ");
}

// Server-sent events as objects, up to the [DONE].
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server ended the stream before its end");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function trouble(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status} ${response.statusText}`;
  }
}

function note(text, isTrouble = false) {
  $("answer-note").textContent = text;
  $("answer-note").dataset.state = isTrouble ? "trouble" : "";
}
