/* The panel on what was picked: an edge or a node, what leads there and on, and the pins. */
import type { ComponentChildren } from "preact";
import { useMemo } from "preact/hooks";
import { EdgeFacts, NodeFacts, nodeText } from "./describe";
import { Looks } from "./graph";
import type { Graph } from "./graph";
import type { Hit } from "./hit";
import type { Scene } from "./paint";
import type { Pin } from "./state";
import { Table } from "./table";
import type { TableColumn } from "./table";
import { At, Token } from "./token";
import { digits, visible } from "./tokens";

interface Props {
  scene: Scene;
  selected: Hit | null;
  pins: Pin[];
  extra: ComponentChildren; // what a backend adds
  onSelect: (hit: Hit | null) => void;
  onHover: (hit: Hit | null) => void;
  onPins: (pins: Pin[]) => void;
}

export function Details(props: Props) {
  const { selected, pins } = props;
  const pinned = selected?.node !== undefined && pins.some((pin) => pin.node === selected.node);
  return (
    <aside class={`details${selected || pins.length ? "" : " idle"}`} aria-label="Details">
      {!selected && (
        <div class="hint">
          <h2>Follow a route</h2>
          <p>Point at a node, an edge or a token to light up all paths through it. Click to keep it here
            with its tables.</p>
          <p class="quiet">Drag to pan, Ctrl and wheel to zoom. With the keyboard: focus the graph, move with the
            arrow keys, pick with Enter.</p>
        </div>
      )}
      {selected && (
        <div class="picked-facts">
          <div class="picked-bar">
            {selected.node !== undefined && !pinned && (
              <button type="button" class="small" onClick={() => props.onPins([...pins, { node: selected.node, name: "", group: "" }])}>Pin</button>
            )}
            {selected.node !== undefined && pinned && (
              <button type="button" class="small" onClick={() => props.onPins(pins.filter((p) => p.node !== selected.node))}>Unpin</button>
            )}
            <button type="button" class="small" aria-label="Close details" onClick={() => props.onSelect(null)}>Close</button>
          </div>
          {selected.edge !== undefined && <EdgePart {...props} edge={selected.edge} />}
          {selected.node !== undefined && <NodePart {...props} node={selected.node} />}
          {props.extra}
        </div>
      )}
      {pins.length > 0 && <Pins {...props} />}
    </aside>
  );
}

function EdgePart({ scene, edge, extra, onSelect }: Props & { edge: number }) {
  const { graph, pruned } = scene;
  const heads = useMemo(
    () => graph.heads(edge, graph.byHead ? Math.fround(pruned.threshold) : -1), [graph, edge, pruned]);
  return (
    <>
      <EdgeFacts scene={scene} edge={edge} />
      <p class="ends">
        <button type="button" class="link" onClick={() => onSelect({ node: graph.below[edge]! })}>read node</button>
        {" → "}
        <button type="button" class="link" onClick={() => onSelect({ node: graph.above[edge]! })}>reading node</button>
      </p>
      {graph.looks[edge] === Looks.Attention && !extra && (
        <Table label="Heads" rows={heads} sorted={{ column: 1, down: true }} columns={[
          { name: "head", value: (h) => h.head },
          { name: "weight", value: (h) => h.weight, show: (h) => digits(h.weight) },
          {
            name: "share", value: (h) => h.weight / (graph.weight[edge] || 1),
            show: (h) => <div class="bar" style={{ width: `${(100 * h.weight) / (heads[0]?.weight || 1)}%` }} />,
          },
        ]} />
      )}
    </>
  );
}

function edgeColumns(scene: Scene, end: "source" | "target"): TableColumn<number>[] {
  const { graph, pruned } = scene;
  return [
    {
      name: end === "source" ? "from" : "to", value: (e) => visible(graph.tokens[graph[end][e]!]!),
      show: (e) => <><Token text={graph.tokens[graph[end][e]!]!} /><At position={graph[end][e]!} /></>,
    },
    { name: "kind", value: (e) => kindText(graph, e), show: (e) => <Kind graph={graph} edge={e} /> },
    { name: "weight", value: (e) => pruned.weight[e]!, show: (e) => digits(pruned.weight[e]!) },
    { name: "flow", value: (e) => pruned.through[e]!, show: (e) => digits(pruned.through[e]!), title: "Weight times that of all paths from the prediction to the edge's target" },
  ];
}

const LABELS = ["residual", "attention", "ffn", "other"] as const;
/** An edge's kind and layer in short. */
export function kindText(graph: Graph, edge: number): string {
  const looks = graph.looks[edge]!;
  const text = looks === Looks.Ffn ? "FFN" : looks === Looks.Other ? graph.kindOf(edge) : LABELS[looks];
  return `${text} ${graph.layer[edge]}`;
}

export function Kind({ graph, edge }: { graph: Graph; edge: number }) {
  return <span class={`of-${LABELS[graph.looks[edge]!]}`}>{kindText(graph, edge)}</span>;
}

function NodePart(props: Props & { node: number }) {
  const { scene, node, onSelect, onHover } = props;
  const { graph, pruned } = scene;
  const into = useMemo(() => graph.edgesInto(pruned, node), [graph, pruned, node]);
  const out = useMemo(() => graph.edgesOutOf(pruned, node), [graph, pruned, node]);
  const common = {
    page: 12, onPick: (edge: number) => onSelect({ edge }),
    onHover: (edge: number | null) => onHover(edge === null ? null : { edge }),
  };
  return (
    <>
      <NodeFacts scene={scene} node={node} />
      {into.length > 0 && <Table label="Reads from" key={`in ${node}`} rows={into} columns={edgeColumns(scene, "source")} {...common} />}
      {out.length > 0 && <Table label="Is read by" key={`out ${node}`} rows={out} columns={edgeColumns(scene, "target")} {...common} />}
    </>
  );
}

function Pins({ scene, pins, onPins, onSelect, onHover }: Props) {
  const { graph } = scene;
  const change = (node: number, to: Partial<Pin>): void =>
    onPins(pins.map((pin) => (pin.node === node ? { ...pin, ...to } : pin)));
  const groups = [...new Set(pins.map((pin) => pin.group))].sort();
  return (
    <section class="pins" aria-label="Pins">
      <h2>Pins</h2>
      {groups.map((group) => (
        <div role="group" aria-label={group ? `Group ${group}` : "No group"}>
          {group && <h3>{group}<span class="at"> · importance {digits(sum(scene, pins, group))}</span></h3>}
          <ul>
            {pins.filter((pin) => pin.group === group && pin.node < graph.nodes).map((pin) => (
              <li key={pin.node} onMouseEnter={() => onHover({ node: pin.node })} onMouseLeave={() => onHover(null)}>
                <button type="button" class="link" onClick={() => onSelect({ node: pin.node })}>{nodeText(graph, pin.node)}</button>
                <span class="at">{digits(scene.pruned.flow[pin.node]!)}</span>
                <input aria-label={`Name of ${nodeText(graph, pin.node)}`} placeholder="name" value={pin.name} maxLength={60}
                  onChange={(event) => change(pin.node, { name: event.currentTarget.value })} />
                <input aria-label={`Group of ${nodeText(graph, pin.node)}`} placeholder="group" value={pin.group} maxLength={60}
                  onChange={(event) => change(pin.node, { group: event.currentTarget.value })} />
                <button type="button" class="small" aria-label={`Unpin ${nodeText(graph, pin.node)}`} onClick={() => onPins(pins.filter((p) => p !== pin))}>×</button>
              </li>
            ))}
          </ul>
        </div>
      ))}
    </section>
  );
}

function sum(scene: Scene, pins: Pin[], group: string): number {
  return pins.filter((p) => p.group === group).reduce((s, p) => s + (scene.pruned.flow[p.node] ?? 0), 0);
}
