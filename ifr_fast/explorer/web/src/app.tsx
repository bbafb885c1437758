/* The explorer: state, tools, and the views of one graph. */
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import type { ComponentChildren } from "preact";
import { Brief, Ends } from "./describe";
import { CompareView } from "./compare";
import { Details, Kind, kindText } from "./details";
import { download } from "./files";
import { plainDocument } from "./document";
import { Grid } from "./grid";
import type { GridHandle } from "./grid";
import { IconButton } from "./icons";
import { Graph, LOOKS, Looks, stepAt, thresholdAt } from "./graph";
import type { LooksName } from "./graph";
import type { Hit } from "./hit";
import { endsOf, layOut } from "./layout";
import { openCalls } from "./calls";
import { useLive } from "./live";
import type { LiveParts } from "./live";
import type { Scene } from "./paint";
import { frameOf, pngOf, svgOf } from "./picture";
import type { Probe } from "./probe";
import { edgeOf, keyOf } from "./state";
import type { Mode, State, Store } from "./state";
import { Table } from "./table";
import { TextView } from "./textview";
import { DARK, LIGHT } from "./theme";
import { At, Token } from "./token";
import { count, digits, percent, visible } from "./tokens";
import type { GraphDocument } from "./document";
import type { Backend } from "./backend";

const STEPS = 1000; // of the threshold's slider
export type Host = "static" | "server" | "widget";

interface Props {
  document: GraphDocument | null;
  backend: Backend | null;
  store: Store;
  root: HTMLElement; // for fullscreen and the theme
  probe: Probe;
}

function useStore(store: Store): State {
  const [, set] = useState(0);
  useEffect(() => store.listen(() => set((n) => n + 1)), [store]);
  return store.state;
}

function useDark(theme: State["theme"]): boolean {
  const query = useMemo(() => matchMedia("(prefers-color-scheme: dark)"), []);
  const [dark, setDark] = useState(query.matches);
  useEffect(() => {
    const listen = (): void => setDark(query.matches);
    query.addEventListener("change", listen);
    return () => query.removeEventListener("change", listen);
  }, []);
  return theme === "auto" ? dark : theme === "dark";
}

export function App(props: Props) {
  const { store, root, probe } = props;
  const state = useStore(store);
  const [loaded, setLoaded] = useState<Graph | null>(() => (props.document ? new Graph(props.document) : null));
  useEffect(() => {
    if (props.document && loaded?.document !== props.document) setLoaded(new Graph(props.document));
  }, [props.document]);
  const live = useLive(props.backend, store, state, loaded, setLoaded);
  const graph = live?.graph ?? loaded;
  const dark = useDark(state.theme);
  useLayoutEffect(() => { root.dataset.theme = dark ? "dark" : "light"; }, [dark]);

  useEffect(() => {
    const onKey = (event: KeyboardEvent): void => {
      if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z") return;
      const target = event.composedPath()[0];
      if (target instanceof HTMLInputElement && target.type !== "range" && target.type !== "checkbox") return;
      if (target instanceof HTMLTextAreaElement) return;
      event.preventDefault();
      if (event.shiftKey) store.redo();
      else store.undo();
    };
    // A page of its own hears the keys wherever the focus is; a notebook has keys of its own.
    const heard: EventTarget = root.dataset.host === "widget" ? root : document;
    heard.addEventListener("keydown", onKey as EventListener);
    return () => heard.removeEventListener("keydown", onKey as EventListener);
  }, []);

  return (
    <div class={`app${live ? " live" : ""}`}>
      {live?.panel}
      {graph && live?.comparison
        ? <main class="explorer">{live.status}<CompareView comparison={live.comparison} theme={dark ? DARK : LIGHT} threshold={state.threshold} probe={probe}
            onThreshold={(threshold) => store.set({ threshold }, "threshold")} onClose={live.closeComparison} /></main>
        : graph
        ? <Explorer key="explorer" {...props} state={state} graph={graph} dark={dark} live={live} />
        : <main class="empty-main">{live?.status ?? <p>There is no graph to show.</p>}</main>}
      <span class="unseen" ref={(element) => { if (element) probe.idle = () => !live?.busy && openCalls() === 0; }} />
    </div>
  );
}

interface ExplorerProps extends Props { state: State; graph: Graph; dark: boolean; live: LiveParts | null }

function Explorer({ store, root, probe, state, graph, dark, live }: ExplorerProps) {
  const least = graph.threshold;
  const threshold = Math.max(least, state.threshold ?? least);
  const pruned = useMemo(() => graph.prune(threshold), [graph, threshold]);
  const layout = useMemo(() => layOut(graph, pruned, state.fold, state.unfolded), [graph, pruned, state.fold, state.unfolded]);
  const ends = useMemo(() => endsOf(graph, layout), [graph, layout]);
  const theme = dark ? DARK : LIGHT;
  const scene: Scene = useMemo(() => ({ graph, pruned, layout, ends, theme }), [graph, pruned, layout, ends, theme]);
  const hidden = useMemo(() => new Set(state.hidden), [state.hidden]);
  const selected = useMemo((): Hit | null => {
    const chosen = state.selected;
    if (!chosen) return null;
    if ("node" in chosen) return chosen.node < graph.nodes ? { node: chosen.node } : null;
    const edge = edgeOf(graph, chosen.edge);
    return edge >= 0 ? { edge } : null;
  }, [state.selected, graph]);
  const [hover, setHover] = useState<{ hit: Hit | { column: number }; x: number; y: number } | null>(null);
  const followed: Hit | null = useMemo(() => {
    if (!hover) return selected;
    if (!("column" in hover.hit)) return hover.hit;
    const column = layout.columns[hover.hit.column];
    return column && !column.gap ? { node: column.first } : selected;
  }, [hover?.hit, selected, layout]);
  const followedKey = followed ? `${followed.edge} ${followed.node}` : "";
  const lit = useMemo(() => {
    if (!followed) return null;
    const node = followed.edge === undefined ? followed.node : graph.above[followed.edge]!;
    if (!pruned.reached[node]) return null;
    if (followed.edge !== undefined && !(pruned.weight[followed.edge]! > 0)) return null;
    return graph.paths(pruned, followed);
  }, [graph, pruned, followedKey]);
  const grid = useRef<GridHandle | null>(null);
  Object.assign(probe, { scene, lit, hidden, selected });
  useLayoutEffect(() => { probe.grid = grid.current; });

  const onHover = (hit: Hit | { column: number } | null, x: number, y: number): void => setHover((old) => {
    if (!hit) return null;
    if (old && JSON.stringify(old.hit) === JSON.stringify(hit)) return { hit: old.hit, x, y };
    return { hit, x, y };
  });
  const choose = (hit: Hit | null): void => {
    select(hit);
    // What is picked in a table may be out of sight.
    if (hit) requestAnimationFrame(() => grid.current?.reveal(hit));
  };
  const select = (hit: Hit | null): void => {
    setHover(null);
    store.set({
      selected: !hit ? null : hit.node !== undefined ? { node: hit.node } : { edge: keyOf(graph, hit.edge) },
    });
  };
  useEffect(() => {
    const onKey = (event: KeyboardEvent): void => {
      if (event.key !== "Escape") return;
      if (hover) setHover(null);
      else if (store.state.selected) select(null);
    };
    root.addEventListener("keydown", onKey);
    return () => root.removeEventListener("keydown", onKey);
  }, [hover !== null, graph]);

  const title = graph.starts.map((s) => visible(s.predictions[0]?.token ?? "?")).join("");
  const kinds = LOOKS.filter((_, looks) => looks !== Looks.Other || graph.looks.includes(Looks.Other));
  const picture = () => frameOf(scene, hidden.size ? pruned.kept.filter((e) => !hidden.has(LOOKS[graph.looks[e]!]!)) : pruned.kept,
    grid.current?.view() ?? { sx: 40, sy: 20, tx: 0, ty: 0 }, grid.current?.box() ?? { width: 1000, height: 600 });
  const save = {
    PNG: async () => download("routes.png", await pngOf(picture())),
    SVG: () => download("routes.svg", new Blob([svgOf(picture(), `Routes to ${title}`)], { type: "image/svg+xml" })),
    JSON: () => download("routes.json", new Blob([JSON.stringify(plainDocument(graph.document))], { type: "application/json" })),
    ...live?.downloads,
  };
  return (
    <main class="explorer">
      <div class="top">
        <Header graph={graph} live={live} />
        <div class="buttons">
          <IconButton icon="undo" label="Undo" hint="Ctrl+Z" disabled={!store.canUndo} onClick={() => store.undo()} />
          <IconButton icon="redo" label="Redo" hint="Ctrl+Shift+Z" disabled={!store.canRedo} onClick={() => store.redo()} />
          <Menu label="Download">
            {Object.entries(save).map(([name, run]) => <button type="button" onClick={() => void run()}>{name}</button>)}
          </Menu>
          <IconButton icon={dark ? "sun" : "moon"} label={dark ? "Light colours" : "Dark colours"} onClick={() => store.set({ theme: dark ? "light" : "dark" })} />
          <IconButton icon="full" label="Fullscreen" onClick={() => void fullscreen(root)} />
        </div>
      </div>
      <div class="tools" role="toolbar" aria-label="Tools">
        <Threshold graph={graph} threshold={threshold} kept={pruned.kept.length}
          onChange={(value) => store.set({ threshold: value <= least ? null : value }, "threshold")} />
        <Modes mode={state.mode} onChange={(mode) => store.set({ mode })} />
        <fieldset class="kinds">
          <legend class="unseen">Legend; each kind of edge can be hidden</legend>
          {kinds.map((name) => (
            <KindKey key={name} name={name} shown={!hidden.has(name)}
              onChange={(shown) => store.set({ hidden: shown ? state.hidden.filter((k) => k !== name) : [...state.hidden, name] })} />
          ))}
          {graph.unattributed.size > 0 && (
            <span class="key unattributed" title="All parts of this node have proximity 0, so none can be told from the others: each of its n edges got the weight 1/n.">
              <i aria-hidden="true" />unattributed
            </span>
          )}
        </fieldset>
        {graph.T > 40 && state.mode === "graph" && (
            <label class="check" title="Fold tokens that no route touches"><input type="checkbox" checked={state.fold} onChange={(e) => store.set({ fold: e.currentTarget.checked, unfolded: [] })} />fold</label>
          )}
      </div>
      {live?.status}
      <div class={`views ${state.mode}`}>
        {state.mode === "graph" && (
          <Grid scene={scene} hidden={hidden} lit={lit} selected={selected} pins={state.pins} live={live !== null} roles={live?.roles?.length === graph.T ? live.roles : null} handle={grid}
            onHover={onHover} onPick={select} onExplain={(positions) => live?.explain(positions)}
            onUnfold={(first, last) => store.set({ unfolded: [...state.unfolded, ...Array.from({ length: last - first + 1 }, (_, i) => first + i)] })} />
        )}
        {state.mode === "text" && (
          <TextView scene={scene} selected={selected?.node !== undefined ? selected.node % graph.T : null} lit={lit} live={live !== null} roles={live?.roles?.length === graph.T ? live.roles : null}
            onPick={(t) => select(selected?.node === t ? null : { node: t })} onExplain={(positions) => live?.explain(positions)}
            onHover={(t, x, y) => onHover(t === null ? null : { node: t }, x, y)} />
        )}
        {state.mode === "table" && <Tables scene={scene} hidden={hidden} onSelect={select} onHover={(hit) => onHover(hit, -1, -1)} />}
        <Details scene={scene} selected={selected} pins={state.pins} onSelect={choose}
          onHover={(hit) => onHover(hit, -1, -1)} onPins={(pins) => store.set({ pins })}
          extra={selected && live ? live.details(scene, selected) : null} />
      </div>
      {live?.below()}
      {hover && hover.x >= 0 && <Tip x={hover.x} y={hover.y}><Brief scene={scene} hit={hover.hit} /></Tip>}
    </main>
  );
}

function Header({ graph, live }: { graph: Graph; live: LiveParts | null }) {
  const first = graph.starts[0]!, several = graph.starts.length > 1;
  const best = first.predictions[0];
  return (
    <header>
      <h1>Routes to <span class="predicted">{graph.starts.map((s) => <Token text={s.predictions[0]?.token ?? "?"} />)}</span>
        {best && !several && <span class="probability"> {percent(best.probability)}</span>}</h1>
      <p class="facts">
        {several
          ? <>{graph.starts.length} predictions, after <Token text={graph.tokens[first.position]!} /><At position={first.position} /> to </>
          : "after "}
        <Token text={graph.tokens[graph.position]!} /><At position={graph.position} />
        {` · ${count(graph.T)} tokens, ${graph.L} layers, ${graph.document.n_heads} heads · edges ${graph.byHead ? "by head" : "summed over heads"}`}
        {live?.facts}
      </p>
    </header>
  );
}

function Threshold(props: { graph: Graph; threshold: number; kept: number; onChange: (value: number) => void }) {
  const { graph, threshold } = props;
  const least = graph.threshold;
  // A threshold that was set otherwise keeps its value until the slider is moved.
  const text = threshold.toPrecision(3);
  return (
    <div class="slider">
      <label for="threshold">Threshold</label>
      <input id="threshold" type="range" min="0" max={STEPS} step="1" value={stepAt(least, threshold, STEPS)} disabled={least >= 1}
        aria-valuetext={text} aria-describedby="count"
        onInput={(event) => props.onChange(thresholdAt(least, Number(event.currentTarget.value), STEPS))} />
      <output for="threshold">{text}</output>
      <span id="count" role="status">{count(props.kept)} of {count(graph.E)} edges</span>
    </div>
  );
}

function Modes({ mode, onChange }: { mode: Mode; onChange: (mode: Mode) => void }) {
  const names: [Mode, string][] = [["graph", "Graph"], ["text", "Text"], ["table", "Table"]];
  return (
    <div class="modes" role="group" aria-label="View">
      {names.map(([name, label]) => (
        <button type="button" key={name} aria-pressed={mode === name} onClick={() => onChange(name)}>{label}</button>
      ))}
    </div>
  );
}

const SHOWN: Record<LooksName, string> = { attention: "attention", ffn: "FFN", residual: "residual", other: "other kinds" };
function KindKey({ name, shown, onChange }: { name: LooksName; shown: boolean; onChange: (shown: boolean) => void }) {
  const paths: Record<LooksName, string> = { attention: "M2 12C2 3 26 11 26 2", ffn: "M2 7H26", residual: "M2 7H26", other: "M2 7H26" };
  return (
    <label class={`key of-${name}`}>
      <input type="checkbox" data-shows={name} checked={shown} onChange={(event) => onChange(event.currentTarget.checked)} />
      <svg viewBox="0 0 28 14" aria-hidden="true">
        <path d={paths[name]} stroke-dasharray={name === "other" ? "5 3" : undefined} />
        {name === "ffn" && <rect x="11" y="4" width="6" height="6" />}
      </svg>
      {SHOWN[name]}
    </label>
  );
}

export function Menu({ label, children }: { label: string; children: ComponentChildren }) {
  const element = useRef<HTMLDetailsElement>(null);
  useEffect(() => {
    const close = (event: Event): void => {
      if (element.current?.open && !event.composedPath().includes(element.current)) element.current.open = false;
    };
    document.addEventListener("pointerdown", close);
    return () => document.removeEventListener("pointerdown", close);
  }, []);
  return (
    <details class="menu" ref={element}
      onKeyDown={(event) => { if (event.key === "Escape") event.currentTarget.open = false; }}>
      <summary>{label}</summary>
      <div onClick={() => { element.current!.open = false; }}>{children}</div>
    </details>
  );
}

async function fullscreen(root: HTMLElement): Promise<void> {
  try {
    if (document.fullscreenElement) await document.exitFullscreen();
    else await root.requestFullscreen();
  } catch {
    root.toggleAttribute("data-wide"); // where the browser refuses, fill the page
  }
}

function Tip({ x, y, children }: { x: number; y: number; children: ComponentChildren }) {
  const element = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const tip = element.current!, { offsetWidth: w, offsetHeight: h } = tip;
    const left = x + 16 + w > innerWidth ? x - 16 - w : x + 16;
    tip.style.left = `${Math.max(4, Math.min(left, innerWidth - w - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - h - 4))}px`;
  });
  return <div ref={element} class="tip" role="tooltip">{children}</div>;
}

function Tables({ scene, hidden, onSelect, onHover }: { scene: Scene; hidden: ReadonlySet<LooksName>; onSelect: (hit: Hit) => void; onHover: (hit: Hit | null) => void }) {
  const { graph, pruned } = scene;
  const edges = useMemo(
    () => Array.from(pruned.kept).filter((e) => !hidden.has(LOOKS[graph.looks[e]!]!)), [graph, pruned, hidden]);
  const tokens = useMemo(() => Array.from({ length: graph.T }, (_, t) => t), [graph]);
  return (
    <div class="tables">
      <Table label="Edges" rows={edges} sorted={{ column: 4, down: true }} page={100} onPick={(edge) => onSelect({ edge })}
        columns={[
          { name: "kind", value: (e) => kindText(graph, e), show: (e) => <Kind graph={graph} edge={e} /> },
          { name: "layer", value: (e) => graph.layer[e]! },
          { name: "from → to", value: (e) => `${visible(graph.tokens[graph.source[e]!]!)} #${graph.source[e]} → ${visible(graph.tokens[graph.target[e]!]!)} #${graph.target[e]}`, show: (e) => <Ends graph={graph} edge={e} /> },
          { name: "weight", value: (e) => pruned.weight[e]!, show: (e) => digits(pruned.weight[e]!) },
          { name: "flow", value: (e) => pruned.through[e]!, show: (e) => digits(pruned.through[e]!), title: "Weight times that of all paths from the prediction to the edge's target" },
          {
            name: "heads", value: (e) => graph.heads(e).map((h) => `${h.head} (${digits(h.weight)})`).join(", "),
            show: (e) => graph.heads(e).slice(0, 4).map((h) => `${h.head} (${digits(h.weight)})`).join(", ") + (graph.headStart[e + 1]! - graph.headStart[e]! > 4 ? " …" : ""),
          },
        ]} />
      <Table label="Tokens" rows={tokens} sorted={{ column: 2, down: true }} page={100} onPick={(node) => onSelect({ node })}
        onHover={(node) => onHover(node === null ? null : { node })}
        columns={[
          { name: "token", value: (t) => visible(graph.tokens[t]!), show: (t) => <Token text={graph.tokens[t]!} /> },
          { name: "position", value: (t) => t },
          { name: "importance", value: (t) => pruned.flow[t]!, show: (t) => digits(pruned.flow[t]!) },
        ]} />
    </div>
  );
}
