/* Draws the graph above the slider's threshold, its tokens, and the table of its strongest edges. */
function draw(name, className, attributes) {
  const out = document.createElementNS(SVG, name);
  out.setAttribute("class", className);
  for (const key in attributes) out.setAttribute(key, attributes[key]);
  return out;
}
// Most residual weights are near 1; as wide as the others, they would hide everything else.
// FFN edges are narrow loops, which thick lines would fill.
const thickness = ({ weight, looks }, height) => ({
  residual: 0.6 + 2.4 * weight,
  attention: Math.min(8, 0.8 + 10 * weight),
  ffn: 0.8 + 0.13 * height * weight,
})[looks];
const opacity = (weight) => 0.25 + 0.75 * Math.sqrt(weight);

const drawing = draw("g", "drawing", {}), overlay = draw("g", "overlay", {});
const measure = document.createElement("canvas").getContext("2d");
const shown = {}; // the current drawing

function render() {
  hideTip();
  const threshold = thresholdAt(Number(slider.value));
  const { kept, flow } = prune(threshold);
  const fromRight = scroller.scrollWidth - scroller.scrollLeft;
  const { columns, width, x, across } = layOut(flow);
  measure.font = getComputedStyle($("tokens")).font;
  let labels = 26;
  for (const column of columns.filter((c) => !c.gap)) {
    const length = measure.measureText(visible(graph.tokens[column.first])).width;
    column.upright = width < UPRIGHT_BELOW && length + 8 > width;
    if (column.upright) labels = Math.max(labels, Math.min(length + 14, UPRIGHT_MOST));
  }
  const { y, height } = levelHeights(scroller.clientHeight - 36 - labels - 14);
  const down = PAD.top + L * height + PAD.bottom;

  svg.setAttribute("width", across);
  svg.setAttribute("height", down);
  svg.dataset.edgeCount = kept.length;
  svg.dataset.threshold = threshold;
  const parts = [];
  for (let l = 0; l < L; l += 2) {
    parts.push(draw("rect", "band", { x: 0, y: y[2 * l + 2], width: across, height }));
  }
  for (const column of columns) {
    const middle = column.left + column.width / 2;
    parts.push(draw("line", column.gap ? "gap" : "guide", { x1: middle, x2: middle, y1: y[2 * L], y2: y[0] }));
  }
  for (const position of span.positions) {
    parts.push(draw("line", "stub", { x1: x[position], x2: x[position], y1: y[2 * L], y2: 0 }));
  }

  const order = { residual: 0, attention: 1, ffn: 2 };
  const sorted = [...kept].sort((a, b) => order[a.looks] - order[b.looks] || a.weight - b.weight);
  const marks = [], squares = [];
  for (const edge of sorted) {
    const c = edge.curve = curve(edge, x, y, width);
    edge.path = draw("path", `edge line ${edge.looks}`, {
      d: `M${c[0]} ${c[1]}C${c[2]} ${c[3]} ${c[4]} ${c[5]} ${c[6]} ${c[7]}`,
      "stroke-width": thickness(edge, height).toFixed(2),
      "stroke-opacity": opacity(edge.weight).toFixed(3),
      "data-layer": edge.layer, "data-kind": edge.kind, "data-target": edge.target, "data-source": edge.source,
    });
    marks.push(edge.path);
    if (edge.looks === "ffn") {
      const [mx, my] = pointOn(c, 0.5), side = 3 + 5 * edge.weight;
      edge.square = draw("rect", "ffn-node", {
        x: mx - side / 2, y: my - side / 2, width: side, height: side,
      });
      squares.push(edge.square);
    }
  }
  marks.push(...squares);
  const nodes = new Map();
  for (const [node, weight] of flow) {
    const flagged = unattributed.has(node);
    const circle = draw("circle", flagged ? "node unattributed" : "node", {
      cx: x[node % T], cy: y[Math.floor(node / T)], r: (flagged ? 3.5 : 1.2) + 2 * Math.sqrt(Math.min(1, weight)),
    });
    nodes.set(node, circle);
    marks.push(circle);
  }
  drawing.replaceChildren(...marks);
  svg.replaceChildren(...svg.querySelectorAll("title, desc"), ...parts, drawing, overlay);
  Object.assign(shown, { threshold, kept, flow, columns, x, y, height, nodes, layers: null, links: null });

  drawAxis(y, height, down);
  drawOutcome(x[graph.position], across);
  drawTokens(columns, across, labels, flow);
  document.querySelector(".corner.bottom").style.height = `${labels + 13}px`;
  // The prediction is mostly at the right: that end stays in place when columns come and go.
  scroller.scrollLeft = scroller.scrollWidth - fromRight;

  const text = threshold.toPrecision(3);
  $("threshold-text").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  $("count").textContent = `${kept.length.toLocaleString("en")} of ${total.toLocaleString("en")} edges`;
  if ($("listing").open) list();
}

function drawAxis(y, height, down) {
  const every = height >= 14 ? 1 : 5;
  const axis = $("axis");
  axis.style.height = `${down}px`;
  axis.replaceChildren();
  for (let l = 0; l < L; l += every) {
    const label = element("span", "", String(l));
    label.style.top = `${(y[2 * l] + y[2 * l + 2]) / 2}px`;
    axis.append(label);
  }
}
function drawOutcome(x, across) {
  const list = document.createElement("ol");
  list.setAttribute("aria-label", "Most probable next tokens");
  graph.predictions.forEach((p, i) => list.append(element("li", i ? "" : "first",
    fillToken(element("bdi", "token"), p.token), ` ${percent(p.probability)}`)));
  $("outcome").replaceChildren(list);
  if (!list.firstChild) return;
  // The first stands above its node; the others go to the side that has room.
  const half = list.firstChild.offsetWidth / 2;
  if (x > across / 2) {
    list.style.flexDirection = "row-reverse";
    list.style.right = `${Math.max(4, across - x - half)}px`;
  } else list.style.left = `${Math.max(4, x - half)}px`;
}
function drawTokens(columns, across, height, flow) {
  const strip = $("tokens");
  const focused = strip.contains(document.activeElement) ? document.activeElement.dataset.first : null;
  strip.style.width = `${across}px`;
  strip.style.height = `${height + 13}px`;
  let most = 0;
  for (let i = 0; i < T; i++) most = Math.max(most, flow.get(i) ?? 0);
  strip.replaceChildren(...columns.map((column) => {
    const { first, last, gap } = column;
    const text = gap ? element("bdi", "", "…") : tokenText(first);
    const item = column.item = element("li", gap ? "gap" : flow.has(first) ? "" : "unreached", text);
    item.classList.toggle("upright", column.upright ?? false);
    item.style.left = `${column.left + (gap ? 0 : 2)}px`;
    item.style.width = `${column.width - (gap ? 0 : 4)}px`;
    item.style.height = `${height}px`;
    item.tabIndex = -1;
    item.dataset.first = first;
    if (!gap) item.style.setProperty("--share", Math.sqrt((flow.get(first) ?? 0) / (most || 1)).toFixed(3));
    const say = gap
      ? `${last - first + 1} tokens that are not reached, positions ${first} to ${last}`
      : `${visible(graph.tokens[first])}, position ${first}, importance ${digits(flow.get(first) ?? 0)}`;
    item.setAttribute("aria-label", say);
    return item;
  }));
  // One stop for the Tab key; arrow keys move within.
  const home = columns.find((c) => String(c.first) === focused) ?? columns.find((c) => c.first === graph.position);
  home.item.tabIndex = 0;
  if (focused !== null) home.item.focus({ preventScroll: true });
}

function list() {
  const strongest = shown.kept.filter((e) => e.looks !== "residual")
    .sort((a, b) => b.through - a.through).slice(0, ROWS_LISTED);
  document.querySelector("#listing tbody").replaceChildren(...strongest.map((edge) => {
    const cell = (...children) => element("td", "", ...children);
    const heads = byWeight(edge.heads).slice(0, 4).map((h) => `${h.head} (${digits(h.weight)})`).join(", ");
    return element("tr", "",
      element("td", edge.looks, edge.looks === "ffn" ? "FFN" : "attention"), cell(String(edge.layer)),
      cell(tokenText(edge.source), at(edge.source)), cell(tokenText(edge.target), at(edge.target)),
      cell(digits(edge.weight)), cell(digits(edge.through)),
      cell(heads + (edge.heads.length > 4 ? " …" : "")));
  }));
}
