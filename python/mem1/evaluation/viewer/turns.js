"use strict";

const AT_ONCE = 2000; // tokens of a part that are shown before someone asks for more
const MORE = 20000;
const DEEPEST = 6; // nats below 0 (log-prob), or between two log-probs, where a colour is full

/** The cards of a trajectory's turns in `root`. */
class Turns {
  constructor(root) {
    this.root = root;
    this.tokens = new Map(); // element of each token that is shown
  }

  /** Show a trajectory; `words`, in lower case, are marked in parts of `kind` (all if empty). */
  show(trajectory, words, kind) {
    this.trajectory = trajectory;
    this.words = words;
    this.kind = kind;
    this.tokens.clear();
    this.views = trajectory.parts.map((part) => this.#partView(part));
    this.root.replaceChildren(
      ...trajectory.turns.map(({ turn, begin, end }) => {
        const invalid = trajectory.record.invalid_turns.includes(turn) ? ", no valid action" : "";
        const name = turn ? `Turn ${turn}${invalid}` : "Prompt";
        const card = make("article", { class: "card", "data-turn": turn, "aria-label": name });
        if (turn) card.append(make("h3", {}, name));
        card.append(
          ...this.views.filter(({ part }) => begin <= part.begin && part.end <= end).map((view) => view.root),
        );
        return card;
      }),
    );
  }

  /** Show what `query` sees: parts that it does not see any more are struck out, later ones pale. */
  see(query) {
    const { trajectory } = this;
    this.query = query;
    for (const view of this.views) {
      const { part } = view;
      const life = trajectory.life(part, query);
      view.root.dataset.life = life;
      const pruned = part.pruned === null ? "never pruned" : `pruned in turn ${part.pruned}`;
      view.life.textContent = { unwritten: "not yet written", live: "live", pruned }[life];
      view.life.title = `${pruned}; seen by tokens ${part.begin} to ${part.evict - 1}`;
      this.#cut(view);
    }
    this.root.querySelector(".now")?.classList.remove("now");
    this.tokens.get(query)?.classList.add("now");
    const { turn } = trajectory.part(query);
    for (const card of this.root.children) {
      if (Number(card.dataset.turn) === turn) card.setAttribute("aria-current", "step");
      else card.removeAttribute("aria-current");
    }
  }

  /** Bring a turn into view. */
  reveal(turn) {
    this.root.querySelector(`[data-turn="${turn}"]`)?.scrollIntoView({ block: "nearest" });
  }

  /** The element of the first token that is marked, null if there is none. */
  get firstHit() {
    return this.root.querySelector(".hit");
  }

  /** Make tokens pale that are written after the query, if it is one of the same part. */
  #cut(view) {
    const { part } = view;
    const last = part.begin <= this.query && this.query < part.end ? this.query : part.end;
    if (last === view.last) return;
    view.last = last;
    for (let token = part.begin; token < view.next; token++)
      this.tokens.get(token).classList.toggle("unwritten", token > last);
  }

  #partView(part) {
    const life = make("span", { class: "life" });
    const text = make("div", { class: "text" });
    const head = make(
      "header",
      {},
      make("span", { class: "kind" }, kindName(part.kind)),
      this.#facts(part),
      life,
    );
    const root = make("section", { class: "part", "data-kind": part.kind }, head, text);
    root.style.setProperty("--kind", colourOf(part.kind));
    const read = this.trajectory.vocabulary.reader();
    const view = { part, root, life, text, read, next: part.begin }; // next: the first that is not shown
    this.#fill(view, AT_ONCE);
    return view;
  }

  #facts(part) {
    const { logprobs } = this.trajectory;
    const facts = [`${formatted(part.end - part.begin)} tokens`];
    if (part.written) {
      const sum = logprobs.subarray(part.begin, part.end).reduce((total, logprob) => total + logprob, 0);
      facts.push(`mean log-prob ${formatted(sum / (part.end - part.begin))}`);
    }
    return make("span", { class: "facts" }, facts.join(" \u00b7 "));
  }

  /** Show `count` more tokens of a part, and a button for the rest. */
  #fill(view, count) {
    const { part, read, text } = view;
    const [begin, end] = [view.next, Math.min(part.end, view.next + count)];
    const texts = [];
    for (let token = begin; token < end; token++)
      texts.push(read(this.trajectory.places[token], token + 1 === part.end));
    const hits = this.kind && part.kind !== this.kind ? new Set() : marked(texts, this.words);
    const elements = texts.flatMap((piece, n) => {
      const element = this.#token(begin + n, piece, hits.has(n));
      this.tokens.set(begin + n, element);
      return [element, ...this.#rewards(begin + n)];
    });
    text.append(...elements);
    view.next = end;
    view.last = part.end; // none of the new ones is pale
    if (end < part.end) text.append(this.#more(view));
  }

  #more(view) {
    const rest = view.part.end - view.next;
    const words = `${formatted(Math.min(rest, MORE))} more of ${formatted(rest)} tokens`;
    const button = make("button", { type: "button", class: "rest" }, words);
    button.addEventListener("click", () => {
      button.remove();
      this.#fill(view, MORE);
      this.#cut(view);
    });
    return button;
  }

  #token(token, piece, hit) {
    const { trajectory } = this;
    const element = make("span", { class: "token", "data-token": token }, piece);
    if (trajectory.vocabulary.special(trajectory.places[token]) !== undefined)
      element.classList.add("special");
    if (hit) element.classList.add("hit");
    const logprob = trajectory.logprobs[token];
    if (Number.isNaN(logprob)) return element;
    const gap = logprob - trajectory.rolloutLogprobs[token];
    element.style.setProperty("--logprob", share(logprob));
    element.style.setProperty("--gap", share(gap));
    return element;
  }

  #rewards(token) {
    return (this.trajectory.rewards.get(token) ?? []).map((reward) => {
      const sign = reward > 0 ? "+" : "";
      const name = reward === null || reward <= 0 ? "reward penalty" : "reward";
      return make("span", { class: name, title: `reward behind token ${token}` }, sign + formatted(reward));
    });
  }
}

/** From 0 to 1: how strong a colour. */
function share(nats) {
  return Math.min(1, Math.abs(nats) / DEEPEST).toFixed(3);
}

/** Which of the tokens with these texts touch an occurrence of `words`. */
function marked(texts, words) {
  const hits = new Set();
  if (!words) return hits;
  const lower = texts.map((text) => text.toLowerCase());
  const whole = lower.join("");
  let [token, end] = [0, 0]; // where the text of `token` ends is `end` + its length
  for (let found = whole.indexOf(words); found >= 0; found = whole.indexOf(words, found + words.length)) {
    while (end + lower[token].length <= found) end += lower[token++].length;
    let [last, reach] = [token, end];
    while (reach < found + words.length) {
      if (lower[last].length) hits.add(last);
      reach += lower[last++].length;
    }
  }
  return hits;
}
