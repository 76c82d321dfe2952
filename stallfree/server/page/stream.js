// One streamed answer of the server's chat API, and the times at which its reader got it. The page's elements are not known here.

import { duration } from "./charts.js";

// Sends `body` and calls `take(events)` once for each read from the network, so that a page that falls behind gets larger pieces,
// not more of them. Throws an Error whose message is for the reader. If `signal` aborts, the browser's AbortError is thrown.
export async function stream(body, headers, signal, take) {
  const all = { ...headers, "Content-Type": "application/json" };
  const options = { method: "POST", body: JSON.stringify(body), headers: all, signal };
  const response = await reached(fetch("v1/chat/completions", options), signal, "the server does not answer");
  if (!response.ok) throw new Error(await refusal(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reached(reader.read(), signal, "the connection to the server broke off");
    if (done) throw new Error("the server ended the stream before the answer's end");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    const data = parts.filter((part) => part.startsWith("data: ")).map((part) => part.slice(6)); // other parts are comments
    const events = data.filter((text) => text !== "[DONE]").map((text) => JSON.parse(text));
    const failed = events.find((event) => event.error);
    take(events.filter((event) => !event.error));
    if (failed) throw new Error(failed.error.message);
    if (data.at(-1) === "[DONE]") return;
  }
}

async function reached(promise, signal, fault) {
  try {
    return await promise;
  } catch (error) {
    throw signal.aborted ? error : new Error(fault);
  }
}

async function refusal(response) {
  if (response.status === 401) return "the server wants an API key; type it at the top of the page, then try again";
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status} ${response.statusText}`;
  }
}

// What a reader measures of one answer. Tokens are counted by the server (`usage`), times are this page's, in ms.
export class Measure {
  constructor() {
    this.sent = performance.now();
    this.first = null;
    this.last = null;
    this.longest = 0;
    this.tokens = 0;
    this.tokensAtFirst = 0;
    this.reason = null;
  }

  // Events that were read together came at the same time.
  take(events) {
    const now = performance.now();
    for (const event of events) {
      this.tokens = event.usage?.completion_tokens ?? this.tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      this.reason = choice.finish_reason ?? this.reason;
      if (this.first !== null) {
        this.longest = Math.max(this.longest, now - this.last);
        this.last = now;
      } else if (choice.delta.content || choice.delta.reasoning_content) {
        this.first = this.last = now;
        this.tokensAtFirst = this.tokens;
      }
    }
  }

  get ttft() {
    return `TTFT ${duration((this.first - this.sent) / 1e3)}`;
  }

  // The tokens after the first by the time after the first: the time to the first is a figure of its own.
  summary() {
    const parts = [`${this.tokens.toLocaleString("en")} token${this.tokens === 1 ? "" : "s"}`];
    if (this.first !== null) parts.push(this.ttft);
    if (this.last > this.first) {
      parts.push(`${((this.tokens - this.tokensAtFirst) / ((this.last - this.first) / 1e3)).toFixed(1)} tokens/s`);
      parts.push(`longest gap ${duration(this.longest / 1e3)}`);
    }
    return parts.join(" · ");
  }
}
