// The conversation: its turns, and what the reader does with them. It lives in this page only: a reload forgets it.

import { Announcer } from "./announce.js";
import { openWhenWrong, sampling, system } from "./settings.js";
import { Measure, stream } from "./stream.js";
import { Turn } from "./turn.js";

const BOTTOM_PX = 24; // a reader within about a line of the end wants to stay there

const $ = (id) => document.getElementById(id);

// `authorization()` gives the headers that hold the key.
export class Conversation {
  constructor(authorization) {
    this.authorization = authorization;
    this.turns = [];
    this.stopper = null; // of the answer that comes now
    this.announcer = new Announcer($("said"));
    openWhenWrong();
    $("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!event.repeat) $("prompt-form").requestSubmit();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) this.stopper?.abort();
    });
    $("stop").addEventListener("click", () => this.stopper?.abort());
    $("new").addEventListener("click", () => this.clear());
    $("turns").addEventListener("click", (event) => {
      if (event.target.matches(".again") && $("prompt-form").reportValidity()) this.answer(this.turns.at(-1));
    });
    $("prompt").focus({ preventScroll: true });
  }

  send() {
    const question = $("prompt").value;
    if (this.stopper) return;
    if (!question.trim()) return $("prompt").focus();
    const turn = new Turn(question);
    this.turns.push(turn);
    $("turns").append(turn.element);
    $("prompt").value = "";
    this.answer(turn);
  }

  clear() {
    this.stopper?.abort();
    this.turns = [];
    $("turns").replaceChildren();
    this.announcer.begin("New conversation");
    $("prompt").focus();
  }

  // Asks for the last turn's answer, the first time or again.
  async answer(turn) {
    if (this.stopper) return;
    const { signal } = (this.stopper = new AbortController());
    const measure = new Measure();
    turn.begin();
    $("turns").scrollTop = $("turns").scrollHeight;
    this.announcer.begin("waiting for the first token");
    const rest = this.busy(turn);
    let trouble = "";
    try {
      await stream(this.body(), this.authorization(), signal, (events) => this.take(turn, measure, events));
    } catch (error) {
      if (!signal.aborted) trouble = error.message || String(error);
    }
    this.stopper = null;
    if (this.turns.includes(turn)) this.end(turn, measure, signal.aborted, trouble);
    rest();
  }

  // The note and the spoken words say why an answer is shorter than the model would have made it.
  end(turn, measure, stopped, trouble) {
    const why = stopped ? "stopped" : measure.reason === "length" ? "ended at the limit of tokens" : "";
    const parts = [why, measure.tokens && measure.summary(), !turn.content && "no answer: the next question leaves this turn out"];
    this.keepingPlace(() => {
      turn.trouble(trouble);
      turn.end(parts.filter(Boolean).join(" · "));
    });
    this.announcer.end(trouble || why);
  }

  // A turn without an answer is left out: two questions in a row are an error to many models.
  body() {
    const past = this.turns.slice(0, -1).filter((turn) => turn.content);
    const messages = past.flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn.content },
    ]);
    messages.push({ role: "user", content: this.turns.at(-1).question });
    // With usage in every event, an answer that is stopped has its count of tokens too.
    const streamed = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    return { messages: [...system(), ...messages], ...sampling(), ...streamed };
  }

  take(turn, measure, events) {
    const silent = measure.first === null;
    measure.take(events);
    const deltas = events.map((event) => event.choices[0]?.delta ?? {});
    const content = deltas.map((delta) => delta.content ?? "").join("");
    const reasoning = deltas.map((delta) => delta.reasoning_content ?? "").join("");
    this.keepingPlace(() => {
      if (silent && measure.first !== null) turn.note(measure.ttft);
      if (reasoning) turn.think(reasoning);
      if (content) turn.write(content);
    });
    this.announcer.add(content);
  }

  // Changes the turns. A reader who is at their end stays there; one who reads further up is not moved.
  keepingPlace(change) {
    const turns = $("turns");
    const following = turns.scrollHeight - turns.scrollTop - turns.clientHeight < BOTTOM_PX;
    change();
    if (following) turns.scrollTop = turns.scrollHeight;
  }

  // While an answer comes, "Stop" takes the place of the button that asked for it, and its focus. The function that is returned
  // undoes that.
  busy(turn) {
    const asked = [$("send"), turn.again].find((button) => button === document.activeElement);
    const show = (busy) => {
      $("send").hidden = turn.again.hidden = busy;
      $("stop").hidden = !busy;
    };
    show(true);
    if (asked) $("stop").focus();
    return () => {
      const stopping = document.activeElement === $("stop");
      show(false);
      if (stopping) (asked ?? $("send")).focus();
    };
  }
}
