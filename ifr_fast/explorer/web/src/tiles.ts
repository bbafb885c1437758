/* A picture of edges in square tiles, which are painted in slices of time and kept: panning moves
   them, and paints only what comes into sight. */
import type { Box, View } from "./layout";
import { drawEdges, drawGround, drawNodes } from "./paint";
import type { Region, Scene } from "./paint";

const SIDE = 320; // CSS pixels
const KEPT = 160; // tiles

interface Tile {
  canvas: HTMLCanvasElement;
  job: Generator<void> | null; // null: the tile is complete
  used: number;
}

export class Tiles {
  readonly canvas = document.createElement("canvas");
  private readonly pen = this.canvas.getContext("2d")!;
  private readonly before = document.createElement("canvas"); // the last complete picture
  private beforeView: View | null = null;
  private readonly tiles = new Map<string, Tile>();
  private scene: Scene | null = null;
  private edges: Uint32Array = new Uint32Array();
  private nodes: Uint32Array | null = null;
  private ratio = 1;
  private box: Box = { width: 0, height: 0 };
  private clock = 0;
  private scale = "";
  private view: View | null = null;

  constructor(private readonly ground: boolean) {}

  resize(box: Box, ratio: number): void {
    if (box.width === this.box.width && box.height === this.box.height && ratio === this.ratio) return;
    if (ratio !== this.ratio) this.tiles.clear();
    this.box = box;
    this.ratio = ratio;
    this.canvas.width = Math.max(1, Math.round(box.width * ratio));
    this.canvas.height = Math.max(1, Math.round(box.height * ratio));
    this.beforeView = null;
  }

  /** What to draw from now on; nodes null: all that are reached. */
  show(scene: Scene, edges: Uint32Array, nodes: Uint32Array | null): void {
    this.remember();
    this.scene = scene;
    this.edges = edges;
    this.nodes = nodes;
    this.tiles.clear();
  }

  clear(): void {
    this.scene = null;
    this.beforeView = null;
    this.tiles.clear();
    this.pen.setTransform(1, 0, 0, 1, 0, 0);
    this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** Keeps the present picture, to be shown until its successor is painted. */
  private remember(): void {
    if (!this.view || !this.scene || !this.canvas.width) return;
    const { width, height } = this.canvas;
    if (this.before.width !== width) this.before.width = width;
    if (this.before.height !== height) this.before.height = height;
    const pen = this.before.getContext("2d")!;
    pen.clearRect(0, 0, width, height);
    pen.drawImage(this.canvas, 0, 0);
    this.beforeView = this.view;
  }

  /** Paints until `deadline` and puts the tiles together; whether the picture is complete. */
  paint(view: View, deadline: number): boolean {
    if (!this.scene) return true;
    const scale = `${view.sx} ${view.sy}`;
    if (scale !== this.scale) {
      this.remember();
      this.tiles.clear();
      this.scale = scale;
    }
    this.view = view;
    this.clock++;
    const { width, height } = this.box;
    const seen: { tile: Tile; x: number; y: number }[] = [];
    let complete = true;
    for (let j = Math.floor(-view.ty / SIDE); j * SIDE + view.ty < height; j++) {
      for (let i = Math.floor(-view.tx / SIDE); i * SIDE + view.tx < width; i++) {
        const tile = this.tileAt(i, j, view);
        tile.used = this.clock;
        seen.push({ tile, x: i * SIDE + view.tx, y: j * SIDE + view.ty });
      }
    }
    for (const { tile } of seen) {
      while (tile.job && performance.now() < deadline) {
        if (tile.job.next().done) tile.job = null;
      }
      if (tile.job) complete = false;
    }
    this.compose(seen, view);
    if (complete) this.beforeView = null;
    this.drop();
    return complete;
  }

  private tileAt(i: number, j: number, view: View): Tile {
    const key = `${i} ${j}`;
    let tile = this.tiles.get(key);
    if (!tile) {
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = Math.ceil(SIDE * this.ratio);
      const region = { left: i * SIDE, top: j * SIDE, right: (i + 1) * SIDE, bottom: (j + 1) * SIDE };
      tile = { canvas, job: this.job(canvas, region, view.sx, view.sy), used: this.clock };
      this.tiles.set(key, tile);
    }
    return tile;
  }

  private *job(canvas: HTMLCanvasElement, region: Region, sx: number, sy: number): Generator<void> {
    const pen = canvas.getContext("2d")!, scene = this.scene!;
    pen.setTransform(this.ratio, 0, 0, this.ratio, -region.left * this.ratio, -region.top * this.ratio);
    if (this.ground) drawGround(pen, scene, sx, sy, region);
    yield* drawEdges(pen, scene, this.edges, sx, sy, region);
    drawNodes(pen, scene, this.nodes, sx, sy, region);
  }

  private compose(seen: { tile: Tile; x: number; y: number }[], view: View): void {
    const pen = this.pen, ratio = this.ratio, before = this.beforeView;
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (const { tile, x, y } of seen) {
      const left = Math.round(x * ratio), top = Math.round(y * ratio);
      if (!tile.job || !before) {
        pen.drawImage(tile.canvas, left, top);
        continue;
      }
      pen.save();
      pen.beginPath();
      pen.rect(left, top, tile.canvas.width, tile.canvas.height);
      pen.clip();
      const kx = view.sx / before.sx, ky = view.sy / before.sy;
      pen.drawImage(this.before,
        (view.tx - before.tx * kx) * ratio, (view.ty - before.ty * ky) * ratio,
        this.before.width * kx, this.before.height * ky);
      pen.restore();
    }
  }

  private drop(): void {
    if (this.tiles.size <= KEPT) return;
    const oldest = [...this.tiles].sort((a, b) => a[1].used - b[1].used);
    for (const [key] of oldest.slice(0, this.tiles.size - KEPT)) this.tiles.delete(key);
  }
}
