// The cost model: what a ladder of two exits gains over greedy, by how often its levels agree, what
// they cost and how long their windows are. Each name here is one of the formula's.
"use strict";
const SURE = 1 - 1e-6;  // at 1 the sums below would be 0 / 0
const LONGEST = { nd: Math.max(12, run.point?.nd ?? 0), ni: Math.max(24, run.point?.ni ?? 0) };
const PAPER = { alpha: 0.8, beta: 0.9, d: 1 / 8, i: 1 / 4, f: 1, nd: 2, ni: 4 };  // its exits and windows
const KNOBS = {  // name: [sign, meaning, least, most, step]
  alpha: ["α", "draft, intermediate agree", 0, 1, 0.01],
  beta: ["β", "intermediate, full agree", 0, 1, 0.01],
  d: ["d", "a draft step", 0, 1, 0.005],
  i: ["i", "an intermediate step", 0, 1, 0.005],
  f: ["f", "a full verification", 0.05, 3, 0.01],
  nd: ["N_d", "drafts a round", 1, LONGEST.nd, 1],
  ni: ["N_i", "tokens a verification", 1, LONGEST.ni, 1],
};
const CELLS = 20;  // of the map of rates, each way

const geometric = (rate, n) => (1 - Math.min(rate, SURE) ** (n + 1)) / (1 - Math.min(rate, SURE));

/** Tokens that a full verification brings, and the speed-up over greedy, of windows nd and ni. */
function hispec({ alpha, beta, d, i, f, nd, ni }) {
  const chances = [0];  // of a round that brings so many tokens
  for (let r = 1; r <= nd; r++) chances.push(alpha ** (r - 1) * (1 - alpha));
  chances.push(alpha ** nd);
  const reached = Array(ni + nd + 1).fill(0);  // how likely some round ends at so many tokens
  reached[0] = 1;
  for (let m = 0; m < ni; m++) chances.forEach((chance, r) => { reached[m + r] += reached[m] * chance; });
  let rounds = 0, tokens = 0;
  reached.forEach((chance, m) => { m < ni ? rounds += chance : tokens += chance * geometric(beta, m); });
  return { tokens, gain: tokens / (rounds * (nd * d + i) + f) };
}

/** One exit with its best window: the draft exit or the intermediate, whichever gains more. */
function single({ alpha, beta, d, i, f }) {
  let best = { gain: 0 };
  for (const [exit, rate, cost] of [["draft exit", alpha * beta, d], ["intermediate", beta, i]]) {
    for (let k = 1; k < LONGEST.nd + LONGEST.ni; k++) {
      const tokens = geometric(rate, k), gain = tokens / (k * cost + f);
      if (gain > best.gain) best = { exit, window: k, tokens, gain };
    }
  }
  return best;
}

function bestWindows(at) {
  let best = { gain: 0 };
  for (let nd = 1; nd <= LONGEST.nd; nd++) {
    for (let ni = 1; ni <= LONGEST.ni; ni++) {
      const found = hispec({ ...at, nd, ni });
      if (found.gain > best.gain) best = { ...found, nd, ni };
    }
  }
  return best;
}

const digits = (name, value) => +value.toFixed(name === "d" || name === "i" ? 3 : 2);
let at = { ...(run.point ?? PAPER) };  // where the sliders stand, or exactly where the run was
const inputs = Object.fromEntries(Object.entries(KNOBS).map(([name, [sign, meaning, least, most, step]]) => {
  const knob = make($("knobs"), "label", "knob");
  make(knob, "span", "", `${sign}: ${meaning}`);
  const input = make(knob, "input"), output = make(knob, "output");
  if (run.point) make(knob, "small", "", `run ${digits(name, run.point[name])}`);
  Object.assign(input, { type: "range", min: least, max: Math.max(most, run.point?.[name] ?? 0), step, id: name });
  input.oninput = () => set({ [name]: input.valueAsNumber });
  return [name, { input, output }];
}));

function grid(id, across, up, values) {  // a map, drawn once: its cells, and what each stands for
  $(id).style.gridTemplateColumns = `repeat(${across}, 1fr)`;
  return Array.from({ length: across * up }, (_, n) => {
    const cell = make($(id), "i"), where = values(n % across, up - 1 - Math.floor(n / across));
    cell.onclick = () => set(where);
    return { cell, where };
  });
}
const rates = grid("rates", CELLS, CELLS, (x, y) => ({ alpha: (x + 0.5) / CELLS, beta: (y + 0.5) / CELLS }));
const windows = grid("windows", LONGEST.nd, LONGEST.ni, (x, y) => ({ nd: x + 1, ni: y + 1 }));
$("longest").textContent = LONGEST.nd;
$("upwards").textContent = `Upwards: N_i, tokens a verification, 1 to ${LONGEST.ni}.`;

function mark(id, sign, x, y) {  // by shares of the map's width and height
  const sheet = make($(id), "b", "", sign);
  Object.assign(sheet.style, { left: `${100 * x}%`, bottom: `${100 * y}%`, marginBottom: "-.7em" });
}

function colour({ cell, where }, gain, top) {  // the strongest colour: a gain of top, or a loss by half
  const much = gain < 1 ? -Math.log2(gain) : ((gain - 1) / (top - 1)) ** ("nd" in where ? 2 : 0.8);
  cell.className = gain < 1 ? "loses" : "";
  cell.style.setProperty("--tone", gain < 1 ? "var(--loss)" : "var(--gain)");
  cell.style.setProperty("--much", Math.min(100, Math.round(100 * much)));
  const said = Object.entries(where).map(([name, value]) => `${KNOBS[name][0]} ${digits(name, value)}`);
  cell.title = `${said.join(", ")}: ${gain.toFixed(2)}x`;
}

function set(change) {
  at = { ...at, ...change };
  for (const [name, { input, output }] of Object.entries(inputs)) {
    input.value = at[name];
    output.textContent = digits(name, at[name]);
  }
  const best = bestWindows(at), one = single(at), these = hispec(at);
  for (const id of ["rates", "windows"]) for (const old of $(id).querySelectorAll("b")) old.remove();
  for (const map of [rates, windows]) {
    const gains = map.map(({ where }) => hispec({ ...at, ...where }).gain), top = Math.max(1.01, ...gains);
    map.forEach((item, n) => colour(item, gains[n], top));
  }
  const middle = (n, all) => (n - 0.5) / all;
  const points = [["○", at], ...(run.point ? [["◆", run.point]] : [])];
  for (const [sign, { alpha, beta, nd, ni }] of points) {
    mark("rates", sign, alpha, beta);
    mark("windows", sign, middle(nd, LONGEST.nd), middle(ni, LONGEST.ni));
  }
  mark("windows", "★", middle(best.nd, LONGEST.nd), middle(best.ni, LONGEST.ni));
  const rows = [["", "windows", "tokens a full pass", "over greedy"],
    ["two exits, these windows", `${at.nd}, ${at.ni}`, these.tokens.toFixed(1), `${these.gain.toFixed(2)}x`],
    ["two exits, best windows ★", `${best.nd}, ${best.ni}`, best.tokens.toFixed(1), `${best.gain.toFixed(2)}x`],
    [`one exit, the ${one.exit}, at its best`, one.window, one.tokens.toFixed(1), `${one.gain.toFixed(2)}x`]];
  if (run.speed_up) {
    const verified = events.filter(event => event.level === full).length - 1;  // the first read the prompt
    const tokens = alone.same_text && verified ? ((alone.seconds.length - 1) / verified).toFixed(1) : "–";
    rows.push(["measured in this run", run.windows.join(", ") || "–", tokens, `${run.speed_up.toFixed(2)}x`]);
  }
  $("results").replaceChildren();
  rows.forEach((cells, n) => {
    const row = make($("results"), "tr");
    cells.forEach((said, k) => make(row, n && k ? "td" : "th", "", said));
  });
  $("optimal").onclick = () => set({ nd: best.nd, ni: best.ni });
  $("rates").ariaLabel = `speed-up by rates: at the sliders ${these.gain.toFixed(2)}x`;
  $("windows").ariaLabel = `speed-up by windows: best ${best.nd} and ${best.ni}, ${best.gain.toFixed(2)}x`;
}

$("own").onclick = () => set(run.point);
$("own").hidden = !run.point;
set({});
