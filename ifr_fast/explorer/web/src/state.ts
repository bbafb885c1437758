/* What a reader has set, with undo, and its form in the URL's hash. */
import { LOOKS } from "./graph";
import type { Graph, LooksName } from "./graph";

/** A node that the reader keeps in sight, by a name and in a group of their own. */
export interface Pin { node: number; name: string; group: string }

/** An edge as the page's URL names it: layer, kind, target and source. */
export interface EdgeKey { layer: number; kind: string; target: number; source: number }

export type Selection = { node: number } | { edge: EdgeKey } | null;
export type Mode = "graph" | "text" | "table";

export interface State {
  threshold: number | null; // null: the graph's own
  hidden: LooksName[];
  mode: Mode;
  selected: Selection;
  pins: Pin[];
  fold: boolean;
  unfolded: number[]; // positions of folded tokens that were opened
  theme: "auto" | "light" | "dark";
  model: string | null;
  text: string | null; // of the live input; chats are kept in `messages`
  messages: { role: string; content: string }[] | null;
  positions: number[]; // that are explained; empty: the last
  byHead: boolean;
  renormalize: boolean;
  normalize: boolean; // before the unembedding
  floor: number; // the lowest threshold that a live trace is made for
}

export const INITIAL: State = {
  threshold: null, hidden: [], mode: "graph", selected: null, pins: [], fold: true, unfolded: [],
  theme: "auto", model: null, text: null, messages: null, positions: [], byHead: false,
  renormalize: false, normalize: true, floor: 0.01,
};

export function keyOf(graph: Graph, e: number): EdgeKey {
  return {
    layer: graph.layer[e]!, kind: graph.kindOf(e), target: graph.target[e]!, source: graph.source[e]!,
  };
}

/** The edge that a key names, or -1. */
export function edgeOf(graph: Graph, key: EdgeKey): number {
  for (let e = 0; e < graph.E; e++) {
    if (graph.layer[e] === key.layer && graph.target[e] === key.target &&
        graph.source[e] === key.source && graph.kindOf(e) === key.kind) return e;
  }
  return -1;
}

const flag = (value: boolean): string => (value ? "1" : "0");

export function toHash(state: State): string {
  const out = new URLSearchParams();
  const put = (name: string, value: string, usual: string): void => {
    if (value !== usual) out.set(name, value);
  };
  put("threshold", state.threshold === null ? "" : String(state.threshold), "");
  put("hide", state.hidden.join(","), "");
  put("view", state.mode, INITIAL.mode);
  if (state.selected && "node" in state.selected) out.set("node", String(state.selected.node));
  if (state.selected && "edge" in state.selected) {
    const { layer, kind, target, source } = state.selected.edge;
    out.set("edge", [layer, kind, target, source].join("."));
  }
  put("pins", state.pins.length ? JSON.stringify(state.pins.map((p) => [p.node, p.name, p.group])) : "", "");
  put("fold", flag(state.fold), "1");
  put("open", state.unfolded.join(","), "");
  put("theme", state.theme, INITIAL.theme);
  put("model", state.model ?? "", "");
  put("text", state.text ?? "", "");
  put("messages", state.messages ? JSON.stringify(state.messages) : "", "");
  put("at", state.positions.join(","), "");
  put("heads", flag(state.byHead), "0");
  put("renormalize", flag(state.renormalize), "0");
  put("normalize", flag(state.normalize), "1");
  put("floor", String(state.floor), String(INITIAL.floor));
  return out.toString();
}

const wholes = (text: string | null): number[] =>
  (text ?? "").split(",").filter((part) => /^\d{1,9}$/.test(part)).map(Number);

function parsed(text: string | null): unknown {
  try {
    return text ? JSON.parse(text) : null;
  } catch {
    return null;
  }
}

/** The state that a hash describes; what it does not say, or says wrongly, is as at first. */
export function fromHash(hash: string): State {
  const found = new URLSearchParams(hash.replace(/^#/, ""));
  const state: State = { ...INITIAL };
  const fraction = (name: string): number | null => {
    const value = Number(found.get(name) ?? NaN);
    return value >= 0 && value <= 1 ? value : null;
  };
  state.threshold = found.has("threshold") ? fraction("threshold") : null;
  state.hidden = LOOKS.filter((name) => (found.get("hide") ?? "").split(",").includes(name));
  const mode = found.get("view");
  if (mode === "text" || mode === "table") state.mode = mode;
  const [node] = wholes(found.get("node"));
  if (node !== undefined) state.selected = { node };
  const edge = /^(\d{1,9})\.(\w{1,40})\.(\d{1,9})\.(\d{1,9})$/.exec(found.get("edge") ?? "");
  if (edge) {
    const [, layer, kind, target, source] = edge;
    state.selected = {
      edge: { layer: Number(layer), kind: kind!, target: Number(target), source: Number(source) },
    };
  }
  const pins = parsed(found.get("pins"));
  if (Array.isArray(pins)) {
    state.pins = pins
      .filter((p): p is [number, unknown, unknown] => Array.isArray(p) && Number.isInteger(p[0]) && p[0] >= 0)
      .map(([at, name, group]) => ({ node: at, name: String(name ?? ""), group: String(group ?? "") }));
  }
  state.fold = found.get("fold") !== "0";
  state.unfolded = wholes(found.get("open"));
  const theme = found.get("theme");
  if (theme === "light" || theme === "dark") state.theme = theme;
  state.model = found.get("model");
  state.text = found.get("text");
  const messages = parsed(found.get("messages"));
  if (Array.isArray(messages)) {
    state.messages = messages.map((m: { role?: unknown; content?: unknown }) => ({
      role: String(m?.role ?? "user"), content: String(m?.content ?? ""),
    }));
  }
  state.positions = wholes(found.get("at"));
  state.byHead = found.get("heads") === "1";
  state.renormalize = found.get("renormalize") === "1";
  state.normalize = found.get("normalize") !== "0";
  state.floor = fraction("floor") ?? INITIAL.floor;
  return state;
}

/** The state, the states before it and those that were undone. */
export class Store {
  private past: State[] = [];
  private future: State[] = [];
  private last = { what: "", time: 0 };
  private readonly listeners = new Set<() => void>();

  constructor(public state: State) {}

  /** Changes the state. Quick changes of one named thing, as by a slider, are undone together. */
  set(change: Partial<State>, what = ""): void {
    const now = performance.now();
    if (!what || what !== this.last.what || now - this.last.time > 700) this.past.push(this.state);
    if (this.past.length > 200) this.past.shift();
    this.last = { what, time: now };
    this.future = [];
    this.state = { ...this.state, ...change };
    this.tell();
  }

  /** Changes the state as if it had been so from the first. */
  replace(change: Partial<State>): void {
    this.state = { ...this.state, ...change };
    this.tell();
  }

  get canUndo(): boolean { return this.past.length > 0; }
  get canRedo(): boolean { return this.future.length > 0; }

  undo(): void { this.move(this.past, this.future); }
  redo(): void { this.move(this.future, this.past); }

  private move(from: State[], to: State[]): void {
    const next = from.pop();
    if (!next) return;
    to.push(this.state);
    this.state = next;
    this.last = { what: "", time: 0 };
    this.tell();
  }

  listen(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  private tell(): void { this.listeners.forEach((listener) => listener()); }
}
