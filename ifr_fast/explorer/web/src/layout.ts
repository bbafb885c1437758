/* Where nodes and edges stand: columns of tokens, levels of layers, and the curves between them.

   World coordinates are columns to the right and layers downwards; a view turns them into pixels. */
import { Looks } from "./graph";
import type { Graph, Pruned } from "./graph";

const SHOW_ALL = 40; // longest text, in tokens, that is shown completely (as in labels.py)
const GAP = 0.5; // width of a folded column
const MID = 0.6; // height of mid within its layer
export const PAD = { x: 26, top: 18, bottom: 16 }; // pixels around the graph

/** One token, or a gap of `last - first + 1` tokens that the graph does not reach. */
export interface ColumnBox {
  first: number;
  last: number;
  gap: boolean;
  left: number;
  width: number;
}

export interface Layout {
  columns: ColumnBox[];
  columnOf: Int32Array; // [T] index of a position's column
  x: Float32Array; // [T] centre of a position's column
  width: number; // of all columns
  height: number; // L layers
  y: Float32Array; // [2L + 1] of a level
}

export function layOut(graph: Graph, pruned: Pruned, fold: boolean, unfolded: readonly number[]): Layout {
  const { T, L } = graph;
  const used = new Uint8Array(T).fill(T <= SHOW_ALL || !fold ? 1 : 0);
  for (let node = 0; node < graph.nodes; node++) if (pruned.reached[node]) used[node % T] = 1;
  for (const position of unfolded) used[position] = 1;
  const columns: ColumnBox[] = [];
  const columnOf = new Int32Array(T);
  const x = new Float32Array(T);
  let edge = 0;
  for (let i = 0; i < T; i++) {
    const last = columns[columns.length - 1];
    if (!used[i] && last?.gap) last.last = i;
    else {
      const width = used[i] ? 1 : GAP;
      columns.push({ first: i, last: i, gap: !used[i], left: edge, width });
      edge += width;
    }
    const mine = columns[columns.length - 1]!;
    columnOf[i] = columns.length - 1;
    x[i] = mine.left + mine.width / 2;
  }
  const y = new Float32Array(2 * L + 1);
  for (let l = 0; l <= L; l++) y[2 * l] = L - l;
  for (let l = 0; l < L; l++) y[2 * l + 1] = L - l - MID;
  return { columns, columnOf, x, width: edge, height: L, y };
}

/** Pixels of a world point: x * sx + tx, y * sy + ty. */
export interface View {
  sx: number;
  sy: number;
  tx: number;
  ty: number;
}

export interface Box { width: number; height: number }

const MOST = { x: 120, y: 110 };
const READABLE = { x: 23, y: 14 };

export function fitted(layout: Layout, box: Box): { sx: number; sy: number } {
  return {
    sx: Math.min(96, (box.width - 2 * PAD.x) / layout.width),
    sy: Math.min(MOST.y, (box.height - PAD.top - PAD.bottom) / layout.height),
  };
}

/** A first view: columns wide enough to read, with the prediction's end in sight. */
export function firstView(layout: Layout, box: Box, position: number): View {
  const fit = fitted(layout, box);
  const sx = Math.max(READABLE.x, fit.sx), sy = Math.max(READABLE.y, fit.sy);
  const tx = box.width - PAD.x - 60 - layout.x[position]! * sx;
  return clamped({ sx, sy, tx: Math.min(tx, 0), ty: 0 }, layout, box);
}

/** The whole graph. */
export function wholeView(layout: Layout, box: Box): View {
  return clamped({ ...fitted(layout, box), tx: 0, ty: 0 }, layout, box);
}

/** The view with its scale within limits and the graph within the box. */
export function clamped(view: View, layout: Layout, box: Box): View {
  const fit = fitted(layout, box);
  const sx = Math.max(Math.min(fit.sx, READABLE.x), Math.min(MOST.x, view.sx));
  const sy = Math.max(Math.min(fit.sy, READABLE.y), Math.min(MOST.y, view.sy));
  const place = (t: number, size: number, room: number, before: number, after: number): number => {
    const all = size + before + after;
    if (all <= room) return before + (room - all) / 2;
    return Math.round(Math.min(before, Math.max(room - size - after, t)));
  };
  return {
    sx, sy,
    tx: place(view.tx, layout.width * sx, box.width, PAD.x, PAD.x),
    ty: place(view.ty, layout.height * sy, box.height, PAD.top, PAD.bottom),
  };
}

/** The view scaled by `by` around a point of the box. */
export function zoomed(view: View, by: number, atX: number, atY: number, layout: Layout, box: Box): View {
  const next = clamped({ ...view, sx: view.sx * by, sy: view.sy * by }, layout, box);
  const x = (atX - view.tx) / view.sx, y = (atY - view.ty) / view.sy;
  return clamped({ ...next, tx: atX - x * next.sx, ty: atY - y * next.sy }, layout, box);
}

/** The ends of the edges in world coordinates, [E] each. */
export interface Ends {
  x0: Float32Array;
  y0: Float32Array;
  x1: Float32Array;
  y1: Float32Array;
}

export function endsOf(graph: Graph, layout: Layout): Ends {
  const { E, T } = graph;
  const [x0, y0, x1, y1] = [0, 0, 0, 0].map(() => new Float32Array(E)) as
    [Float32Array, Float32Array, Float32Array, Float32Array];
  for (let e = 0; e < E; e++) {
    x0[e] = layout.x[graph.source[e]!]!;
    x1[e] = layout.x[graph.target[e]!]!;
    y0[e] = layout.y[Math.floor(graph.below[e]! / T)]!;
    y1[e] = layout.y[Math.floor(graph.above[e]! / T)]!;
  }
  return { x0, y0, x1, y1 };
}

/** A cubic Bezier curve: four points, x and y in turn. */
export type Curve = [number, number, number, number, number, number, number, number];

/** The curve of an edge, in pixels of a view without its translation. */
export function curveOf(graph: Graph, ends: Ends, e: number, sx: number, sy: number): Curve {
  const x0 = ends.x0[e]! * sx, x1 = ends.x1[e]! * sx, y0 = ends.y0[e]! * sy, y1 = ends.y1[e]! * sy;
  const looks = graph.looks[e];
  if (looks === Looks.Residual) return [x0, y0, x0, y0, x1, y1, x1, y1];
  if (graph.source[e] !== graph.target[e]) return [x0, y0, x0, y1, x1, y0, x1, y1];
  const bow = Math.min(0.42 * sx, 20) * (looks === Looks.Ffn ? 1 : -1);
  const lean = 0.1 * (y1 - y0);
  return [x0, y0, x0 + bow, y0 + lean, x0 + bow, y1 - lean, x1, y1];
}

export function pointOn(c: Curve, s: number): [number, number] {
  const r = 1 - s, a = r * r * r, b = 3 * r * r * s, d = 3 * r * s * s, e = s * s * s;
  return [a * c[0] + b * c[2] + d * c[4] + e * c[6], a * c[1] + b * c[3] + d * c[5] + e * c[7]];
}

/** Where the x of a curve between two columns reaches the share u of its way: x grows as
    3 s^2 - 2 s^3, whose inverse is known. */
function shareAt(u: number): number {
  if (u <= 0) return 0;
  if (u >= 1) return 1;
  return 0.5 - Math.sin(Math.asin(1 - 2 * u) / 3);
}

/** The part of a curve between two columns that lies between the abscissas `from` and `to`. */
export function clipped(c: Curve, from: number, to: number): Curve {
  const across = c[6] - c[0];
  let a = shareAt((from - c[0]) / across), b = shareAt((to - c[0]) / across);
  if (a > b) [a, b] = [b, a];
  if (a === 0 && b === 1) return c;
  return part(c, a, b);
}

function part(c: Curve, a: number, b: number): Curve {
  const out: number[] = [0, 0, 0, 0, 0, 0, 0, 0];
  for (let k = 0; k < 2; k++) {
    const p = [c[k]!, c[2 + k]!, c[4 + k]!, c[6 + k]!] as const;
    // The blossom of the curve at (a,a,a), (a,a,b), (a,b,b), (b,b,b) gives the part's points.
    const at = (r: number, s: number, t: number): number => {
      const u = [0, 1, 2].map((i) => p[i]! + r * (p[i + 1]! - p[i]!));
      const v = [0, 1].map((i) => u[i]! + s * (u[i + 1]! - u[i]!));
      return v[0]! + t * (v[1]! - v[0]!);
    };
    out[k] = at(a, a, a);
    out[2 + k] = at(a, a, b);
    out[4 + k] = at(a, b, b);
    out[6 + k] = at(b, b, b);
  }
  return out as Curve;
}
