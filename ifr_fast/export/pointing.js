/* Describes the edge, node or token under the pointer, and starts the page. */
const byWeight = (heads) => [...heads].sort((a, b) => b.weight - a.weight);
const paragraph = (className, ...children) => element("p", className, ...children);
const NAMES = { attention: "Attention", ffn: "FFN", residual_mid: "Residual past attention", residual_post: "Residual past the FFN" };

function describeEdge(edge) {
  const residual = graph.parallel[edge.layer] && edge.looks === "residual" ? "Residual" : NAMES[edge.kind];
  const out = [paragraph("kind", `${residual}, layer ${edge.layer}`)];
  const ends = [tokenText(edge.source), at(edge.source)];
  if (edge.source !== edge.target) ends.push(" → ", tokenText(edge.target), at(edge.target));
  else if (edge.looks === "attention") ends.push(" → itself");
  out.push(paragraph("", ...ends));
  out.push(paragraph("", `weight ${digits(edge.weight)}`, element("span", "at", ` · flow ${digits(edge.through)}`)));
  const heads = byWeight(edge.heads);
  if (heads.length) {
    const bars = document.createElement("dl");
    for (const { head, weight } of heads.slice(0, HEADS_SHOWN)) {
      const bar = element("div", "bar");
      bar.style.width = `${(100 * weight / heads[0].weight).toFixed(1)}%`;
      bars.append(element("dt", "", `head ${head}`), element("dd", "", bar), element("dd", "", digits(weight)));
    }
    out.push(bars);
    const rest = heads.slice(HEADS_SHOWN);
    if (rest.length) {
      const sum = rest.reduce((s, h) => s + h.weight, 0);
      out.push(paragraph("note", `and ${rest.length} more heads, ${digits(sum)} together`));
    }
  }
  return out;
}
function describeNode(node) {
  const level = Math.floor(node / T), position = node % T, layer = Math.floor((level - 1) / 2);
  const where = level === 0 ? "Embedding" : level % 2 ? `After the attention of layer ${layer}` : `After layer ${layer}`;
  const kind = level === 0 ? "embed" : level % 2 ? "mid" : "post";
  const out = [
    paragraph("kind", tokenText(position), at(position)),
    paragraph("", where, element("span", "at", ` (${kind})`)),
    paragraph("", `importance ${digits(shown.flow.get(node) ?? 0)}`),
  ];
  if (unattributed.has(node)) {
    out.push(paragraph("note alert", "Unattributed: all of its parts have proximity 0, so each got the same weight."));
  }
  return out;
}
function describeColumn({ first, last, gap }) {
  if (gap) {
    const text = graph.tokens.slice(first, Math.min(last + 1, first + 40)).join("");
    const short = [...text].slice(0, 160).join("");
    const span = first === last ? `#${first}: not reached` : `#${first} to #${last}: ${last - first + 1} tokens, not reached`;
    return [paragraph("kind", span), paragraph("note", element("bdi", "", short.replace(/[\p{C}\p{Z}]+/gu, " ") + (short.length < text.length || last - first >= 40 ? " …" : "")))];
  }
  const reached = shown.flow.has(first);
  return [
    paragraph("kind", tokenText(first), at(first), element("span", "at", ` · id ${graph.token_ids[first]}`)),
    paragraph("", reached ? `importance ${digits(shown.flow.get(first))}` : "not reached at this threshold"),
  ];
}

/* The edges on paths that pass an edge or a node: all above it and all below it. */
function trace(hit) {
  shown.links ??= shown.kept.reduce((links, edge) => {
    for (const [side, node] of [["up", edge.below], ["down", edge.above]]) {
      if (!links[side].has(node)) links[side].set(node, []);
      links[side].get(node).push(edge);
    }
    return links;
  }, { up: new Map(), down: new Map() });
  const nodes = new Set(), edges = new Set(hit.edge ? [hit.edge] : []);
  const walk = (start, side, end) => {
    const seen = new Set([start]), open = [start];
    while (open.length) {
      for (const edge of shown.links[side].get(open.pop()) ?? []) {
        edges.add(edge);
        if (!seen.has(edge[end])) { seen.add(edge[end]); open.push(edge[end]); }
      }
    }
    seen.forEach((node) => nodes.add(node));
  };
  walk(hit.edge ? hit.edge.above : hit.node, "up", "above");
  walk(hit.edge ? hit.edge.below : hit.node, "down", "below");
  // Copies over a faded drawing: restyling every edge of a large graph would take too long.
  const copy = (mark, lit) => {
    const out = mark.cloneNode();
    out.classList.remove("edge");
    out.classList.toggle("lit", lit);
    return out;
  };
  overlay.replaceChildren(
    ...[...edges].map((edge) => copy(edge.path, edge === hit.edge)),
    ...[...edges].filter((edge) => edge.square).map((edge) => copy(edge.square, false)),
    ...[...nodes].map((node) => copy(shown.nodes.get(node), node === hit.node)));
  svg.classList.add("tracing");
}

let present = null; // what the tooltip describes
function hideTip() {
  tip.hidden = true;
  present = null;
  svg.classList.remove("tracing");
  overlay.replaceChildren();
  document.querySelectorAll("#tokens .lit").forEach((item) => item.classList.remove("lit"));
}
function showTip(hit, clientX, clientY) {
  const what = hit.edge ?? hit.column ?? hit.node;
  if (present !== what) {
    hideTip();
    present = what;
    tip.replaceChildren(...(hit.edge ? describeEdge(hit.edge) : hit.column ? describeColumn(hit.column) : describeNode(hit.node)));
    const lit = hit.edge ? [hit.edge.source, hit.edge.target] : hit.node !== undefined ? [hit.node % T] : [];
    for (const column of shown.columns) {
      if (!column.gap && lit.includes(column.first)) column.item.classList.add("lit");
    }
    if (hit.edge || shown.flow.has(hit.node)) trace(hit);
    tip.hidden = false;
  }
  const { offsetWidth: w, offsetHeight: h } = tip;
  const left = clientX + 16 + w > innerWidth ? clientX - 16 - w : clientX + 16;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - w - 4))}px`;
  tip.style.top = `${Math.max(4, Math.min(clientY + 14, innerHeight - h - 4))}px`;
}

/* The node within 7 pixels, else the nearest edge within 8; edges are thin. */
function find(px, py) {
  let best = null, least = 49;
  for (const [node, circle] of shown.nodes) {
    const dx = shown.x[node % T] - px, dy = shown.y[Math.floor(node / T)] - py;
    if (dx * dx + dy * dy < least && circle) [best, least] = [{ node }, dx * dx + dy * dy];
  }
  if (best) return best;
  shown.layers ??= shown.kept.reduce((layers, e) => (layers[e.layer].push(e), layers), Array.from({ length: L }, () => []));
  least = 64;
  const layer = Math.floor((shown.y[0] - py) / shown.height);
  for (const edge of [layer - 1, layer, layer + 1].flatMap((l) => shown.layers[l] ?? [])) {
    if (svg.classList.contains(`hide-${edge.looks}`)) continue;
    const steps = edge.looks === "residual" ? 1 : 16;
    let [ax, ay] = pointOn(edge.curve, 0);
    for (let i = 1; i <= steps; i++) {
      const [bx, by] = pointOn(edge.curve, i / steps), ux = bx - ax, uy = by - ay;
      const s = Math.max(0, Math.min(1, ((px - ax) * ux + (py - ay) * uy) / (ux * ux + uy * uy || 1)));
      const d = (ax + s * ux - px) ** 2 + (ay + s * uy - py) ** 2;
      if (d < least) [best, least] = [{ edge }, d];
      [ax, ay] = [bx, by];
    }
  }
  return best;
}
function follow(event) {
  const box = svg.getBoundingClientRect();
  const hit = find(event.clientX - box.left, event.clientY - box.top);
  if (hit) showTip(hit, event.clientX, event.clientY);
  else hideTip();
}
svg.addEventListener("pointermove", follow);
svg.addEventListener("pointerdown", follow);
svg.addEventListener("pointerleave", hideTip);

const columnOf = (item) => shown.columns.find((column) => column.item === item);
function showColumn(item) {
  const column = columnOf(item);
  if (!column) return;
  const box = item.getBoundingClientRect();
  const hit = { column, node: column.gap ? undefined : column.first };
  showTip(hit, box.right - 8, box.top - 90);
}
$("tokens").addEventListener("pointerover", (event) => showColumn(event.target.closest("li")));
$("tokens").addEventListener("pointerleave", hideTip);
$("tokens").addEventListener("focusin", (event) => showColumn(event.target.closest("li")));
$("tokens").addEventListener("focusout", hideTip);
$("tokens").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const from = event.target.closest("li"), to = step < 0 ? from?.previousSibling : from?.nextSibling;
  if (!step || !to) return;
  event.preventDefault();
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

/* Evenly spaced on a logarithmic scale from the graph's own threshold to 1, at three digits. */
function thresholdAt(step) {
  const least = graph.threshold, most = Number(slider.max);
  if (step <= 0) return least;
  const low = Math.max(least, 1e-4);
  return Math.min(1, Math.max(least, Number((low ** (1 - step / most)).toPrecision(3))));
}
slider.addEventListener("input", render);
slider.disabled = graph.threshold >= 1;
for (const box of document.querySelectorAll("[data-shows]")) {
  const apply = () => svg.classList.toggle(`hide-${box.dataset.shows}`, !box.checked);
  box.addEventListener("change", apply);
  apply();
}
$("listing").addEventListener("toggle", () => { if ($("listing").open) list(); });

const several = span.positions.length > 1;
const first = graph.predictions[0];
fillToken($("predicted"), span.predictions.map(([best]) => best?.token ?? "?").join(""));
$("probability").textContent = first && !several ? percent(first.probability) : "";
if (several) {
  const last = span.positions.length - 1;
  $("facts").append(`${last + 1} predictions, after `, tokenText(span.positions[0]), at(span.positions[0]), " to ");
} else $("facts").append("after ");
$("facts").append(tokenText(graph.position), at(graph.position),
  ` · ${T.toLocaleString("en")} tokens, ${L} layers, ${graph.n_heads} heads · edges ${graph.granularity === "head" ? "by head" : "summed over heads"}`);
if (!unattributed.size) document.querySelector(".key.unattributed").hidden = true;

let size = "";
const resized = () => {
  const now = `${scroller.clientWidth} ${scroller.clientHeight}`;
  if (now !== size) render();
  size = `${scroller.clientWidth} ${scroller.clientHeight}`;
};
resized();
new ResizeObserver(() => requestAnimationFrame(resized)).observe(scroller);
scroller.scrollLeft = scroller.scrollWidth;
