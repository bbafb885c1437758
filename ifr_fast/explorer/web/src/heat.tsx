/* A map of positions by positions as a heat map, with the value under the pointer in words, and its
   largest entries as a table. */
import { useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { integers, weights } from "./document";
import type { Column } from "./document";
import type { Scene } from "./paint";
import { Table } from "./table";
import { At, Token } from "./token";
import { digits, visible } from "./tokens";

export type MapResult =
  | { weights: number[][] }
  | { size: number; row: Column; column: Column; weight: Column };

interface Entry { row: number; column: number; weight: number }

function entriesOf(result: MapResult, rows: number[] | null): Entry[] {
  if ("weights" in result) {
    return result.weights.flatMap((line, i) =>
      line.map((weight, column) => ({ row: rows ? rows[i]! : i, column, weight })).filter((entry) => entry.weight > 0));
  }
  const row = integers(result.row), column = integers(result.column);
  return Array.from(weights(result.weight), (weight, i) => ({ row: row[i]!, column: column[i]!, weight }));
}

interface Props { label: string; scene: Scene; result: MapResult; rows: number[] | null; target: number; source: number }

export function HeatMap({ label, scene, result, rows, target, source }: Props) {
  const { graph, theme } = scene;
  const entries = useMemo(() => entriesOf(result, rows), [result]);
  const first = rows ? rows[0]! : 0, height = rows ? rows.length : graph.T, width = graph.T;
  const canvas = useRef<HTMLCanvasElement>(null);
  const [at, setAt] = useState<{ row: number; column: number } | null>(null);
  const byPlace = useMemo(() => new Map(entries.map((e) => [e.row * width + e.column, e.weight])), [entries]);
  useLayoutEffect(() => {
    const pen = canvas.current!.getContext("2d")!;
    const image = pen.createImageData(width, height);
    const [r, g, b] = theme.heat;
    for (const entry of entries) {
      const i = 4 * ((entry.row - first) * width + entry.column);
      if (i < 0 || i >= image.data.length) continue;
      image.data.set([r, g, b, 255 * Math.sqrt(Math.min(1, entry.weight))], i);
    }
    pen.putImageData(image, 0, 0);
  }, [entries, theme]);
  const point = (event: PointerEvent): void => {
    const box = canvas.current!.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * width);
    const row = first + Math.floor(((event.clientY - box.top) / box.height) * height);
    setAt(column >= 0 && column < width && row >= first && row < first + height ? { row, column } : null);
  };
  const here = at ?? { row: target, column: source };
  const percent = (part: number, whole: number): string => `${(100 * part) / whole}%`;
  return (
    <figure class="heat-map">
      <div class="heat-frame" style={{ aspectRatio: `${width} / ${Math.max(height, width / 3)}` }}>
        <canvas ref={canvas} width={width} height={height} role="img"
          aria-label={`${label}: rows read, columns are read. Its largest entries are in the table below.`}
          onPointerMove={point} onPointerLeave={() => setAt(null)} />
        <i aria-hidden="true" style={{ left: percent(here.column, width), top: percent(here.row - first, height), width: percent(1, width), height: percent(1, height) }} />
      </div>
      <figcaption class="quiet">
        <Token text={graph.tokens[here.row]!} /><At position={here.row} /> reads <Token text={graph.tokens[here.column]!} /><At position={here.column} />: <b class="value">{digits(byPlace.get(here.row * width + here.column) ?? 0)}</b>
      </figcaption>
      <Table label={label} rows={entries} sorted={{ column: 2, down: true }} page={8} columns={[
        { name: "reads", value: (e) => `${visible(graph.tokens[e.row]!)} #${e.row}`, show: (e) => <><Token text={graph.tokens[e.row]!} /><At position={e.row} /></> },
        { name: "is read", value: (e) => `${visible(graph.tokens[e.column]!)} #${e.column}`, show: (e) => <><Token text={graph.tokens[e.column]!} /><At position={e.column} /></> },
        { name: "weight", value: (e) => e.weight, show: (e) => digits(e.weight) },
      ]} />
    </figure>
  );
}
