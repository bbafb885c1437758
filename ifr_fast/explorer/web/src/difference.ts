/* Two graphs as one: the edges of either, as heavy as their weights differ. */
import { kinds, weights } from "./document";
import type { Column, GraphDocument, KindColumn } from "./document";
import { Graph } from "./graph";
import type { Pruned } from "./graph";

/** As routes/comparison.py gives it; target and source are columns. */
export interface DifferenceDocument {
  columns: [number | null, number | null][];
  edges: { layer: Column; kind: KindColumn; target: Column; source: Column; first: Column; second: Column };
}

/** Whether an edge is heavier in the first graph or in the second. */
export enum Sign { First = 1, Second = 2 }

export class Difference {
  readonly graph: Graph;
  readonly size: Float32Array; // [E] |second - first|

  constructor(readonly first: Graph, readonly second: Graph, document: DifferenceDocument) {
    const { edges } = document;
    const one = weights(edges.first), two = weights(edges.second);
    this.size = one.map((weight, e) => Math.abs(two[e]! - weight));
    const named = kinds(edges.kind);
    const place = (position: number): number =>
      Math.max(0, document.columns.findIndex((column) => column[0] === position));
    const tokens = document.columns.map(([a, b]) => {
      const pair = [a === null ? null : first.tokens[a]!, b === null ? null : second.tokens[b]!];
      if (pair[0] === pair[1] || pair[1] === null) return pair[0]!;
      return pair[0] === null ? pair[1] : `${pair[0]} | ${pair[1]}`;
    });
    const made: GraphDocument = {
      ...first.document, threshold: 0, granularity: "token",
      tokens, token_ids: tokens.map(() => 0), position: place(first.position), span: null, predictions: [],
      unattributed: [], token_importance: [],
      edges: {
        layer: edges.layer, kind: Array.from(named.codes, (code) => named.names[code]!),
        target: edges.target, source: edges.source, weight: Array.from(this.size),
      },
      head_edges: { layer: [], head: [], target: [], source: [], weight: [] },
    };
    this.graph = new Graph(made);
    this.graph.signs = Uint8Array.from(one, (weight, e) => (two[e]! > weight ? Sign.Second : Sign.First));
  }

  /** Edges whose weights differ by more than a threshold; a node's flow is what differs there. */
  above(threshold: number): Pruned {
    const { graph, size } = this;
    const kept = Uint32Array.from(Array.from(size.keys()).filter((e) => size[e]! > threshold));
    const flow = new Float64Array(graph.nodes), reached = new Uint8Array(graph.nodes);
    const through = new Float64Array(graph.E);
    for (const e of kept) {
      through[e] = size[e]!;
      for (const node of [graph.above[e]!, graph.below[e]!]) {
        reached[node] = 1;
        flow[node] = Math.max(flow[node]!, size[e]!);
      }
    }
    return { threshold, kept, weight: size, through, flow, reached };
  }
}

/** The difference of graphs whose tokens stand one by one, where a backend gives none. */
export function aligned(first: Graph, second: Graph): DifferenceDocument {
  const key = (graph: Graph, e: number): string =>
    `${graph.layer[e]} ${graph.kindOf(e)} ${graph.target[e]} ${graph.source[e]}`;
  const rows = new Map<string, { graph: Graph; e: number; one: number; two: number }>();
  for (let e = 0; e < first.E; e++) rows.set(key(first, e), { graph: first, e, one: first.weight[e]!, two: 0 });
  for (let e = 0; e < second.E; e++) {
    const name = key(second, e), found = rows.get(name);
    if (found) found.two = second.weight[e]!;
    else rows.set(name, { graph: second, e, one: 0, two: second.weight[e]! });
  }
  const list = [...rows.values()].sort((a, b) => a.graph.layer[a.e]! - b.graph.layer[b.e]!);
  return {
    columns: first.tokens.map((_, t) => [t, t]),
    edges: {
      layer: list.map((r) => r.graph.layer[r.e]!), kind: list.map((r) => r.graph.kindOf(r.e)),
      target: list.map((r) => r.graph.target[r.e]!), source: list.map((r) => r.graph.source[r.e]!),
      first: list.map((r) => r.one), second: list.map((r) => r.two),
    },
  };
}
