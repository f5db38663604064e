// The run: the recorded events, played back on the clock, in lanes, as bars of the cache, as text.
"use strict";
const PACE = 700;  // milliseconds an event while playing
const COLOURS = ["#56b4e9", "#e69f00", "#cc79a7", "#f0e442"], FULL_COLOUR = "#009e73";  // Okabe and Ito's
const LINES = ["dotted", "dashed", "double", "wavy"];  // under the text, by level; the full model's is solid

const $ = id => document.getElementById(id);
const trace = JSON.parse($("trace").textContent);
const { runs, alone } = trace;
const asked = () => /^#(?:(\d+)\.)?(.*)$/.exec(location.hash || "#");  // #event, or #ladder.event
const chosen = Math.min(asked()[1] ?? 0, runs.length - 1), run = runs[chosen];  // the page is drawn anew for another
const { depths, events } = run, full = depths.length - 1;
const address = where => `#${chosen ? `${chosen}.` : ""}${where}`;
const titles = run.names.map((name, k) => k === full ? `${name}, ${depths[k]} layers` : name);
const segments = depths.map((depth, k) => depth - (depths[k - 1] ?? 0));  // layers level k has beyond level k-1
const layers = depths.map((depth, k) => segments[k] ? `layers ${depth - segments[k] + 1}–${depth}` :
  run.names[k] === "draft head" ? "one block" : "no layer");

function make(parent, tag, className = "", text = "") {
  const element = parent.appendChild(document.createElement(tag));
  element.className = className;
  element.textContent = text;  // as text, never as markup
  return element;
}

function paint(element, k, last = full) {  // in the colour of level k; a writer's token also has its underline
  element.dataset.level = k;
  element.style.setProperty("--level", k === last ? FULL_COLOUR : COLOURS[k % COLOURS.length]);
  element.style.textDecorationStyle = k === last ? "solid" : LINES[k % LINES.length];
  return element;
}

function span(element, from, to, all) {  // lay a part of a track
  element.style.left = `${100 * from / all}%`;
  element.style.width = `${100 * (to - from) / all}%`;
  return element;
}

function replay(n) {  // the first n events: every cell ever written, and those that stand or just fell, in order
  const cells = [];
  let text = [], shown = [];
  for (const [i, { level, base, drafts, kept, text: after, pieces }] of events.slice(0, n).entries()) {
    const start = base - trace.prompt_tokens, end = start + Math.min(kept, after.length);  // a stop cuts off the rest
    for (const cell of cells) cell.judged = false;
    for (const cell of text.slice(start)) {
      Object.assign(cell, { judged: true, state: "accepted", marks: cell.marks + "✓" });
    }
    const fallen = text.slice(end);
    for (const cell of fallen) Object.assign(cell, { state: "struck", marks: cell.marks.slice(0, -1) + "✗" });
    const marks = drafts.length === 0 ? "" : kept < drafts.length ? "↺" : "+";  // a correction, a bonus
    const own = pieces.map(piece => ({ piece, level, event: i, state: "drafted", marks }));
    cells.push(...own);
    text = [...text.slice(0, end), ...own];
    shown = [...text.slice(0, end), ...fallen, ...own];
    if (level === full) for (const cell of text) cell.state = "settled";
  }
  return { cells, shown };
}

// drawn once: all tracks, lanes and cells, which `go` then shows as they are after an event
document.title = `${trace.question} | ${trace.model}`;
$("question").textContent = trace.question;
$("about").textContent = `Model ${trace.model}, ladder:`;
runs.forEach(({ names, windows, depths }, i) => {
  const last = names.length - 1;
  const levels = names.map((name, k) => k < last ? `${name} (window ${windows[k]})` : `${name}, ${depths[k]} layers`);
  make($("menu"), "option", "", levels.join(" → ")).selected = i === chosen;
});
$("alone").textContent = `${alone.name}, for as much text`;

// one clock for all that was recorded
const clock = Math.max(...alone.seconds, ...runs.flatMap(({ events }) => events.map(event => event.seconds)), 1e-6);
function track(box, name) {  // a row: its name, its track, what is said at its end
  make(box, "span", "writer", name).style.textDecoration = "none";
  const line = make(box, "div", "track");
  return { line, said: make(box, "span") };
}
function lane(name, seconds, levels, last) {  // on the clock: a block an event, the higher the deeper its level
  const row = track($("race"), name);
  row.blocks = seconds.map((to, i) => {
    const block = make(row.line, "div", i ? "block" : "block prompt-block");
    block.style.height = `${100 * (levels[i] + 1) / (last + 1)}%`;
    return paint(span(block, seconds[i - 1] ?? 0, to, clock), levels[i], last);
  });
  row.now = make(row.line, "div", "now");
  return row;
}
const greedy = lane(alone.name, alone.seconds, alone.seconds.map(() => full), full);
const ladders = runs.map(({ names, events }, i) => {
  const name = names.slice(0, -1).join(", ") || alone.name;
  const row = lane(name, events.map(event => event.seconds), events.map(event => event.level), names.length - 1);
  row.line.onclick = () => { if (i !== chosen) choose(i); };
  if (i === chosen) row.blocks.forEach((block, n) => { block.onclick = () => seek(n + 1); });
  row.line.previousSibling.style.fontWeight = i === chosen ? "bold" : "";
  return row;
});
const axis = track($("race"), "").line;
axis.id = "axis";
const power = 10 ** Math.floor(Math.log10(clock)), spacing = power * [.1, .2, .5, 1, 2].find(s => clock / power / s <= 8);
for (let i = 0; i * spacing < clock; i++) {
  span(make(axis, "span", "", `${Math.round(1e3 * i * spacing)}${i ? "" : " ms"}`), i * spacing, i * spacing, clock);
}

const capacity = trace.prompt_tokens + replay(events.length).shown.filter(cell => cell.state === "settled").length;
const bars = depths.map((depth, k) => {
  if (!segments[k]) return null;
  const row = track($("cache"), layers[k]);
  row.held = paint(make(row.line, "div", "held block"), k);
  row.rolled = make(row.line, "div", "rolled");
  span(make(row.line, "div", "prompt-block"), 0, trace.prompt_tokens, capacity);
  return row;
});

titles.forEach((title, k) => {
  const band = make($("lanes"), "div", "band"), lane = make($("lanes"), "div", "lane");
  for (const element of [band, lane, make(lane, "span", "writer", title)]) paint(element, k);
  make(lane, "small", "", layers[k]);
  band.style.gridRow = lane.style.gridRow = k + 2;
});
$("lanes").style.gridTemplateColumns = `repeat(${events.length + 1}, max-content)`;
const steps = events.map(({ level, drafts, kept }, i) => {
  const tick = make($("lanes"), "div", "tick", i + 1), step = make($("lanes"), "div", "step");
  step.style.gridArea = `${level + 2} / ${i + 2}`;
  tick.style.gridColumn = i + 2;
  tick.onclick = step.onclick = () => seek(i + 1);
  make(step, "span", "verdict", drafts.length ? `✓ ${kept} of ${drafts.length}` : "");
  return step;
});
const drawn = replay(events.length).cells.map(({ piece, level, event }) => {
  const cell = make(steps[event].querySelector("div") ?? make(steps[event], "div"), "span");
  make(cell, "span", "", piece || "⋯");  // its character ends with a later token
  make(cell, "small");
  return paint(cell, level);
});
const marker = make($("lanes"), "div", "marker");
marker.style.gridRow = `1 / ${depths.length + 2}`;
const still = matchMedia("(prefers-reduced-motion: reduce)"), dark = matchMedia("(prefers-color-scheme: dark)");
let now = 0, playing = null, linking = null;

function go(n) {
  now = Math.max(0, Math.min(n, events.length));
  const { cells, shown } = replay(now), settled = shown.filter(cell => cell.state === "settled").length;
  steps.forEach((step, i) => step.classList.toggle("unborn", i >= now));
  drawn.forEach((cell, i) => {
    const { state, judged, marks } = cells[i] ?? { state: "unborn", marks: "" };
    cell.className = `cell ${state}${judged ? " judged" : ""}`;
    cell.lastChild.textContent = marks;
  });
  marker.style.gridColumn = now + 1;
  marker.classList.toggle("unborn", now === 0);
  const left = marker.offsetLeft + marker.offsetWidth - 0.8 * $("lanes").clientWidth;  // the judged stand left of it
  $("lanes").scrollTo({ left, behavior: playing && !still.matches ? "smooth" : "instant" });
  const event = events[now - 1], at = event?.seconds ?? 0, written = alone.seconds.filter(s => s <= at).length;
  race(at, written);
  fill(event);
  write(shown, settled, written);

  const passes = events.slice(0, now).filter(event => event.level === full).length;
  const work = event ? event.positions.reduce((sum, n, k) => sum + n * segments[k], 0) : 0;
  const same = settled && (trace.prompt_tokens + settled - 1) * depths[full];  // the last token is never run
  const counts = { passes, work, settled, took: 1e3 * at };
  const theirs = { passes: settled, work: same, settled, took: settled && 1e3 * alone.seconds[settled - 1] };
  const ended = settled > alone.seconds.length;  // a sampled text may end sooner: there is none as long
  for (const [id, count] of Object.entries(counts)) {
    $(id).textContent = Math.round(count).toLocaleString("en");
    $(`greedy-${id}`).textContent = ended ? "–" : Math.round(theirs[id]).toLocaleString("en");
  }
  $("words").textContent = event?.words ?? "the prompt alone: press play";
  $("count").textContent = `${now} / ${events.length}`;
  $("slider").value = now;
  $("slider").ariaValueText = `event ${now} of ${events.length}`;
  clearTimeout(linking);  // browsers refuse an address that changes too often, as when the slider is dragged
  linking = setTimeout(() => history.replaceState(history.state, "", address(now)), 200);
}

function race(at, written) {  // all lanes at one moment
  const tokens = n => `${n} token${n === 1 ? "" : "s"}`;
  greedy.blocks.forEach((block, i) => block.classList.toggle("ahead", alone.seconds[i] > at));
  greedy.said.textContent = tokens(written);
  ladders.forEach((row, i) => {
    const { events, depths } = runs[i], done = i === chosen ? now : events.filter(({ seconds }) => seconds <= at).length;
    row.blocks.forEach((block, n) => block.classList.toggle("ahead", n >= done));
    const verified = events.slice(0, done).findLast(({ level }) => level === depths.length - 1);
    row.said.textContent = tokens(verified ? verified.base + verified.text.length - trace.prompt_tokens : 0);
  });
  for (const row of [greedy, ...ladders]) span(row.now, at, at, clock).style.width = "";
  const ratio = now === events.length && run.speed_up ? `: ${run.speed_up.toFixed(2)}x as fast after the first token` : "";
  $("race").ariaLabel = `After ${Math.round(1e3 * at)} ms ${alone.name} has written ${greedy.said.textContent}, ` +
    `the ladder has settled ${parseInt(ladders[chosen].said.textContent)}${ratio}.`;
  $("ratio").textContent = $("race").ariaLabel;
}

function fill(event) {  // the bars: what the cache holds, and what it held before the event's rollback
  bars.forEach((row, k) => {
    if (!row) return;
    const held = event?.cache[k] ?? 0, ran = event && k <= event.level ? event.base + event.drafts.length : held;
    span(row.held, 0, held, capacity);
    span(row.rolled, held, Math.max(held, ran), capacity).hidden = ran <= held;
    row.said.textContent = held + (ran > held ? ` −${ran - held}` : "");
  });
  $("cache").ariaLabel = bars.flatMap((row, k) => row ? `${layers[k]}: ${row.said.textContent}` : []).join(", ");
}

function write(shown, settled, written) {  // the text, and in it how far greedy has come by now
  $("text").replaceChildren();
  const add = (tag, className, said) => {
    if (said.startsWith("·")) make($("text"), "wbr");  // a line can break at a space, but not at the dot shown for it
    return make($("text"), tag, className, said.replaceAll("↵", "↵\n"));
  };
  const place = () => { if (alone.same_text && now) make($("text"), "b", "", `◂ ${alone.name} is here`); };
  add("span", "prompt", trace.prompt);
  let standing = 0;
  for (const { piece, level, state } of shown) {
    if (state !== "struck" && standing++ === written) place();
    const tag = state === "struck" ? "del" : "span", className = state === "settled" ? "writer" : "writer tentative";
    paint(add(tag, tag === "del" ? "" : className, piece), level);
  }
  if (standing <= written) place();
  $("text").scrollTop = $("text").scrollHeight;  // the newest in view
}

function play(on) {
  clearInterval(playing);
  playing = on ? setInterval(() => { go(now + 1); if (now === events.length) play(false); }, PACE) : null;
  $("play").textContent = on ? "❚❚ pause" : "▶ play";
  $("play").ariaLabel = on ? "pause" : "play";
  $("words").ariaLive = on ? "off" : "polite";
}

function seek(n) { play(false); go(n); }

function toggle() {
  if (!playing && now === events.length) go(0);  // from the end it plays again
  play(!playing);
}

function wear(theme) {
  document.documentElement.style.colorScheme = theme;
  const other = $("theme").dataset.other = theme === "dark" ? "light" : "dark";
  $("theme").textContent = other;
  $("theme").ariaLabel = `${other} colours`;
}

function turn(tab) {  // to one of the two tabs
  for (const name of ["run", "cost"]) {
    $(name).hidden = name !== tab;
    $(`${name}-tab`).ariaSelected = name === tab;
  }
}

document.addEventListener("keydown", event => {
  const { key, target } = event;
  if ($("run").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
  if (key === " " && target.tagName === "BUTTON") return;
  const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: events.length };
  if (key !== " " && !(key in moves)) return;
  event.preventDefault();  // the page would scroll, or a focused slider move twice
  key === " " ? toggle() : seek(moves[key]);
});
function choose(i) {  // another ladder, at the same moment
  const at = events[now - 1]?.seconds ?? 0, event = runs[i].events.filter(({ seconds }) => seconds <= at).length;
  clearTimeout(linking);
  history.replaceState({ theme: document.documentElement.style.colorScheme }, "", `#${i}.${event}`);
  location.reload();
}

function open() {  // what the address says: a ladder, and of it an event or the cost model
  const [, ladder, where] = asked(), cost = where === "formula";
  if (Math.min(ladder ?? 0, runs.length - 1) !== chosen) return location.reload();
  turn(cost ? "cost" : "run");
  if (cost) play(false); else seek(parseInt(where) || 0);
}
window.addEventListener("hashchange", open);
window.addEventListener("resize", () => { if (!$("run").hidden) go(now); });  // a turned phone keeps it in view
$("run-tab").onclick = () => { turn("run"); go(now); };
$("cost-tab").onclick = () => {
  play(false);
  turn("cost");
  clearTimeout(linking);
  history.replaceState(history.state, "", address("formula"));
};
$("play").onclick = toggle;
$("theme").onclick = () => wear($("theme").dataset.other);
$("menu").onchange = () => choose($("menu").selectedIndex);
$("slider").max = events.length;
$("slider").oninput = () => seek($("slider").valueAsNumber);
wear(history.state?.theme ?? (dark.matches ? "dark" : "light"));
open();
