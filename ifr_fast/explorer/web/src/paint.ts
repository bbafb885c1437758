/* Draws edges and nodes with a pen: a canvas's context, or the writer of an SVG. */
import { LOOKS, Looks } from "./graph";
import type { Graph, Pruned } from "./graph";
import { clipped, curveOf, pointOn } from "./layout";
import type { Ends, Layout } from "./layout";
import type { Theme } from "./theme";

/** What drawing needs of a context; SvgPen has it too. */
export type Pen = Pick<CanvasRenderingContext2D,
  "beginPath" | "moveTo" | "lineTo" | "bezierCurveTo" | "arc" | "rect" | "stroke" | "fill" |
  "setLineDash" | "strokeStyle" | "fillStyle" | "lineWidth" | "globalAlpha">;

export interface Scene {
  graph: Graph;
  pruned: Pruned;
  layout: Layout;
  ends: Ends;
  theme: Theme;
}

/** A rectangle in pixels of a view without its translation. */
export interface Region { left: number; top: number; right: number; bottom: number }

const BINS = 10; // of weights that are drawn alike
const CHUNK = 160; // edges of one path: long paths take more than linear time to fill
const DETAIL = 9; // pixels of a column from which on nodes are drawn

const binOf = (weight: number): number => Math.min(BINS - 1, Math.floor(BINS * Math.sqrt(weight)));

/** Most residual weights are near 1; as wide as the others, they would hide everything else. FFN
    edges are narrow loops, which thick lines would fill. */
function thickness(looks: number, weight: number, sx: number, sy: number): number {
  const scale = Math.min(1, 0.25 + sx / 34);
  if (looks === Looks.Residual) return (0.6 + 2 * weight) * scale;
  if (looks === Looks.Ffn) return (0.9 + 0.11 * sy * weight) * scale;
  return Math.min(8, 0.8 + 10 * weight) * scale;
}

/** Residual lines stand closer together than any other when the whole of a long text is seen. */
function opacity(looks: number, weight: number, sx: number): number {
  const crowd = looks === Looks.Attention ? 1 : Math.max(0.2, Math.min(1, sx / 8));
  return (0.22 + 0.78 * Math.sqrt(weight)) * crowd;
}

/** The edges that cross a region, sorted by looks and weight: a style's number and its edges. */
function crossing(scene: Scene, edges: Uint32Array, sx: number, sy: number, region: Region): Map<number, number[]> {
  const { graph, pruned, ends } = scene;
  const margin = 24;
  const left = (region.left - margin) / sx, right = (region.right + margin) / sx;
  const top = (region.top - margin) / sy, bottom = (region.bottom + margin) / sy;
  const styles = new Map<number, number[]>();
  for (let i = 0; i < edges.length; i++) {
    const e = edges[i]!;
    if (ends.y1[e]! > bottom || ends.y0[e]! < top) continue;
    const a = ends.x0[e]!, b = ends.x1[e]!;
    if ((a < b ? b : a) < left || (a < b ? a : b) > right) continue;
    const style = ((graph.signs?.[e] ?? 0) * LOOKS.length + graph.looks[e]!) * BINS + binOf(pruned.weight[e]!);
    const found = styles.get(style);
    if (found) found.push(e);
    else styles.set(style, [e]);
  }
  return new Map([...styles].sort((a, b) => a[0] - b[0]));
}

/** Draws the edges that cross a region; yields now and then, so that a caller can stop in time. */
export function* drawEdges(
  pen: Pen, scene: Scene, edges: Uint32Array, sx: number, sy: number, region: Region,
): Generator<void> {
  const { graph, pruned, ends, theme } = scene;
  const margin = 24;
  for (const [style, mine] of crossing(scene, edges, sx, sy, region)) {
    const looks = Math.floor(style / BINS) % LOOKS.length, sign = Math.floor(style / BINS / LOOKS.length);
    const weight = ((style % BINS) + 0.5) ** 2 / BINS ** 2;
    const prepare = (): void => {
      pen.strokeStyle = pen.fillStyle = sign ? theme.signs[sign - 1]! : theme.edges[looks]!;
      pen.lineWidth = thickness(looks, weight, sx, sy);
      pen.globalAlpha = opacity(looks, weight, sx);
      pen.setLineDash(looks === Looks.Other ? [5, 3] : []);
    };
    for (let from = 0; from < mine.length; from += CHUNK) {
      prepare();
      pen.beginPath();
      for (const e of mine.slice(from, from + CHUNK)) {
        let c = curveOf(graph, ends, e, sx, sy);
        if (looks === Looks.Residual) {
          pen.moveTo(c[0], c[1]);
          pen.lineTo(c[6], c[7]);
          continue;
        }
        if (graph.source[e] !== graph.target[e]) {
          c = clipped(c, region.left - margin, region.right + margin);
        }
        pen.moveTo(c[0], c[1]);
        pen.bezierCurveTo(c[2], c[3], c[4], c[5], c[6], c[7]);
      }
      pen.stroke();
      if (looks === Looks.Ffn && sx >= DETAIL) {
        pen.globalAlpha = 1;
        pen.beginPath();
        for (const e of mine.slice(from, from + CHUNK)) {
          const [x, y] = pointOn(curveOf(graph, ends, e, sx, sy), 0.5);
          const side = (2.5 + 5 * pruned.weight[e]!) * Math.min(1, sx / 26, sy / 15);
          pen.rect(x - side / 2, y - side / 2, side, side);
        }
        pen.fill();
      }
      yield;
    }
  }
  pen.globalAlpha = 1;
  pen.setLineDash([]);
}

/** Draws the nodes within a region; `nodes` null: all that are reached. */
export function drawNodes(
  pen: Pen, scene: Scene, nodes: Uint32Array | null, sx: number, sy: number, region: Region,
): void {
  const { graph, pruned, layout, theme } = scene;
  const flagged: number[] = [], plain: number[] = [];
  const inside = (node: number): boolean => {
    const x = layout.x[node % graph.T]! * sx, y = layout.y[Math.floor(node / graph.T)]! * sy;
    return x > region.left - 8 && x < region.right + 8 && y > region.top - 8 && y < region.bottom + 8;
  };
  const sort = (node: number): void => {
    if (pruned.reached[node] && inside(node)) (graph.unattributed.has(node) ? flagged : plain).push(node);
  };
  if (nodes) nodes.forEach(sort);
  else {
    for (let level = 0; level < layout.y.length; level++) {
      const y = layout.y[level]! * sy;
      if (y < region.top - 8 || y > region.bottom + 8) continue;
      for (let t = 0; t < graph.T; t++) sort(level * graph.T + t);
    }
  }
  const circles = (of: number[], least: number): void => {
    pen.beginPath();
    for (const node of of) {
      const x = layout.x[node % graph.T]! * sx, y = layout.y[Math.floor(node / graph.T)]! * sy;
      const r = least + 2.2 * Math.sqrt(Math.min(1, pruned.flow[node]!));
      pen.moveTo(x + r, y);
      pen.arc(x, y, r, 0, 2 * Math.PI);
    }
  };
  pen.globalAlpha = 1;
  if (sx >= DETAIL && plain.length) {
    circles(plain, 1.1);
    pen.fillStyle = theme.background;
    pen.strokeStyle = theme.muted;
    pen.lineWidth = 1;
    pen.fill();
    pen.stroke();
  }
  if (flagged.length) {
    circles(flagged, 3.4);
    pen.fillStyle = theme.background;
    pen.strokeStyle = theme.alert;
    pen.lineWidth = 2;
    pen.setLineDash([3, 2]);
    pen.fill();
    pen.stroke();
    pen.setLineDash([]);
  }
}

/** Bands of every other layer and dotted lines at folded columns. */
export function drawGround(pen: Pen, scene: Scene, sx: number, sy: number, region: Region): void {
  const { layout, theme } = scene;
  pen.globalAlpha = 1;
  pen.fillStyle = theme.band;
  pen.beginPath();
  for (let l = 0; l < layout.height; l += 2) {
    const y = (layout.height - l - 1) * sy;
    if (y < region.bottom && y + sy > region.top) pen.rect(region.left, y, region.right - region.left, sy);
  }
  pen.fill();
  if (sx < 6) return;
  pen.strokeStyle = theme.line;
  pen.lineWidth = 1.5;
  pen.setLineDash([1, 5]);
  pen.beginPath();
  for (const column of layout.columns) {
    const x = (column.left + column.width / 2) * sx;
    if (!column.gap || x < region.left || x > region.right) continue;
    pen.moveTo(x, 0);
    pen.lineTo(x, layout.height * sy);
  }
  pen.stroke();
  pen.setLineDash([]);
}
