/* Draws the route graph that the page holds, and prunes it as RouteGraph.prune does.

   A node is a number: level * T + position, where level 0 is the embeddings and layer l has mid at
   level 2l + 1 and post at 2l + 2. Token text reaches the page through textContent alone. */
"use strict";
(() => {
  const SHOW_ALL = 40; // a text of up to so many tokens is shown whole (as in labels.py)
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

  /* [text, whether it stands for something that does not show] for every run of a token. */
  function runs(token) {
    if (!token) return [["∅", true]];
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
      below: (2 * layer + (intoPost && !parallel ? 1 : 0)) * T + source,
    });
  });
  const span = graph.span ?? { positions: [graph.position], weights: [1], predictions: [graph.predictions] };
  const tops = span.positions.map((position, i) => [2 * L * T + position, span.weights[i]]);
  const unattributed = new Set(graph.unattributed.map(
    (n) => (2 * n.layer + (n.kind === "post" ? 2 : 1)) * T + n.position));
  const total = graph.edges.layer.length;

  /* The edges kept at a threshold, with their weights there, and the flow into every node reached:
     the weight of all paths from the prediction to it, in a span times the prediction's. Weights are float32 and are compared to
     the threshold as float32. */
  function prune(threshold) {
    const limit = Math.fround(threshold), byHead = graph.granularity === "head";
    const flow = new Map(tops), kept = [];
    const take = (edge) => {
      if (!flow.has(edge.above)) return;
      let { weight, heads } = edge;
      if (byHead && edge.kind === "attention") {
        heads = heads.filter((h) => h.weight > limit);
        weight = heads.reduce((sum, h) => sum + h.weight, 0);
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

  function draw(name, className, attributes) {
    const out = document.createElementNS(SVG, name);
    out.setAttribute("class", className);
    for (const key in attributes) out.setAttribute(key, attributes[key]);
    return out;
  }
  // Most residual weights are near 1; drawn as wide as the others they would be all one sees.
  // FFN edges are narrow loops, which thick lines would fill.
  const thickness = ({ weight, looks }, height) => ({
    residual: 0.6 + 2.4 * weight,
    attention: Math.min(8, 0.8 + 10 * weight),
    ffn: 0.8 + 0.13 * height * weight,
  })[looks];
  const opacity = (weight) => 0.25 + 0.75 * Math.sqrt(weight);

  const drawing = draw("g", "drawing", {}), overlay = draw("g", "overlay", {});
  const measure = document.createElement("canvas").getContext("2d");
  const shown = {}; // what is on the screen now

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
})();
