/* Words for edges, nodes and columns: in the tooltip and at the head of the details. */
import { Looks } from "./graph";
import type { Graph } from "./graph";
import type { Hit } from "./hit";
import type { Scene } from "./paint";
import { At, Token } from "./token";
import { digits, visible } from "./tokens";

const NAMES: Record<string, string> = {
  attention: "Attention", ffn: "FFN", residual_mid: "Residual past attention",
  residual_post: "Residual past the FFN", query: "Query", key: "Key",
};
const HEADS_SHOWN = 12;

export function edgeName(graph: Graph, e: number): string {
  const layer = graph.layer[e]!;
  const residual = graph.parallel[layer] && graph.looks[e] === Looks.Residual;
  return `${residual ? "Residual" : NAMES[graph.kindOf(e)] ?? graph.kindOf(e)}, layer ${layer}`;
}

export function nodeName(graph: Graph, node: number): string {
  const { level, layer } = graph.place(node);
  if (level === 0) return "Embedding";
  return level % 2 ? `After the attention of layer ${layer}` : `After layer ${layer}`;
}

/** The node as text on one line. */
export function nodeText(graph: Graph, node: number): string {
  return `${visible(graph.tokens[node % graph.T]!)} #${node % graph.T}, ${nodeName(graph, node).toLowerCase()}`;
}

export function Ends({ graph, edge }: { graph: Graph; edge: number }) {
  const source = graph.source[edge]!, target = graph.target[edge]!;
  return (
    <>
      <Token text={graph.tokens[source]!} /><At position={source} />
      {source !== target
        ? <> → <Token text={graph.tokens[target]!} /><At position={target} /></>
        : graph.looks[edge] === Looks.Attention && " → itself"}
    </>
  );
}

export function HeadBars({ heads }: { heads: { head: number; weight: number }[] }) {
  if (!heads.length) return null;
  const rest = heads.slice(HEADS_SHOWN);
  return (
    <>
      <dl class="heads">
        {heads.slice(0, HEADS_SHOWN).map(({ head, weight }) => (
          <>
            <dt>head {head}</dt>
            <dd><div class="bar" style={{ width: `${(100 * weight) / heads[0]!.weight}%` }} /></dd>
            <dd>{digits(weight)}</dd>
          </>
        ))}
      </dl>
      {rest.length > 0 && (
        <p class="quiet">and {rest.length} more heads, {digits(rest.reduce((s, h) => s + h.weight, 0))} together</p>
      )}
    </>
  );
}

export function Unattributed() {
  return <p class="alert">Unattributed: all of its parts have proximity 0, so each got the same weight.</p>;
}

export function EdgeFacts({ scene, edge }: { scene: Scene; edge: number }) {
  const { graph, pruned } = scene;
  return (
    <>
      <p class="kind">{edgeName(graph, edge)}</p>
      <p><Ends graph={graph} edge={edge} /></p>
      <p>weight {digits(pruned.weight[edge]!)}<span class="at"> · flow {digits(pruned.through[edge]!)}</span></p>
    </>
  );
}

export function NodeFacts({ scene, node }: { scene: Scene; node: number }) {
  const { graph, pruned } = scene;
  const { kind, position } = graph.place(node);
  return (
    <>
      <p class="kind"><Token text={graph.tokens[position]!} /><At position={position} />
        {kind === "embed" && <span class="at"> · id {graph.ids[position]}</span>}</p>
      <p>{nodeName(graph, node)}<span class="at"> ({kind})</span></p>
      <p>{pruned.reached[node] ? `importance ${digits(pruned.flow[node]!)}` : "not reached at this threshold"}</p>
      {graph.unattributed.has(node) && <Unattributed />}
    </>
  );
}

function GapFacts({ graph, first, last }: { graph: Graph; first: number; last: number }) {
  const text = graph.tokens.slice(first, Math.min(last + 1, first + 40)).join("");
  const short = [...text].slice(0, 160).join("");
  const more = short.length < text.length || last - first >= 40;
  return (
    <>
      <p class="kind">{first === last ? `#${first}: not reached` : `#${first} to #${last}: ${last - first + 1} tokens, not reached`}</p>
      <p class="quiet"><bdi>{short.replace(/[\p{C}\p{Z}]+/gu, " ") + (more ? " …" : "")}</bdi></p>
      <p class="quiet">Click to show them.</p>
    </>
  );
}

/** What the tooltip says. */
export function Brief({ scene, hit }: { scene: Scene; hit: Hit | { column: number } }) {
  const { graph, layout, pruned } = scene;
  if ("column" in hit) {
    const column = layout.columns[hit.column];
    if (!column) return null;
    if (column.gap) return <GapFacts graph={graph} first={column.first} last={column.last} />;
    return <NodeFacts scene={scene} node={column.first} />;
  }
  if (hit.node !== undefined) return <NodeFacts scene={scene} node={hit.node} />;
  return (
    <>
      <EdgeFacts scene={scene} edge={hit.edge} />
      <HeadBars heads={graph.heads(hit.edge, graph.byHead ? Math.fround(pruned.threshold) : -1)} />
    </>
  );
}
