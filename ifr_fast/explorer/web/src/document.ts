/* The document of `RouteGraph.to_json`, and its packed columns (export/packed.py). */

export type IntegerType = "uint8" | "uint16" | "uint32";

/** A column of a table: plain numbers, little-endian numbers in base64, or runs of equal values. */
export type Column =
  | number[]
  | { type: IntegerType | "float32"; base64: string }
  | { values: Column; lengths: Column };

export type KindColumn = string[] | { names: string[]; codes: Column };

export interface Prediction {
  token: string;
  token_id: number;
  probability: number;
}

export interface GraphDocument {
  format: string;
  version: number;
  tokens: string[];
  token_ids: Column;
  position: number;
  threshold: number;
  granularity: "token" | "head";
  n_layers: number;
  n_heads: number;
  parallel: boolean[];
  value_layers: number[];
  predictions: Prediction[];
  span: { positions: number[]; weights: number[]; predictions: Prediction[][] } | null;
  edges: { layer: Column; kind: KindColumn; target: Column; source: Column; weight: Column };
  head_edges: { layer: Column; head: Column; target: Column; source: Column; weight: Column };
  unattributed: { layer: number; kind: string; position: number }[];
  token_importance: Column;
}

const FORMAT = "ifr_fast.route_graph.json";

function bytes(base64: string): Uint8Array {
  const text = atob(base64);
  const out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}

/** The numbers of a column; integers as Uint32Array, weights as Float32Array. */
export function integers(column: Column): Uint32Array {
  if (Array.isArray(column)) return Uint32Array.from(column);
  if ("values" in column) {
    const values = integers(column.values);
    const lengths = integers(column.lengths);
    const out = new Uint32Array(lengths.reduce((sum, n) => sum + n, 0));
    let at = 0;
    values.forEach((value, i) => out.fill(value, at, (at += lengths[i]!)));
    return out;
  }
  const raw = bytes(column.base64).buffer;
  if (column.type === "uint8") return Uint32Array.from(new Uint8Array(raw));
  if (column.type === "uint16") return Uint32Array.from(new Uint16Array(raw));
  if (column.type === "uint32") return new Uint32Array(raw);
  throw new Error(`a column of ${column.type} is no column of integers`);
}

export function weights(column: Column): Float32Array {
  if (Array.isArray(column)) return Float32Array.from(column);
  if ("base64" in column && column.type === "float32") {
    return new Float32Array(bytes(column.base64).buffer);
  }
  throw new Error("a column of weights has to hold float32 numbers");
}

/** The names of a column of kinds and, for each row, the index of its name. */
export function kinds(column: KindColumn): { names: string[]; codes: Uint32Array } {
  if (!Array.isArray(column)) return { names: column.names, codes: integers(column.codes) };
  const names = [...new Set(column)];
  const place = new Map(names.map((name, i) => [name, i]));
  return { names, codes: Uint32Array.from(column, (name) => place.get(name)!) };
}

export function checkDocument(document: GraphDocument): void {
  if (document?.format !== FORMAT) {
    throw new Error(`this is no route graph: its format has to be ${FORMAT}`);
  }
}

/* Back to the plain document, for downloads. */
function plain(column: Column): number[] {
  if (Array.isArray(column)) return column;
  const isWeight = "base64" in column && column.type === "float32";
  return Array.from(isWeight ? weights(column) : integers(column));
}

/** The document with plain columns: what `to_json` gives. */
export function plainDocument(document: GraphDocument): GraphDocument {
  const table = <K extends string>(of: Record<K, Column | KindColumn>): Record<K, unknown> =>
    Object.fromEntries(
      Object.entries(of).map(([name, column]) => {
        if (name !== "kind") return [name, plain(column as Column)];
        const found = kinds(column as KindColumn);
        return [name, Array.from(found.codes, (code) => found.names[code])];
      }),
    ) as Record<K, unknown>;
  return {
    ...document,
    token_ids: plain(document.token_ids),
    edges: table(document.edges) as GraphDocument["edges"],
    head_edges: table(document.head_edges) as GraphDocument["head_edges"],
    token_importance: plain(document.token_importance),
  };
}
