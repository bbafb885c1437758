/* The route graph that the page holds: its edges, pruned as RouteGraph.prune does, and their layout.

   html.py joins this file, drawing.js and pointing.js within one function. A node is a number,
   level * T + position: level 0 is the embeddings, and layer l has mid at level 2l + 1 and post at
   2l + 2. Token text reaches the page only through textContent. */
const SHOW_ALL = 40; // longest text, in tokens, that is shown completely (as in labels.py)
const COLUMN = { least: 26, most: 96, gap: 16 };
const LAYER = { least: 20, most: 100 };
const PAD = { top: 16, bottom: 14, side: 20, axis: 44 };
const UPRIGHT_BELOW = 56, UPRIGHT_MOST = 112; // labels: width of a column, height of the strip
const MID = 0.6; // height of mid within its layer
const HEADS_SHOWN = 12, ROWS_LISTED = 200;
const SVG = "http://www.w3.org/2000/svg";

const graph = JSON.parse(document.getElementById("data").textContent);
const T = graph.tokens.length, L = graph.n_layers;
const $ = (id) => document.getElementById(id);
const [svg, tip, slider, scroller] = [$("graph"), $("tip"), $("threshold"), $("scroller")];

const MARKS = { " ": "·", "\n": "↵", "\t": "⇥" };

/* Runs of a token: [text, true for marks of invisible characters]. */
function runs(token) {
  if (!token) return [["∅", true]];
  const piece = /^(.+) ([1-9]\d?)\/([1-9]\d?)$/s.exec(token); // of a character (characters.py)
  if (piece && piece[3] > 1 && Number(piece[2]) <= Number(piece[3])) {
    return [...runs(piece[1]), [` ${piece[2]}/${piece[3]}`, true]];
  }
  const out = [];
  const put = (text, mark) => {
    if (out.length && out[out.length - 1][1] === mark) out[out.length - 1][0] += text;
    else out.push([text, mark]);
  };
  for (const char of token) {
    const code = char.codePointAt(0);
    if (char in MARKS) put(MARKS[char], true);
    else if (/[\p{C}\p{Z}]/u.test(char)) {
      put(`‹${code.toString(16).toUpperCase().padStart(4, "0")}›`, true);
    } else if (!out.length || out[out.length - 1][1]) put((/\p{M}/u.test(char) ? "◌" : "") + char, false);
    else put(char, false);
  }
  return out;
}
const visible = (token) => runs(token).map(([text]) => text).join("");

function element(name, className, ...children) {
  const out = document.createElement(name);
  if (className) out.className = className;
  out.append(...children); // strings become text nodes
  return out;
}
function fillToken(at, token) {
  at.replaceChildren(...runs(token).map(([text, mark]) => mark ? element("span", "mark", text) : text));
  return at;
}
const tokenText = (position) => fillToken(element("bdi", "token"), graph.tokens[position]);
const at = (position) => element("span", "at", ` #${position}`);
const digits = (x) => x === 0 ? "0" : x < 0.0005 ? x.toExponential(1) : x.toFixed(3);
const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)}%`;

const headsOf = new Map(); // "layer,target,source" -> [{head, weight}]
{
  const { layer, head, target, source, weight } = graph.head_edges;
  layer.forEach((l, i) => {
    const key = `${l},${target[i]},${source[i]}`;
    if (!headsOf.has(key)) headsOf.set(key, []);
    headsOf.get(key).push({ head: head[i], weight: weight[i] });
  });
}
const KINDS = { attention: "attention", ffn: "ffn", residual_mid: "residual", residual_post: "residual" };
const byLayer = Array.from({ length: L }, () => []);
graph.edges.layer.forEach((layer, i) => {
  const kind = graph.edges.kind[i], target = graph.edges.target[i], source = graph.edges.source[i];
  const parallel = graph.parallel[layer];
  const intoPost = parallel || kind === "ffn" || kind === "residual_post";
  byLayer[layer].push({
    layer, kind, target, source, intoPost,
    looks: KINDS[kind],
    weight: graph.edges.weight[i],
    heads: kind === "attention" ? headsOf.get(`${layer},${target},${source}`) ?? [] : [],
    above: (2 * layer + (intoPost ? 2 : 1)) * T + target,
    below: kind === "attention"
      ? 2 * graph.value_layers[layer] * T + source
      : (2 * layer + (intoPost && !parallel ? 1 : 0)) * T + source,
  });
});
const span = graph.span ?? { positions: [graph.position], weights: [1], predictions: [graph.predictions] };
const tops = span.positions.map((position, i) => [2 * L * T + position, span.weights[i]]);
const unattributed = new Set(graph.unattributed.map(
  (n) => (2 * n.layer + (n.kind === "post" ? 2 : 1)) * T + n.position));
const total = graph.edges.layer.length;

/* The edges kept at a threshold, with their weights there, and the flow into every node reached: the
   weight of all paths from the prediction to it, in a span times the prediction's weight. Weights
   are compared to the threshold as float32. */
function prune(threshold) {
  const limit = Math.fround(threshold), byHead = graph.granularity === "head";
  const flow = new Map(tops), kept = [];
  const take = (edge) => {
    if (!flow.has(edge.above)) return;
    let { weight, heads } = edge;
    if (byHead && edge.kind === "attention") {
      heads = heads.filter((h) => h.weight > limit);
      weight = Math.min(1, heads.reduce((sum, h) => sum + h.weight, 0));
    }
    if (!(weight > limit)) return;
    const through = flow.get(edge.above) * weight;
    flow.set(edge.below, (flow.get(edge.below) ?? 0) + through);
    kept.push({ ...edge, weight, heads, through });
  };
  for (let layer = L - 1; layer >= 0; layer--) {
    byLayer[layer].filter((e) => e.intoPost).forEach(take);
    byLayer[layer].filter((e) => !e.intoPost).forEach(take);
  }
  return { kept, flow };
}

function layOut(flow) {
  const used = new Uint8Array(T).fill(T <= SHOW_ALL ? 1 : 0);
  for (const node of flow.keys()) used[node % T] = 1;
  const columns = [];
  for (let i = 0; i < T; i++) {
    const last = columns[columns.length - 1];
    if (!used[i] && last?.gap) last.last = i;
    else columns.push({ first: i, last: i, gap: !used[i] });
  }
  const gaps = columns.filter((c) => c.gap).length;
  const room = scroller.clientWidth - PAD.axis - 2 * PAD.side;
  const fit = (room - gaps * COLUMN.gap) / (columns.length - gaps);
  const width = Math.max(COLUMN.least, Math.min(COLUMN.most, fit));
  const span = gaps * COLUMN.gap + (columns.length - gaps) * width;
  let edge = PAD.side + Math.max(0, (room - span) / 2);
  const x = new Float64Array(T).fill(NaN);
  for (const column of columns) {
    column.left = edge;
    column.width = column.gap ? COLUMN.gap : width;
    if (!column.gap) x[column.first] = edge + width / 2;
    edge += column.width;
  }
  return { columns, width, x, across: Math.max(span, room) + 2 * PAD.side };
}
function levelHeights(roomBelow) {
  const height = Math.max(LAYER.least, Math.min(LAYER.most, (roomBelow - PAD.top - PAD.bottom) / L));
  const y = new Float64Array(2 * L + 1);
  for (let l = 0; l <= L; l++) y[2 * l] = PAD.top + (L - l) * height;
  for (let l = 0; l < L; l++) y[2 * l + 1] = y[2 * l] - MID * height;
  return { y, height };
}

/* Four control points of an edge. */
function curve(edge, x, y, width) {
  const x0 = x[edge.source], x1 = x[edge.target];
  const y0 = y[Math.floor(edge.below / T)], y1 = y[Math.floor(edge.above / T)];
  if (edge.looks === "residual") return [x0, y0, x0, y0, x1, y1, x1, y1];
  if (edge.source !== edge.target) return [x0, y0, x0, y1, x1, y0, x1, y1];
  const bow = Math.min(0.42 * width, 20) * (edge.looks === "ffn" ? 1 : -1);
  const lean = 0.1 * (y1 - y0);
  return [x0, y0, x0 + bow, y0 + lean, x0 + bow, y1 - lean, x1, y1];
}
function pointOn(c, s) {
  const r = 1 - s, [a, b, d, e] = [r * r * r, 3 * r * r * s, 3 * r * s * s, s * s * s];
  return [a * c[0] + b * c[2] + d * c[4] + e * c[6], a * c[1] + b * c[3] + d * c[5] + e * c[7]];
}
