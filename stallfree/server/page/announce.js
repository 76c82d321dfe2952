// Reads an answer out to people who hear the page: in pieces of some seconds, because a piece for every token would drown the page.

const PIECE_MS = 4000; // about the time in which a screen reader speaks two sentences

// `element` is a live region: what it holds is spoken when it changes.
export class Announcer {
  constructor(element) {
    this.element = element;
    this.begin("");
  }

  begin(words) {
    this.held = "";
    this.due = performance.now() + PIECE_MS;
    this.element.textContent = words;
  }

  // Speaks what is held up to its last space, if the piece before is old enough.
  add(text) {
    this.held += text;
    const now = performance.now();
    if (now < this.due) return;
    this.due = now + PIECE_MS;
    const end = this.held.lastIndexOf(" ") + 1;
    if (end) this.element.textContent = this.held.slice(0, end);
    this.held = this.held.slice(end);
  }

  end(words) {
    this.element.textContent = `${this.held} ${words}`.trim();
    this.held = "";
  }
}
