/* What a backend says of a picked edge or node: heads, maps, neurons, lens, promoted tokens. */
import { useState } from "preact/hooks";
import type { Backend } from "./backend";
import { Waiting, useCall } from "./calls";
import { Looks } from "./graph";
import { HeatMap } from "./heat";
import type { MapResult } from "./heat";
import type { Hit } from "./hit";
import type { Scene } from "./paint";
import { Table } from "./table";
import { Token } from "./token";
import { digits, percent, visible } from "./tokens";

const K = 10; // tokens of a list
const NEURONS = 12;
const WHOLE_MAP = 400; // longest text whose maps are asked for completely
const MAP_ROWS = 200;

/** What every call is about. */
export interface About { input: object; normalize: boolean }

interface Props { backend: Backend; about: About; scene: Scene }

interface Scored { token: string; id: number; logit: number }
interface Promoted { promoted: Scored[]; suppressed: Scored[] }

function TokenTable({ label, rows }: { label: string; rows: Scored[] }) {
  return (
    <Table label={label} rows={rows} columns={[
      { name: "token", value: (t) => visible(t.token), show: (t) => <Token text={t.token} /> },
      { name: "logit", value: (t) => t.logit, show: (t) => t.logit.toFixed(2) },
    ]} />
  );
}

/** Tokens that a part promotes and suppresses. */
function PromotedBy({ backend, about, what, part }: Omit<Props, "scene"> & { what: string; part: object }) {
  const answer = useCall<Promoted>(backend, "promoted", { input: about.input, ...part, k: K, normalize: about.normalize });
  return (
    <>
      <Waiting answer={answer} what={`Tokens of ${what}`} />
      {answer.data && (
        <>
          <TokenTable label={`Promoted by ${what}`} rows={answer.data.promoted} />
          <TokenTable label={`Suppressed by ${what}`} rows={answer.data.suppressed} />
        </>
      )}
    </>
  );
}

export function Drilling(props: Props & { hit: Hit }) {
  const { hit, scene } = props;
  if (hit.edge !== undefined) {
    const looks = scene.graph.looks[hit.edge];
    if (looks === Looks.Attention) return <AttentionEdge key={`edge ${hit.edge}`} {...props} edge={hit.edge} />;
    if (looks === Looks.Ffn) {
      return <FfnPart key={`edge ${hit.edge}`} {...props} layer={scene.graph.layer[hit.edge]!} position={scene.graph.target[hit.edge]!} />;
    }
    return null;
  }
  return <NodePart key={`node ${hit.node}`} {...props} node={hit.node} />;
}

function AttentionEdge(props: Props & { edge: number }) {
  const { backend, about, scene, edge } = props;
  const { graph } = scene;
  const layer = graph.layer[edge]!, target = graph.target[edge]!, source = graph.source[edge]!;
  const [head, setHead] = useState<number | null>(null);
  const answer = useCall<{ weight: number; heads: { head: number; weight: number }[] }>(
    backend, "edge", { input: about.input, layer, kind: graph.kindOf(edge), target, source });
  const heads = answer.data?.heads ?? [];
  const most = Math.max(...heads.map((h) => h.weight), 0);
  return (
    <>
      <Waiting answer={answer} what="All heads" />
      {answer.data && (
        <Table label="All heads" rows={heads} sorted={{ column: 1, down: true }} page={12}
          onPick={(h) => setHead(h.head === head ? null : h.head)} picked={(h) => h.head === head}
          columns={[
            { name: "head", value: (h) => h.head },
            { name: "weight", value: (h) => h.weight, show: (h) => digits(h.weight) },
            { name: "share", value: (h) => h.weight / (answer.data!.weight || 1), show: (h) => <div class="bar" style={{ width: `${(100 * h.weight) / (most || 1)}%` }} /> },
          ]} />
      )}
      {head === null && answer.data && <p class="quiet">Pick a head to see its maps and its tokens.</p>}
      {head !== null && <Head {...props} layer={layer} head={head} target={target} source={source} />}
      <PromotedBy backend={backend} about={about} what="the attention" part={{ layer, part: "attention", position: target }} />
    </>
  );
}

function Head(props: Props & { layer: number; head: number; target: number; source: number }) {
  const { backend, about, scene, layer, head, target, source } = props;
  const [which, setWhich] = useState<"attention_map" | "contribution_map">("attention_map");
  const { T } = scene.graph;
  const from = Math.max(0, Math.min(T - MAP_ROWS, target - MAP_ROWS / 2));
  const rows = T <= WHOLE_MAP ? null : Array.from({ length: Math.min(MAP_ROWS, T) }, (_, i) => from + i);
  const map = useCall<MapResult>(backend, which, { input: about.input, layer, head, ...(rows ? { rows } : {}) });
  const names = { attention_map: "Attention map", contribution_map: "Contribution map" };
  return (
    <section class="sub" aria-label={`Head ${head}`}>
      <div class="table-bar">
        <h2>Head {head} of layer {layer}</h2>
        <div class="modes" role="group" aria-label="Map">
          {(["attention_map", "contribution_map"] as const).map((name) => (
            <button type="button" aria-pressed={which === name} onClick={() => setWhich(name)}>{names[name].split(" ")[0]}</button>
          ))}
        </div>
      </div>
      <Waiting answer={map} what={names[which]} />
      {map.data && <HeatMap key={which} label={names[which]} scene={scene} result={map.data} rows={rows} target={target} source={source} />}
      <PromotedBy backend={backend} about={about} what={`head ${head}`} part={{ layer, part: "head", head, position: target, source }} />
    </section>
  );
}

function FfnPart(props: Props & { layer: number; position: number }) {
  const { backend, about, layer, position } = props;
  const [neuron, setNeuron] = useState<number | null>(null);
  const answer = useCall<{ neurons: { neuron: number; activation: number; importance: number }[] }>(
    backend, "neurons", { input: about.input, layer, position, k: NEURONS });
  return (
    <>
      <Waiting answer={answer} what="Neurons" />
      {answer.data && (
        <Table label="Neurons" rows={answer.data.neurons} sorted={{ column: 2, down: true }}
          onPick={(n) => setNeuron(n.neuron === neuron ? null : n.neuron)} picked={(n) => n.neuron === neuron}
          columns={[
            { name: "neuron", value: (n) => n.neuron },
            { name: "activation", value: (n) => n.activation, show: (n) => n.activation.toFixed(3) },
            { name: "importance", value: (n) => n.importance, show: (n) => digits(n.importance) },
          ]} />
      )}
      {neuron !== null && <PromotedBy backend={backend} about={about} what={`neuron ${neuron}`} part={{ layer, part: "neuron", neuron, position }} />}
      <PromotedBy backend={backend} about={about} what="the FFN" part={{ layer, part: "ffn", position }} />
    </>
  );
}

interface LensToken extends Scored { probability: number; rank: number; rank_before: number | null }

function NodePart(props: Props & { node: number }) {
  const { backend, about, scene, node } = props;
  const { kind, layer, position } = scene.graph.place(node);
  const at = { layer: Math.max(0, layer), kind, position };
  const lens = useCall<{ tokens: LensToken[] }>(backend, "lens", { input: about.input, ...at, k: K, normalize: about.normalize });
  return (
    <>
      <Waiting answer={lens} what="Logit lens" />
      {lens.data && (
        <Table label="Logit lens" rows={lens.data.tokens} columns={[
          { name: "token", value: (t) => visible(t.token), show: (t) => <Token text={t.token} /> },
          { name: "probability", value: (t) => t.probability, show: (t) => percent(t.probability) },
          { name: "rank", value: (t) => t.rank },
          {
            name: "change", title: "Against the node before", value: (t) => (t.rank_before === null ? "" : t.rank_before - t.rank),
            show: (t) => <Change before={t.rank_before} now={t.rank} />,
          },
        ]} />
      )}
      {kind === "post" && <PromotedBy backend={backend} about={about} what="the FFN" part={{ layer, part: "ffn", position }} />}
      {kind !== "embed" && <PromotedBy backend={backend} about={about} what="the attention" part={{ layer, part: "attention", position }} />}
    </>
  );
}

function Change({ before, now }: { before: number | null; now: number }) {
  if (before === null) return null;
  const up = before - now;
  if (!up) return <span class="at">=</span>;
  return <span class={up > 0 ? "up" : "down"}>{up > 0 ? "▲" : "▼"}{Math.abs(up).toLocaleString("en")}</span>;
}
