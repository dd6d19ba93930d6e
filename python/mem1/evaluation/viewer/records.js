"use strict";

/** The numbers in a base64 text, little-endian as all that browsers run on. */
function unpack(base64, Numbers) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) bytes[n] = text.charCodeAt(n);
  return new Numbers(bytes.buffer);
}

const ENCODER = new TextEncoder();

/** The tokens that occur on the page: `ids`, and of each its text, its bytes or, without a text, its name. */
class Vocabulary {
  constructor({ ids, pieces }) {
    this.ids = ids;
    this.pieces = pieces;
  }

  /** The name of a token that has no text, else undefined. */
  special(place) {
    return this.pieces[place].special;
  }

  /** A function from the tokens of a run, one after another, to the text that each is shown as.
   *
   * A character whose bytes are spread over tokens goes to the last of them; bytes that are none
   * become U+FFFD.
   */
  reader() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    let split = false; // the decoder may hold bytes
    return (place, last) => {
      const piece = this.pieces[place];
      if (piece.special !== undefined) return piece.special + (split && last ? decoder.decode() : "");
      if (typeof piece === "string" && !split) return piece;
      split = typeof piece !== "string";
      return decoder.decode(split ? Uint8Array.from(piece) : ENCODER.encode(piece), { stream: !last });
    };
  }

  /** The text of the tokens at `places`, which are a run. */
  text(places) {
    const read = this.reader();
    let text = "";
    for (let n = 0; n < places.length; n++) text += read(places[n], n === places.length - 1);
    return text;
  }
}

/** Of each token of a record, its place in the vocabulary. */
function placesOf(record) {
  return unpack(record.tokens, record.wide ? Uint32Array : Uint16Array);
}

/** A trajectory with its numbers at hand.
 *
 * parts: runs of tokens {kind, turn, begin, end, evict, pruned, written}; token j is seen by query i if and
 * only if j <= i < evict, and `pruned` is the turn in which that ends, null if it never does.
 * turns: {turn, begin, end, query}, where `query` is the last token that the policy wrote in it, the last one
 * of all where it wrote none.
 * live: how many tokens each query sees, itself included.
 */
class Trajectory {
  constructor(record, vocabulary) {
    this.record = record;
    this.vocabulary = vocabulary;
    this.places = placesOf(record);
    this.length = this.places.length;
    this.parts = [];
    this.turns = [];
    this.evict = new Int32Array(this.length);
    this.logprobs = new Float32Array(this.length).fill(NaN); // NaN: not the policy's
    this.rolloutLogprobs = new Float32Array(this.length).fill(NaN);
    this.rewards = new Map();
    for (const [token, reward] of record.rewards) {
      this.rewards.set(token, [...(this.rewards.get(token) ?? []), reward]);
    }
    this.#readParts();
    this.live = this.#liveCounts();
  }

  #readParts() {
    const logprobs = unpack(this.record.logprobs, Float32Array);
    const rollout =
      this.record.rollout_logprobs === null ? logprobs : unpack(this.record.rollout_logprobs, Float32Array);
    let [begin, written] = [0, 0];
    for (const [kind, turn, length, evict, policy] of this.record.parts) {
      const end = begin + length;
      this.parts.push({ kind, turn, begin, end, evict, written: policy });
      this.evict.fill(evict, begin, end);
      if (policy) {
        this.logprobs.set(logprobs.subarray(written, written + length), begin);
        this.rolloutLogprobs.set(rollout.subarray(written, written + length), begin);
        written += length;
      }
      if (this.turns.at(-1)?.turn !== turn) this.turns.push({ turn, begin, query: -1 });
      const last = this.turns.at(-1);
      last.end = end;
      if (policy) last.query = end - 1;
      begin = end;
    }
    for (const turn of this.turns) if (turn.query < 0) turn.query = turn.end - 1;
    for (const part of this.parts) part.pruned = part.evict < begin ? this.part(part.evict - 1).turn : null;
  }

  #liveCounts() {
    // A token adds one at its own index and takes it back at `evict`; the running sum is what is live.
    const live = new Int32Array(this.length + 1);
    for (const part of this.parts) {
      for (let token = part.begin; token < part.end; token++) live[token] += 1;
      live[part.evict] -= part.end - part.begin;
    }
    for (let token = 1; token < live.length; token++) live[token] += live[token - 1];
    return live.subarray(0, this.length);
  }

  /** The part that a token belongs to. */
  part(token) {
    return this.parts.find((part) => token < part.end);
  }

  /** Whether the part is "unwritten", "live" or "pruned" for a query. */
  life(part, query) {
    return query < part.begin ? "unwritten" : query < part.evict ? "live" : "pruned";
  }
}

/** The text of each part of a record in lower case: [kind, text]. Made once, when first searched. */
function searchable(record, vocabulary) {
  if (!record.searchable) {
    const places = placesOf(record);
    let end = 0;
    record.searchable = record.parts.map(([kind, , length]) => {
      end += length;
      return [kind, vocabulary.text(places.subarray(end - length, end)).toLowerCase()];
    });
  }
  return record.searchable;
}

/** Whether `words`, in lower case, occur in a part of this kind; of any kind if `kind` is empty. */
function contains(record, vocabulary, words, kind) {
  return searchable(record, vocabulary).some(([of, text]) => (!kind || of === kind) && text.includes(words));
}

const [WHOLE, LARGE, SMALL] = [
  { maximumFractionDigits: 0 },
  { minimumFractionDigits: 2, maximumFractionDigits: 2 },
  { minimumFractionDigits: 2, maximumFractionDigits: 4 },
].map((digits) => new Intl.NumberFormat("en", digits));

/** A number for people to read; null, which stands for none, as a dash. */
function formatted(value) {
  if (value === null || value === undefined) return "\u2013";
  if (!Number.isFinite(value)) return String(value);
  const format =
    Number.isInteger(value) || Math.abs(value) >= 100 ? WHOLE : Math.abs(value) >= 0.01 ? LARGE : SMALL;
  return format.format(value + 0); // without the sign of -0
}

/** An element with attributes and children; strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
