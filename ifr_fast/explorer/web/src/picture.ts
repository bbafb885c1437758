/* The graph as a picture to keep: PNG or SVG, all of it where that is not too wide, else what is
   in view. */
import { PAD } from "./layout";
import type { Box, View } from "./layout";
import { drawEdges, drawGround, drawNodes } from "./paint";
import type { Pen, Scene } from "./paint";
import { SvgPen } from "./svg";
import { percent, visible } from "./tokens";

const MOST = { width: 8000, height: 4000 };
const TOP = 34, AXIS = 34;
const CHAR = 7.4; // pixels of a character of 12 pixels, about
const LONGEST = 13; // characters of a label

interface Target {
  pen: Pen;
  text(x: number, y: number, text: string, colour: string, size: number, options?: { anchor?: string; turn?: boolean; weight?: number }): void;
  box(x: number, y: number, width: number, height: number, colour: string, opacity: number): void;
}

interface Frame { view: View; width: number; height: number; scene: Scene; edges: Uint32Array; upright: boolean }

const labelsOf = (frame: Frame): number => (frame.upright ? 104 : 34); // pixels below the graph

/** The part that is drawn, with a view into it. */
export function frameOf(scene: Scene, edges: Uint32Array, view: View, box: Box): Frame {
  const width = scene.layout.width * view.sx + 2 * PAD.x, height = scene.layout.height * view.sy + PAD.top + PAD.bottom;
  const upright = scene.layout.columns.some(
    (c) => !c.gap && CHAR * visible(scene.graph.tokens[c.first]!).length + 8 > view.sx);
  if (width <= MOST.width && height <= MOST.height) {
    return { scene, edges, upright, width, height, view: { ...view, tx: PAD.x, ty: PAD.top } };
  }
  return { scene, edges, upright, width: box.width, height: box.height, view };
}

function paint(frame: Frame, target: Target): void {
  const { scene, view, width, height, edges } = frame;
  const { layout, graph, theme, pruned } = scene;
  const labels = labelsOf(frame);
  const region = { left: -view.tx, top: -view.ty, right: width - view.tx, bottom: height - view.ty };
  drawGround(target.pen, scene, view.sx, view.sy, region);
  for (const _ of drawEdges(target.pen, scene, edges, view.sx, view.sy, region));
  drawNodes(target.pen, scene, null, view.sx, view.sy, region);
  // What stands beside the graph covers edges that leave the part.
  target.box(0, 0, AXIS, TOP + height + labels, theme.background, 1);
  target.box(0, 0, AXIS + width, TOP, theme.background, 1);
  target.box(0, TOP + height, AXIS + width, labels, theme.background, 1);
  const every = Math.max(1, Math.ceil(13 / view.sy));
  for (let l = 0; l < graph.L; l += every) {
    const y = TOP + (layout.height - l - 0.5) * view.sy + view.ty;
    if (y > TOP && y < TOP + height) target.text(AXIS - 8, y + 4, String(l), theme.muted, 11, { anchor: "end" });
  }
  let most = 0;
  for (let t = 0; t < graph.T; t++) most = Math.max(most, pruned.flow[t]!);
  for (const column of layout.columns) {
    const w = column.width * view.sx, x = AXIS + (column.left + column.width / 2) * view.sx + view.tx;
    if (x < AXIS || x > AXIS + width || view.sx < 9) continue;
    if (column.gap) {
      target.text(x, TOP + height + 16, "…", theme.muted, 12);
      continue;
    }
    const share = Math.sqrt(pruned.flow[column.first]! / (most || 1));
    target.box(x - w / 2 + 1, TOP + height + 4, w - 2, labels - 8, `rgb(${theme.heat.join(",")})`, 0.55 * share);
    const text = visible(graph.tokens[column.first]!);
    const chars = [...text];
    const short = chars.length > LONGEST ? `${chars.slice(0, LONGEST - 1).join("")}…` : text;
    if (frame.upright) target.text(x + 4, TOP + height + 10, short, theme.text, 12, { anchor: "end", turn: true });
    else target.text(x, TOP + height + 21, short, theme.text, 12);
  }
  const best = graph.document.predictions.map((p) => `${visible(p.token)} ${percent(p.probability)}`).slice(0, 3).join("   ");
  const at = AXIS + layout.x[graph.position]! * view.sx + view.tx, right = at > (AXIS + width) / 2;
  target.text(Math.max(AXIS, Math.min(AXIS + width - 6, at + (right ? 20 : -20))), 21, best, theme.text, 13, { anchor: right ? "end" : "start", weight: 600 });
}

export function svgOf(frame: Frame, title: string): string {
  const pen = new SvgPen(AXIS + frame.view.tx, TOP + frame.view.ty);
  paint(frame, { pen, text: pen.text.bind(pen), box: pen.box.bind(pen) });
  return pen.document(AXIS + frame.width, TOP + frame.height + labelsOf(frame), frame.scene.theme.background, title);
}

export async function pngOf(frame: Frame): Promise<Blob> {
  const canvas = document.createElement("canvas");
  const ratio = 2 * Math.min(1, MOST.width / (2 * frame.width));
  canvas.width = Math.round((AXIS + frame.width) * ratio);
  canvas.height = Math.round((TOP + frame.height + labelsOf(frame)) * ratio);
  const context = canvas.getContext("2d")!;
  context.scale(ratio, ratio);
  context.fillStyle = frame.scene.theme.background;
  context.fillRect(0, 0, AXIS + frame.width, TOP + frame.height + labelsOf(frame));
  const [dx, dy] = [AXIS + frame.view.tx, TOP + frame.view.ty];
  const at = (draw: () => void): void => {
    context.save();
    context.translate(-dx, -dy);
    draw();
    context.restore();
  };
  context.translate(dx, dy);
  paint(frame, {
    pen: context,
    text: (x, y, text, colour, size, options = {}) => at(() => {
      context.globalAlpha = 1;
      context.fillStyle = colour;
      context.font = `${options.weight ?? 400} ${size}px system-ui, sans-serif`;
      context.textAlign = options.anchor === "end" ? "right" : options.anchor === "start" ? "left" : "center";
      context.translate(x, y);
      if (options.turn) context.rotate(-Math.PI / 2);
      context.fillText(text, 0, 0);
    }),
    box: (x, y, width, height, colour, opacity) => at(() => {
      context.globalAlpha = opacity;
      context.fillStyle = colour;
      context.fillRect(x, y, width, height);
    }),
  });
  return new Promise((resolve, reject) => canvas.toBlob(
    (blob) => (blob ? resolve(blob) : reject(new Error("the picture is too large for this browser"))), "image/png"));
}
