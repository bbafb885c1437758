/* A route graph in typed arrays, pruned as RouteGraph.prune does, and the paths through its nodes.

   A node is a number, level * T + position: level 0 is the embeddings, and layer l has mid at level
   2l + 1 and post at 2l + 2. An edge is the number of its row in the document's table. */
import { checkDocument, integers, kinds, weights } from "./document";
import type { GraphDocument, Prediction } from "./document";

/** How an edge is drawn. Kinds that this page does not know are `other`. */
export enum Looks {
  Residual = 0,
  Attention = 1,
  Ffn = 2,
  Other = 3,
}
export const LOOKS = ["residual", "attention", "ffn", "other"] as const;
export type LooksName = (typeof LOOKS)[number];

const LOOKS_OF: Record<string, Looks> = {
  attention: Looks.Attention,
  ffn: Looks.Ffn,
  residual_mid: Looks.Residual,
  residual_post: Looks.Residual,
};

/** What is left of a graph above a threshold. */
export interface Pruned {
  threshold: number;
  kept: Uint32Array; // edges, ascending
  weight: Float32Array; // [E] of the kept edges: with heads below the threshold left out
  through: Float64Array; // [E] weight times the flow into the edge's target
  flow: Float64Array; // [nodes] weight of all paths from the prediction; 0 where there is none
  reached: Uint8Array; // [nodes]
}

/** The edges into and out of each node: those of node n are edge[start[n]:start[n + 1]]. */
interface Links {
  start: Uint32Array;
  edge: Uint32Array;
}

export interface Paths {
  edges: Uint32Array;
  nodes: Uint32Array;
}

export class Graph {
  readonly T: number;
  readonly L: number;
  readonly nodes: number;
  readonly E: number;
  readonly tokens: string[];
  readonly ids: Uint32Array;
  readonly position: number;
  readonly threshold: number;
  readonly byHead: boolean;
  readonly parallel: boolean[];
  readonly starts: { position: number; weight: number; predictions: Prediction[] }[];
  readonly isSpan: boolean;
  readonly unattributed: Set<number>;
  readonly kindNames: string[];
  readonly layer: Uint32Array;
  readonly kind: Uint32Array; // index of kindNames
  readonly looks: Uint8Array;
  readonly target: Uint32Array;
  readonly source: Uint32Array;
  readonly weight: Float32Array;
  readonly above: Uint32Array; // the node that the edge leads into
  readonly below: Uint32Array; // the node that it comes from
  readonly headStart: Uint32Array; // heads of edge e: headStart[e] to headStart[e + 1]
  readonly head: Uint32Array;
  readonly headWeight: Float32Array;
  signs: Uint8Array | null = null; // [E] of a difference (difference.ts)
  private readonly order: Uint32Array; // in which paths take the edges, from the top
  private links: { of: Pruned; up: Links; down: Links } | null = null;

  constructor(readonly document: GraphDocument) {
    checkDocument(document);
    const { edges, head_edges: heads } = document;
    this.tokens = document.tokens;
    this.T = document.tokens.length;
    this.L = document.n_layers;
    this.nodes = (2 * this.L + 1) * this.T;
    this.ids = integers(document.token_ids);
    this.position = document.position;
    this.threshold = document.threshold;
    this.byHead = document.granularity === "head";
    this.parallel = document.parallel;
    const span = document.span;
    this.isSpan = span !== null;
    this.starts = span
      ? span.positions.map((position, i) => ({
          position, weight: span.weights[i]!, predictions: span.predictions[i]!,
        }))
      : [{ position: document.position, weight: 1, predictions: document.predictions }];
    const T = this.T;
    this.unattributed = new Set(document.unattributed.map(
      (n) => (2 * n.layer + (n.kind === "post" ? 2 : 1)) * T + n.position));

    this.layer = integers(edges.layer);
    this.target = integers(edges.target);
    this.source = integers(edges.source);
    this.weight = weights(edges.weight);
    const named = kinds(edges.kind);
    this.kindNames = named.names;
    this.kind = named.codes;
    const E = (this.E = this.layer.length);
    this.looks = new Uint8Array(E);
    this.above = new Uint32Array(E);
    this.below = new Uint32Array(E);
    const late = new Uint8Array(E); // edges that a path takes second within their layer
    for (let e = 0; e < E; e++) {
      const layer = this.layer[e]!, name = this.kindNames[this.kind[e]!]!;
      const parallel = this.parallel[layer]!;
      const looks = (this.looks[e] = LOOKS_OF[name] ?? Looks.Other);
      const intoPost = parallel || name === "ffn" || name === "residual_post";
      const reads = looks === Looks.Attention || looks === Looks.Other;
      this.above[e] = (2 * layer + (intoPost ? 2 : 1)) * T + this.target[e]!;
      const level = reads
        ? 2 * document.value_layers[layer]!
        : 2 * layer + (intoPost && !parallel ? 1 : 0);
      this.below[e] = level * T + this.source[e]!;
      late[e] = intoPost ? 0 : 1;
    }
    this.order = this.sortedByStep(late);
    this.head = integers(heads.head);
    this.headWeight = weights(heads.weight);
    this.headStart = this.alignHeads(
      integers(heads.layer), integers(heads.target), integers(heads.source));
  }

  /** Layers from the top, and within a layer edges into post before edges into mid. */
  private sortedByStep(late: Uint8Array): Uint32Array {
    const counts = new Uint32Array(2 * this.L + 1);
    const stepOf = (e: number): number => 2 * (this.L - 1 - this.layer[e]!) + late[e]!;
    for (let e = 0; e < this.E; e++) counts[stepOf(e) + 1]!++;
    for (let i = 0; i < 2 * this.L; i++) counts[i + 1]! += counts[i]!;
    const out = new Uint32Array(this.E);
    for (let e = 0; e < this.E; e++) out[counts[stepOf(e)]!++] = e;
    return out;
  }

  /** Both tables are sorted by layer, target, source, so one pass finds each edge's heads. */
  private alignHeads(layer: Uint32Array, target: Uint32Array, source: Uint32Array): Uint32Array {
    const start = new Uint32Array(this.E + 1);
    let at = 0;
    for (let e = 0; e < this.E; e++) {
      start[e] = at;
      if (this.looks[e] !== Looks.Attention) continue;
      while (at < layer.length && layer[at] === this.layer[e] &&
             target[at] === this.target[e] && source[at] === this.source[e]) at++;
    }
    start[this.E] = at;
    if (at !== layer.length) throw new Error("the table of heads does not follow that of edges");
    return start;
  }

  heads(edge: number, above = -1): { head: number; weight: number }[] {
    const out = [];
    for (let i = this.headStart[edge]!; i < this.headStart[edge + 1]!; i++) {
      const weight = this.headWeight[i]!;
      if (weight > above) out.push({ head: this.head[i]!, weight });
    }
    return out.sort((a, b) => b.weight - a.weight);
  }

  kindOf(edge: number): string {
    return this.kindNames[this.kind[edge]!]!;
  }

  /** The edges above a threshold that are reached from the prediction. Weights and threshold are
      compared as float32, as in Python. */
  prune(threshold: number): Pruned {
    const limit = Math.fround(threshold);
    const { E, above, below, looks, headStart, headWeight } = this;
    const flow = new Float64Array(this.nodes), reached = new Uint8Array(this.nodes);
    const weight = new Float32Array(E), through = new Float64Array(E), keep = new Uint8Array(E);
    for (const { position, weight: w } of this.starts) {
      const top = 2 * this.L * this.T + position;
      flow[top] = w;
      reached[top] = 1;
    }
    let n = 0;
    for (let i = 0; i < E; i++) {
      const e = this.order[i]!, top = above[e]!;
      if (!reached[top]) continue;
      let w = this.weight[e]!;
      if (this.byHead && looks[e] === Looks.Attention) {
        let sum = 0;
        for (let h = headStart[e]!; h < headStart[e + 1]!; h++) {
          if (headWeight[h]! > limit) sum += headWeight[h]!;
        }
        w = Math.min(1, sum);
      }
      if (!(w > limit)) continue;
      keep[e] = 1;
      n++;
      weight[e] = w;
      through[e] = flow[top]! * w;
      flow[below[e]!]! += through[e]!;
      reached[below[e]!] = 1;
    }
    const kept = new Uint32Array(n);
    for (let e = 0, at = 0; e < E; e++) if (keep[e]) kept[at++] = e;
    return { threshold, kept, weight, through, flow, reached };
  }

  private link(kept: Uint32Array, end: Uint32Array): Links {
    const start = new Uint32Array(this.nodes + 2);
    for (const e of kept) start[end[e]! + 2]!++;
    for (let i = 2; i < start.length; i++) start[i]! += start[i - 1]!;
    const edge = new Uint32Array(kept.length);
    for (const e of kept) edge[start[end[e]! + 1]!++] = e;
    return { start, edge };
  }

  private linksOf(pruned: Pruned): { up: Links; down: Links } {
    if (this.links?.of !== pruned) {
      const { kept } = pruned;
      this.links = { of: pruned, up: this.link(kept, this.below), down: this.link(kept, this.above) };
    }
    return this.links;
  }

  /** Edges that lead into a node, and edges that leave it, heaviest first. */
  edgesInto(pruned: Pruned, node: number): number[] {
    return this.listed(pruned, this.linksOf(pruned).down, node);
  }

  edgesOutOf(pruned: Pruned, node: number): number[] {
    return this.listed(pruned, this.linksOf(pruned).up, node);
  }

  private listed(pruned: Pruned, links: Links, node: number): number[] {
    const found = Array.from(links.edge.subarray(links.start[node]!, links.start[node + 1]!));
    return found.sort((a, b) => pruned.weight[b]! - pruned.weight[a]!);
  }

  /** All kept edges and nodes on paths through a node or an edge: those above and those below. */
  paths(pruned: Pruned, hit: { edge?: number; node?: number }): Paths {
    const { up, down } = this.linksOf(pruned);
    const edges = new Set<number>(), nodes = new Set<number>();
    const walk = (from: number, links: Links, end: Uint32Array): void => {
      const seen = new Set([from]), open = [from];
      for (let node = open.pop(); node !== undefined; node = open.pop()) {
        for (let i = links.start[node]!; i < links.start[node + 1]!; i++) {
          const e = links.edge[i]!, next = end[e]!;
          edges.add(e);
          if (!seen.has(next)) { seen.add(next); open.push(next); }
        }
      }
      seen.forEach((node) => nodes.add(node));
    };
    if (hit.edge !== undefined) edges.add(hit.edge);
    const top = hit.edge === undefined ? hit.node! : this.above[hit.edge]!;
    const bottom = hit.edge === undefined ? hit.node! : this.below[hit.edge]!;
    if (!pruned.reached[top]) return { edges: new Uint32Array(), nodes: new Uint32Array() };
    walk(top, up, this.above);
    walk(bottom, down, this.below);
    return { edges: Uint32Array.from(edges).sort(), nodes: Uint32Array.from(nodes).sort() };
  }

  /** The place of a node: its level, layer, kind and position. */
  place(node: number): { level: number; layer: number; kind: "embed" | "mid" | "post"; position: number } {
    const level = Math.floor(node / this.T), position = node % this.T;
    const kind = level === 0 ? "embed" : level % 2 ? "mid" : "post";
    return { level, layer: Math.floor((level - 1) / 2), kind, position };
  }
}

/** A slider's step as a threshold: evenly spaced on a logarithmic scale from the graph's own
    threshold to 1, at three digits. */
export function thresholdAt(least: number, step: number, most: number): number {
  if (step <= 0) return least;
  const low = Math.max(least, 1e-4);
  return Math.min(1, Math.max(least, Number((low ** (1 - step / most)).toPrecision(3))));
}

export function stepAt(least: number, threshold: number, most: number): number {
  if (threshold <= least) return 0;
  const low = Math.max(least, 1e-4);
  if (low >= 1) return most;
  return Math.round(most * (1 - Math.log(threshold) / Math.log(low)));
}
