/* The text as it runs, tinted by importance; a click on a word follows it. */
import { useMemo } from "preact/hooks";
import type { Paths } from "./graph";
import type { Scene } from "./paint";
import { runs, digits, visible } from "./tokens";

interface Props {
  scene: Scene;
  selected: number | null; // a position
  lit: Paths | null;
  live: boolean;
  roles: (string | null)[] | null; // of the tokens of a chat
  onPick: (position: number) => void;
  onExplain: (positions: number[]) => void;
  onHover: (position: number | null, x: number, y: number) => void;
}

export function TextView({ scene, selected, lit, live, roles, onPick, onExplain, onHover }: Props) {
  const { graph, pruned } = scene;
  const explained = useMemo(() => new Set(graph.starts.map((s) => s.position)), [graph]);
  let most = 0;
  for (let t = 0; t < graph.T; t++) most = Math.max(most, pruned.flow[t]!);
  const through = useMemo(() => {
    const flow = new Map<number, number>();
    lit?.nodes.forEach((node) => { if (node < graph.T) flow.set(node, 1); });
    return flow;
  }, [lit, graph]);
  return (
    <div class="text-view" role="region" aria-label="Text, tinted by importance" tabIndex={0}>
      <p>
        {graph.tokens.map((token, t) => {
          const share = Math.sqrt(pruned.flow[t]! / (most || 1));
          const ends = /\n\s*$/.test(token);
          const names = [
            "word", explained.has(t) ? "explained" : "", selected === t ? "chosen" : "",
            lit && !through.has(t) ? "off" : "",
          ].filter(Boolean).join(" ");
          return (
            <>
              {roles?.[t] && roles[t] !== roles[t - 1] && <>{t > 0 && <br />}<span class="role-start">{roles[t]}</span></>}
              <button type="button" key={t} class={names} data-position={t} style={{ "--share": share.toFixed(3) }}
                aria-label={`${visible(token)}, position ${t}, importance ${digits(pruned.flow[t]!)}`}
                aria-pressed={selected === t}
                onClick={() => onPick(t)} onDblClick={() => live && onExplain([t])}
                onPointerEnter={(event) => onHover(t, event.clientX, event.clientY)} onPointerLeave={() => onHover(null, 0, 0)}>
                <Plain token={token} />
              </button>
              {ends && <br />}
            </>
          );
        })}
      </p>
      <p class="quiet">Tint is importance: the weight of all paths down to the token. Click a word to light up
        the paths from it{live ? "; double-click to explain the prediction after it" : ""}.</p>
    </div>
  );
}

/** Spaces stay spaces in running text; only what cannot be seen is marked. */
function Plain({ token }: { token: string }) {
  return <bdi>{runs(token).map((run) => (run.mark ? (run.text.replaceAll("·", "") === "" ? " ".repeat(run.text.length) : <span class="mark">{run.text}</span>) : run.text))}</bdi>;
}
