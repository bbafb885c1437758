/* What is predicted, above the grid: the most probable tokens, and a triangle for each prediction
   that is or can be explained. */
import type { Box, View } from "./layout";
import type { Scene } from "./paint";
import { Token } from "./token";
import { percent, visible } from "./tokens";

interface Props {
  scene: Scene;
  view: View;
  box: Box;
  live: boolean;
  onExplain: (positions: number[]) => void;
}

export function Predictions({ scene, view, box, live, onExplain }: Props) {
  const { graph, layout } = scene;
  const at = (position: number): number => layout.x[position]! * view.sx + view.tx;
  const explained = new Set(graph.starts.map((start) => start.position));
  const positions = layout.columns
    .filter((c) => !c.gap && (explained.has(c.first) || (live && view.sx >= 11)))
    .map((c) => c.first)
    .filter((position) => at(position) > -8 && at(position) < box.width + 8);
  const predictions = graph.document.predictions;
  const x = at(graph.position);
  const fromRight = x > box.width / 2;
  const side = fromRight
    ? { right: `${Math.max(4, Math.min(box.width - 120, box.width - x - 28))}px` }
    : { left: `${Math.max(4, Math.min(box.width - 120, x - 28))}px` };
  return (
    <div class="predictions">
      <ol aria-label="Most probable next tokens" style={{ ...side, flexDirection: fromRight ? "row-reverse" : "row" }}>
        {predictions.map((p, i) => (
          <li class={i ? "" : "first"}><Token text={p.token} /> {percent(p.probability)}</li>
        ))}
      </ol>
      {positions.map((position) => {
        const start = graph.starts.find((s) => s.position === position);
        const best = start?.predictions[0];
        const name = start
          ? `Explained: ${best ? visible(best.token) : "the prediction"} after ${visible(graph.tokens[position]!)}, position ${position}`
          : `Explain the prediction after ${visible(graph.tokens[position]!)}, position ${position}`;
        const style = { left: `${at(position)}px` };
        return live
          ? <button type="button" key={position} class={`triangle${start ? " on" : ""}`} style={style}
              title={name} aria-label={name} aria-pressed={start !== undefined} data-position={position}
              onClick={() => onExplain([position])}><i /></button>
          : <span key={position} class="triangle on" role="img" style={style} title={name} aria-label={name} data-position={position}><i /></span>;
      })}
    </div>
  );
}
