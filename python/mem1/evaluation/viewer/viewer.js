"use strict";

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent);
const RECORDS = DATA.trajectories;
const VOCABULARY = new Vocabulary(DATA.vocabulary);
const MAIN_FIGURES = "reward exact_match f1 success turns tokens peak_tokens invalid_actions".split(" ");
const turns = new Turns($("turns"));

let shown = []; // records that pass the filters, in order
let selected = null; // the Trajectory in the detail view
let query = -1; // the token whose view of the memory is shown

// --- The list ---------------------------------------------------------------------------------------------

const figure = (record, name) => record.metrics[name] ?? null;
const phrase = (name) => name.replaceAll("_", " ");

function makeRow(record) {
  const { name, agent, objectives, finish_reason: end } = record;
  const facts = [
    `${objectives} objective${objectives === 1 ? "" : "s"}`,
    `${formatted(figure(record, "turns"))} turns`,
    `peak ${formatted(figure(record, "peak_tokens"))}`,
    ...(figure(record, "exact_match") === null ? [] : [`EM ${formatted(figure(record, "exact_match"))}`]),
  ];
  const row = make(
    "button",
    { type: "button", class: "row" },
    make("span", { class: "name" }, name),
    make("span", { class: "figure", title: "reward" }, formatted(figure(record, "reward"))),
    make("span", { class: "agent" }, agent),
    make("span", { class: "end", "data-end": end }, phrase(end)),
    make("span", { class: "facts" }, facts.join(" \u00b7 ")),
  );
  row.addEventListener("click", () => select(record));
  return row;
}

function fillChoices(select, values, name = String) {
  for (const value of values) select.append(make("option", { value }, name(value)));
}

function startList() {
  for (const record of RECORDS) record.row = make("li", {}, makeRow(record));
  const distinct = (values) => [...new Set(values)].sort();
  const agents = distinct(RECORDS.map((record) => record.agent));
  fillChoices($("agent"), agents.filter(Boolean));
  $("agent").hidden = agents.length < 2;
  fillChoices($("finish"), distinct(RECORDS.map((record) => record.finish_reason)), phrase);
  fillChoices(
    $("scope"),
    distinct(RECORDS.flatMap((record) => record.parts.map(([kind]) => kind))),
    kindName,
  );
  const names = new Set(RECORDS.flatMap((record) => Object.keys(record.metrics)));
  fillChoices($("sort"), ["objectives", ...names], phrase);
}

function fits(record, words) {
  const reward = figure(record, "reward");
  return (
    (!$("agent").value || record.agent === $("agent").value) &&
    (!$("finish").value || record.finish_reason === $("finish").value) &&
    ($("lowest").value === "" || (reward !== null && reward >= Number($("lowest").value))) &&
    ($("highest").value === "" || (reward !== null && reward <= Number($("highest").value))) &&
    (!words || contains(record, VOCABULARY, words, $("scope").value))
  );
}

function sorted(records) {
  const by = $("sort").value;
  const sign = $("descending").getAttribute("aria-pressed") === "true" ? -1 : 1;
  if (!by) return sign > 0 ? records : records.toReversed();
  if (by === "name")
    return records.toSorted((a, b) => sign * a.name.localeCompare(b.name, "en", { numeric: true }));
  const value = (record) => (by === "objectives" ? record.objectives : figure(record, by));
  const missing = records.filter((record) => value(record) === null);
  return [
    ...records.filter((record) => value(record) !== null).toSorted((a, b) => sign * (value(a) - value(b))),
    ...missing,
  ];
}

const searched = () => $("search").value.trim().toLowerCase();

/** Apply filters and order, and show the first that is left if the selected one is not. */
function refresh() {
  const words = searched();
  shown = sorted(RECORDS.filter((record) => fits(record, words)));
  $("list").replaceChildren(...shown.map((record) => record.row));
  const means = ["reward", "exact_match", "peak_tokens"].flatMap((name) => {
    const values = shown.map((record) => figure(record, name)).filter((value) => value !== null);
    const sum = values.reduce((total, value) => total + value, 0);
    return values.length ? [`${phrase(name)} ${formatted(sum / values.length)}`] : [];
  });
  const count = `${formatted(shown.length)} of ${formatted(RECORDS.length)}`;
  $("totals").textContent = [count, ...(means.length ? [`mean ${means.join(", ")}`] : [])].join(" \u00b7 ");
  $("nothing").hidden = shown.length > 0;
  if (!shown.length) $("detail").hidden = true;
  else select(shown.includes(selected?.record) ? selected.record : shown[0]);
}

/** Go `step` rows down the list. */
function walk(step) {
  const next = shown[shown.indexOf(selected?.record) + step];
  if (next) select(next);
}

// --- One trajectory ---------------------------------------------------------------------------------------

function fillDefinitions(list, entries) {
  list.replaceChildren(
    ...entries.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))),
  );
}

function select(record) {
  selected?.record.row.firstChild.removeAttribute("aria-current");
  record.row.firstChild.setAttribute("aria-current", "true");
  record.row.scrollIntoView({ block: "nearest" });
  const same = selected?.record === record;
  if (!same) selected = new Trajectory(record, VOCABULARY);
  $("detail").hidden = false;
  showSummary(record);
  turns.show(selected, searched(), $("scope").value);
  fillLegend();
  $("stepper").hidden = $("panels").hidden = !selected.length;
  $("turn").max = Math.max(0, selected.turns.length - 1);
  if (!same) window.scrollTo(0, 0);
  if (!selected.length) return;
  see(same ? query : selected.turns.at(-1).query);
  turns.firstHit?.scrollIntoView({ block: "center" });
}

function showSummary(record) {
  $("name").textContent = record.name;
  const { model, prune } = record.settings;
  const tags = [record.agent, phrase(record.finish_reason), `prune=${prune}`, model, ...record.failures];
  $("tags").replaceChildren(...tags.filter(Boolean).map((tag) => make("span", { class: "tag" }, tag)));
  $("error").textContent = record.error;
  $("error").hidden = !record.error;
  const entries = Object.entries(record.metrics).map(([name, value]) => [phrase(name), formatted(value)]);
  const main = MAIN_FIGURES.map(phrase);
  fillDefinitions(
    $("figures"),
    entries.filter(([name]) => main.includes(name)),
  );
  const settings = Object.entries(record.settings).map(([name, value]) => [phrase(name), value ?? "\u2013"]);
  fillDefinitions($("settings"), [...entries.filter(([name]) => !main.includes(name)), ...settings]);
  $("notes").textContent = record.notes;
}

function fillLegend() {
  const kinds = [...new Set(selected.parts.map((part) => part.kind))];
  const entry = (name, colour) => {
    const item = make("li", {}, name);
    item.style.setProperty("--kind", colour);
    return item;
  };
  $("legend").replaceChildren(
    ...kinds.map((kind) => entry(kindName(kind), colourOf(kind))),
    entry("pruned", "var(--pruned)"),
  );
}

/** Show the memory as `token` sees it. */
function see(token) {
  query = Math.min(selected.length - 1, Math.max(0, token));
  turns.see(query);
  drawPictures();
  inspect(query);
  const part = selected.part(query);
  const place = selected.turns.findIndex(({ turn }) => turn === part.turn);
  const live = selected.live[query];
  const name = part.turn ? `Turn ${part.turn}` : "Prompt";
  $("turn").value = place;
  $("turn").setAttribute("aria-valuetext", name);
  $("moment").replaceChildren(
    make("strong", {}, name),
    ` of ${selected.turns.at(-1).turn} \u00b7 token ${formatted(query)} (${kindName(part.kind)}) sees `,
    make("strong", { id: "live-count" }, formatted(live)),
    " tokens, ",
    make("strong", { id: "pruned-count" }, formatted(query + 1 - live)),
    " are pruned",
  );
}

/** Show the memory at the end of the `place`-th turn. */
function seeTurn(place) {
  const turn = selected?.turns[place];
  if (!turn) return;
  see(turn.query);
  turns.reveal(turn.turn);
}

function stepTurn(step) {
  if (selected?.length) seeTurn(Number($("turn").value) + step);
}

function stepToken(step) {
  if (selected?.length) see(query + step);
}

function drawPictures() {
  drawMask($("mask"), selected, query);
  drawLive($("live"), selected, query);
  const peak = formatted(figure(selected.record, "peak_tokens"));
  $("mask").setAttribute("aria-label", `${formatted(selected.length)} tokens, at most ${peak} seen at once`);
  $("live").setAttribute("aria-label", `At most ${peak} tokens are live`);
}

/** Say all there is to say about a token. */
function inspect(token) {
  const { places, vocabulary, logprobs, rolloutLogprobs, rewards } = selected;
  const part = selected.part(token);
  const piece = vocabulary.pieces[places[token]];
  const text =
    piece.special ?? (typeof piece === "string" ? JSON.stringify(piece) : `bytes ${piece.join(" ")}`);
  const nats = (value) =>
    Number.isNaN(value) ? "\u2013" : `${value.toFixed(4)} (p ${Math.exp(value).toPrecision(3)})`;
  fillDefinitions($("token"), [
    ["text", text],
    ["index", `${formatted(token)}, id ${vocabulary.ids[places[token]]}`],
    ["part", part.turn ? `${kindName(part.kind)} of turn ${part.turn}` : part.kind],
    ["log-prob", nats(logprobs[token])],
    ["rollout log-prob", nats(rolloutLogprobs[token])],
    ["reward", (rewards.get(token) ?? [null]).map(formatted).join(", ")],
    ["evict", part.pruned === null ? "never" : `token ${formatted(part.evict)}, in turn ${part.pruned}`],
    ["memory", query < token ? "not yet written" : query < part.evict ? "live" : "pruned"],
  ]);
}

// --- Events -----------------------------------------------------------------------------------------------

const KEYS = {
  j: () => walk(1),
  k: () => walk(-1),
  ArrowRight: () => stepTurn(1),
  ArrowLeft: () => stepTurn(-1),
  "/": () => $("search").focus(),
};
const SHIFTED_KEYS = { ArrowRight: () => stepToken(1), ArrowLeft: () => stepToken(-1) };

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([type=range]), select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const act = (event.shiftKey && SHIFTED_KEYS[event.key]) || KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function tokenUnder(event) {
  const element = event.target.closest(".token");
  return element ? Number(element.dataset.token) : -1;
}

function listen() {
  for (const id of ["agent", "finish", "lowest", "highest", "sort", "scope"])
    $(id).addEventListener("input", refresh);
  let waiting = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 150);
  });
  $("descending").addEventListener("click", ({ currentTarget: button }) => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    refresh();
  });
  $("turn").addEventListener("input", () => seeTurn(Number($("turn").value)));
  $("before").addEventListener("click", () => stepTurn(-1));
  $("after").addEventListener("click", () => stepTurn(1));
  $("turns").addEventListener("click", (event) => tokenUnder(event) >= 0 && see(tokenUnder(event)));
  $("turns").addEventListener("mouseover", (event) => tokenUnder(event) >= 0 && inspect(tokenUnder(event)));
  $("turns").addEventListener("mouseleave", () => selected?.length && inspect(query));
  $("mask").addEventListener("click", (event) => see(pairAt($("mask"), selected, event)[0]));
  $("mask").addEventListener("mousemove", (event) => {
    const [row, key] = pairAt($("mask"), selected, event);
    const what = key > row ? "not yet written" : row < selected.evict[key] ? "live" : "pruned";
    $("pair").textContent = `at token ${formatted(row)}, token ${formatted(key)} is ${what}`;
  });
  $("live").addEventListener("click", (event) => see(tokenAt($("live"), selected, event)));
  $("colour").addEventListener("input", () => {
    document.body.dataset.colour = $("colour").value;
  });
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", () => selected?.length && drawPictures());
  matchMedia("(prefers-color-scheme: dark)").addEventListener(
    "change",
    () => selected?.length && drawPictures(),
  );
}

startList();
listen();
refresh();
