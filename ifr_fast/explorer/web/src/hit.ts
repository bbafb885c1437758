/* The node or edge under a point. */
import { LOOKS, Looks } from "./graph";
import type { LooksName } from "./graph";
import { curveOf, pointOn } from "./layout";
import type { View } from "./layout";
import type { Scene } from "./paint";

export type Hit = { node: number; edge?: undefined } | { edge: number; node?: undefined };

const NEAR = { node: 8, edge: 8 }; // pixels; edges are thin

/** The node within 8 pixels, reached or not, else the nearest edge within 8. */
export function find(
  scene: Scene, edges: Uint32Array, hidden: ReadonlySet<LooksName>, view: View, px: number, py: number,
): Hit | null {
  const { graph, layout, pruned } = scene;
  const x = px - view.tx, y = py - view.ty;
  let best: Hit | null = null;
  let least = NEAR.node ** 2;
  const column = nearestColumn(scene, x / view.sx);
  for (const c of [column - 1, column, column + 1]) {
    const box = layout.columns[c];
    if (!box || box.gap) continue;
    const dx = layout.x[box.first]! * view.sx - x;
    for (let level = 0; level < layout.y.length; level++) {
      const parallelMid = level % 2 === 1 && graph.parallel[(level - 1) / 2];
      const dy = layout.y[level]! * view.sy - y, d = dx * dx + dy * dy;
      const node = level * graph.T + box.first;
      // A node off the graph gives way to an edge: it is only found quite near.
      const limit = pruned.reached[node] ? least : Math.min(least, 16);
      if (d < limit && !parallelMid) [best, least] = [{ node }, d];
    }
  }
  if (best) return best;
  least = NEAR.edge ** 2;
  const { ends } = scene, near = NEAR.edge;
  const left = (x - near - 20) / view.sx, right = (x + near + 20) / view.sx;
  const top = (y - near) / view.sy, bottom = (y + near) / view.sy;
  for (let i = 0; i < edges.length; i++) {
    const e = edges[i]!;
    if (ends.y1[e]! > bottom || ends.y0[e]! < top) continue;
    const a = Math.min(ends.x0[e]!, ends.x1[e]!), b = Math.max(ends.x0[e]!, ends.x1[e]!);
    if (b < left || a > right || hidden.has(LOOKS[graph.looks[e]!]!)) continue;
    const c = curveOf(graph, ends, e, view.sx, view.sy);
    const steps = graph.looks[e] === Looks.Residual ? 1 : Math.abs(b - a) * view.sx > 600 ? 64 : 16;
    let [ax, ay] = pointOn(c, 0);
    for (let k = 1; k <= steps; k++) {
      const [bx, by] = pointOn(c, k / steps), ux = bx - ax, uy = by - ay;
      const s = Math.max(0, Math.min(1, ((x - ax) * ux + (y - ay) * uy) / (ux * ux + uy * uy || 1)));
      const d = (ax + s * ux - x) ** 2 + (ay + s * uy - y) ** 2;
      // Of edges that are equally near the heavier one is meant.
      if (d < least - 0.25 || (best && d < least + 0.25 && scene.pruned.weight[e]! > scene.pruned.weight[best.edge!]!)) {
        [best, least] = [{ edge: e }, Math.min(d, least)];
      }
      [ax, ay] = [bx, by];
    }
  }
  return best;
}

/** The index of the column that holds a world abscissa, or of the nearest. */
export function nearestColumn(scene: Scene, x: number): number {
  const { columns } = scene.layout;
  let low = 0, high = columns.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (columns[middle]!.left <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}
