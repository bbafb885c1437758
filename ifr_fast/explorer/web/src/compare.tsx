/* Two graphs side by side, with their difference. */
import { useMemo, useRef } from "preact/hooks";
import type { ComponentChildren } from "preact";
import { Grid } from "./grid";
import type { GridHandle } from "./grid";
import { thresholdAt, stepAt } from "./graph";
import type { Graph, LooksName, Pruned } from "./graph";
import { endsOf, layOut } from "./layout";
import type { Comparison } from "./live";
import type { Scene } from "./paint";
import type { Probe } from "./probe";
import { edgeName } from "./describe";
import { Table } from "./table";
import type { Theme } from "./theme";
import { digits, visible } from "./tokens";

const STEPS = 1000;
const NONE: ReadonlySet<LooksName> = new Set();

function useScene(graph: Graph, pruned: Pruned, theme: Theme): Scene {
  return useMemo(() => {
    const layout = layOut(graph, pruned, true, []);
    return { graph, pruned, layout, ends: endsOf(graph, layout), theme };
  }, [graph, pruned, theme]);
}

interface Props { comparison: Comparison; theme: Theme; threshold: number | null; probe: Probe; onThreshold: (value: number) => void; onClose: () => void }

export function CompareView({ comparison, theme, threshold, probe, onThreshold, onClose }: Props) {
  const { first, second, difference } = comparison;
  const least = Math.max(first.threshold, second.threshold);
  const now = Math.max(least, threshold ?? least);
  const one = useScene(first, useMemo(() => first.prune(now), [first, now]), theme);
  const two = useScene(second, useMemo(() => second.prune(now), [second, now]), theme);
  Object.assign(probe, { comparison: [one, two] });
  return (
    <div class="comparison">
      <div class="tools">
        <div class="slider">
          <label for="threshold">Threshold</label>
          <input id="threshold" type="range" min="0" max={STEPS} value={stepAt(least, now, STEPS)} aria-valuetext={now.toPrecision(3)}
            onInput={(event) => onThreshold(thresholdAt(least, Number(event.currentTarget.value), STEPS))} />
          <output for="threshold">{now.toPrecision(3)}</output>
        </div>
        <span class="sign-key first">heavier in the first</span>
        <span class="sign-key second">heavier in the second</span>
        <button type="button" class="push" onClick={onClose}>Close the comparison</button>
      </div>
      <div class="compared">
        <Part name={comparison.names[0]} scene={one} />
        <Part name={comparison.names[1]} scene={two} />
        {difference ? <DifferencePart {...{ comparison, theme, probe }} threshold={now} /> : <p class="quiet">{comparison.reason}</p>}
      </div>
    </div>
  );
}

function DifferencePart({ comparison, theme, probe, threshold }: { comparison: Comparison; theme: Theme; probe: Probe; threshold: number }) {
  const difference = comparison.difference!;
  const { graph } = difference;
  const pruned = useMemo(() => difference.above(threshold), [difference, threshold]);
  const scene = useScene(graph, pruned, theme);
  Object.assign(probe, { difference: scene });
  const rows = useMemo(() => Array.from(pruned.kept), [pruned]);
  return (
    <Part name="Difference" scene={scene}>
      <Table label="Changes" rows={rows} sorted={{ column: 2, down: true }} page={10} columns={[
        { name: "edge", value: (e) => edgeName(graph, e) },
        { name: "from → to", value: (e) => `${visible(graph.tokens[graph.source[e]!]!)} → ${visible(graph.tokens[graph.target[e]!]!)}` },
        { name: "by", value: (e) => difference.size[e]!, show: (e) => <span class={graph.signs![e] === 2 ? "of-attention" : "of-ffn"}>{graph.signs![e] === 2 ? "+" : "−"}{digits(difference.size[e]!)}</span> },
      ]} />
    </Part>
  );
}

function Part({ name, scene, children }: { name: string; scene: Scene; children?: ComponentChildren }) {
  const handle = useRef<GridHandle | null>(null);
  return (
    <section class="compared-part" aria-label={name}>
      <h2 title={name}><bdi>{name}</bdi></h2>
      <Grid scene={scene} hidden={NONE} lit={null} selected={null} pins={[]} live={false} roles={null} handle={handle}
        onHover={() => undefined} onPick={() => undefined} onUnfold={() => undefined} onExplain={() => undefined} />
      {children}
    </section>
  );
}
