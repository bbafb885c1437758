/* Values of the present picture, for tests and for the console: `element.explorer`. */
import { LOOKS } from "./graph";
import type { LooksName, Paths } from "./graph";
import type { GridHandle } from "./grid";
import type { Hit } from "./hit";
import { curveOf, pointOn } from "./layout";
import type { Scene } from "./paint";
import { edgeOf } from "./state";
import type { EdgeKey, State, Store } from "./state";

export type EdgeRow = [layer: number, kind: string, target: number, source: number, weight: number, flow: number];

export class Probe {
  scene: Scene | null = null;
  lit: Paths | null = null;
  grid: GridHandle | null = null;
  hidden: ReadonlySet<LooksName> = new Set();
  selected: Hit | null = null;
  idle: () => boolean = () => true;
  comparison: [Scene, Scene] | null = null;
  difference: Scene | null = null;

  constructor(private readonly store: Store) {}

  state(): State { return this.store.state; }

  private row(e: number, { graph, pruned }: Scene = this.scene!): EdgeRow {
    return [graph.layer[e]!, graph.kindOf(e), graph.target[e]!, graph.source[e]!, pruned.weight[e]!, pruned.through[e]!];
  }

  /** What is drawn: the edges above the threshold, those in sight of the reader's choice of kinds,
      the columns, and the importance of each token. */
  shown(): object {
    const { graph, pruned, layout } = this.scene!;
    const kept = Array.from(pruned.kept);
    return {
      threshold: pruned.threshold,
      edges: kept.map((e) => this.row(e)),
      visible: kept.filter((e) => !this.hidden.has(LOOKS[graph.looks[e]!]!)).length,
      columns: layout.columns.map((c) => [c.first, c.last, c.gap]),
      importance: Array.from(pruned.flow.subarray(0, graph.T)),
      unattributed: graph.unattributed.size,
      view: this.grid?.view() ?? null,
    };
  }

  /** The edges of two compared graphs, and of their difference. */
  compared(): { first: EdgeRow[]; second: EdgeRow[]; difference: EdgeRow[]; signs: number[] } | null {
    if (!this.comparison) return null;
    const [first, second] = this.comparison.map((s) => Array.from(s.pruned.kept, (e) => this.row(e, s)));
    const kept = this.difference ? Array.from(this.difference.pruned.kept) : [];
    return {
      first: first!, second: second!, difference: kept.map((e) => this.row(e, this.difference!)),
      signs: kept.map((e) => this.difference!.graph.signs![e]!),
    };
  }

  /** What is highlighted. */
  highlighted(): { edges: EdgeRow[]; nodes: number[] } | null {
    return this.lit && { edges: Array.from(this.lit.edges, (e) => this.row(e)), nodes: Array.from(this.lit.nodes) };
  }

  /** Whether everything is drawn and no call is open. */
  settled(): boolean {
    return this.idle() && (!this.grid || this.grid.complete());
  }

  /** Client coordinates of a node, or of the middle of an edge. */
  locate(what: { node: number } | EdgeKey): [number, number] {
    const { graph, layout, ends } = this.scene!, view = this.grid!.view();
    if ("node" in what) {
      return this.grid!.client(
        layout.x[what.node % graph.T]! * view.sx + view.tx, layout.y[Math.floor(what.node / graph.T)]! * view.sy + view.ty);
    }
    const [x, y] = pointOn(curveOf(graph, ends, edgeOf(graph, what), view.sx, view.sy), 0.5);
    return this.grid!.client(x + view.tx, y + view.ty);
  }

  setView(view: { sx?: number; sy?: number; tx?: number; ty?: number }): void {
    this.grid!.setView({ ...this.grid!.view(), ...view });
  }
}
