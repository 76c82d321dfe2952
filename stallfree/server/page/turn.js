// One turn of the conversation on the page: a question, and the answer that grows. Who answers is not known here.

const BLOCK = 2000; // characters; the browser lays out a whole block for each text that is appended to it

// Text that grows. New text is appended to one text node; after `BLOCK` characters, the next line begins a new block with a node of
// its own. So an event costs what is new, however long the answer is. A line break at the end of a block shows no line of its own.
class GrowingText {
  constructor(element) {
    this.element = element;
    element.replaceChildren();
    this.begin();
  }

  begin() {
    this.node = document.createTextNode("");
    const block = document.createElement("span");
    block.append(this.node);
    this.element.append(block);
  }

  append(text) {
    const end = this.node.length > BLOCK ? text.indexOf("\n") + 1 : 0;
    if (end) {
      this.node.appendData(text.slice(0, end));
      this.begin();
    }
    this.node.appendData(text.slice(end));
  }
}

export class Turn {
  constructor(question) {
    this.question = question;
    this.element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
    this.reasoning = this.part(".reasoning");
    this.again = this.part(".again");
    this.part(".question").textContent = question;
    this.begin();
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  // Without an answer, as at first.
  begin() {
    this.content = "";
    this.reasoning.hidden = true;
    this.reasoning.open = false;
    this.text = new GrowingText(this.part(".text"));
    this.thoughts = new GrowingText(this.part(".thoughts"));
    this.trouble("");
    this.note("waiting for the first token");
  }

  think(text) {
    if (this.reasoning.hidden) this.reasoning.open = true;
    this.reasoning.hidden = false;
    this.thoughts.append(text);
  }

  write(text) {
    if (!this.content) this.reasoning.open = false;
    this.content += text;
    this.text.append(text);
  }

  end(note) {
    this.reasoning.open = false;
    this.note(note);
  }

  note(text) {
    this.part(".note").textContent = text;
  }

  trouble(text) {
    this.part(".trouble").textContent = text;
    this.again.textContent = text ? "Try again" : "Regenerate";
  }
}
