/* The tokens below the grid, tinted by importance. Arrow keys move; dragging marks a span. */
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { Paths } from "./graph";
import type { Hit } from "./hit";
import type { Box, View } from "./layout";
import type { Scene } from "./paint";
import { Token } from "./token";
import { digits, visible } from "./tokens";

const READABLE = 12; // pixels of a column from which on its token is written
const UPRIGHT = { below: 56, least: 40, most: 112 };

let measure: CanvasRenderingContext2D | null = null;
const widths = new Map<string, number>();
function widthOf(text: string): number {
  const known = widths.get(text);
  if (known !== undefined) return known;
  measure ??= document.createElement("canvas").getContext("2d")!;
  measure.font = "12.5px system-ui, sans-serif";
  const { width } = measure.measureText(text);
  if (widths.size > 20_000) widths.clear();
  widths.set(text, width);
  return width;
}

/** The height that the labels of a view need. */
export function stripHeight(scene: Scene, view: View | null): number {
  if (!view || view.sx < READABLE) return 22;
  if (view.sx >= UPRIGHT.below) return Math.max(...scene.layout.columns.slice(0, 400).map(
    (c) => (c.gap || widthOf(visible(scene.graph.tokens[c.first]!)) + 10 <= view.sx ? 36 : UPRIGHT.most)));
  let most: number = UPRIGHT.least;
  for (const column of scene.layout.columns.slice(-400)) {
    if (!column.gap) most = Math.max(most, Math.min(UPRIGHT.most, widthOf(visible(scene.graph.tokens[column.first]!)) + 26));
  }
  return most;
}

/** Neighbouring tokens of one role. */
export function roleRuns(roles: (string | null)[]): { role: string; first: number; last: number }[] {
  const out: { role: string; first: number; last: number }[] = [];
  roles.forEach((role, t) => {
    const last = out[out.length - 1];
    if (role === null) return;
    if (last && last.role === role && last.last === t - 1) last.last = t;
    else out.push({ role, first: t, last: t });
  });
  return out;
}

interface Props {
  scene: Scene;
  view: View;
  box: Box;
  height: number;
  lit: Paths | null;
  live: boolean;
  roles: (string | null)[] | null;
  onHover: (hit: Hit | { column: number } | null, x: number, y: number) => void;
  onPick: (hit: Hit | null) => void;
  onUnfold: (first: number, last: number) => void;
  onExplain: (positions: number[]) => void;
  show: (node: number) => void;
}

export function Strip(props: Props) {
  const { scene, view, box, height } = props;
  const { graph, layout, pruned, theme } = scene;
  const [home, setHome] = useState(graph.position); // the one stop of the Tab key
  const [span, setSpan] = useState<{ from: number; to: number } | null>(null);
  const list = useRef<HTMLUListElement>(null);
  const heat = useRef<HTMLCanvasElement>(null);
  const readable = view.sx >= READABLE;
  const homeAt = layout.columns[layout.columnOf[Math.min(home, graph.T - 1)]!]!.first;
  let most = 0;
  for (let t = 0; t < graph.T; t++) most = Math.max(most, pruned.flow[t]!);
  const shade = (position: number): number => Math.sqrt(pruned.flow[position]! / (most || 1));
  const litTokens = new Set<number>();
  props.lit?.nodes.forEach((node) => { if (node < graph.T) litTokens.add(node); });

  useLayoutEffect(() => {
    const canvas = heat.current;
    if (!canvas || readable) return;
    canvas.width = Math.max(1, Math.round(box.width));
    canvas.height = 12;
    const pen = canvas.getContext("2d")!;
    pen.fillStyle = `rgb(${theme.heat.join(" ")})`;
    for (const column of layout.columns) {
      if (column.gap) continue;
      pen.globalAlpha = shade(column.first);
      pen.fillRect(column.left * view.sx + view.tx, 0, Math.max(1, column.width * view.sx), 12);
    }
  });
  const focusing = useRef(false);
  useEffect(() => {
    if (!focusing.current) return;
    focusing.current = false;
    list.current?.querySelector<HTMLElement>("[tabindex='0']")?.focus({ preventScroll: true });
  });
  const move = (event: KeyboardEvent): void => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const column = layout.columns[layout.columnOf[homeAt]! + (step ?? 0)];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      const mine = layout.columns[layout.columnOf[homeAt]!]!;
      if (mine.gap) props.onUnfold(mine.first, mine.last);
      else props.onPick({ node: homeAt });
    } else if (step && column) {
      event.preventDefault();
      if (props.live && event.shiftKey && !column.gap) {
        setSpan({ from: span?.from ?? homeAt, to: column.first });
      } else setSpan(null);
      setHome(column.first);
      props.show(column.first);
      focusing.current = true;
    } else if (event.key === "Escape") setSpan(null);
  };

  // Dragging across tokens marks a span of predictions to explain together.
  const dragFrom = useRef<number | null>(null);
  const positionAt = (event: PointerEvent): number | null => {
    const root = list.current!.getRootNode() as ShadowRoot | Document;
    const item = root.elementFromPoint(event.clientX, event.clientY)?.closest<HTMLElement>("li[data-first]");
    return item && !item.classList.contains("gap") ? Number(item.dataset.first) : null;
  };
  const down = (event: PointerEvent): void => {
    if (props.live && event.button === 0) dragFrom.current = positionAt(event);
    setSpan(null);
  };
  const over = (event: PointerEvent): void => {
    if (dragFrom.current === null || !(event.buttons & 1)) return;
    const to = positionAt(event);
    if (to !== null && (to !== dragFrom.current || span)) setSpan({ from: dragFrom.current, to });
  };
  const ordered = span ? [Math.min(span.from, span.to), Math.max(span.from, span.to)] as const : null;
  const explain = (): void => {
    if (!ordered) return;
    props.onExplain(Array.from({ length: ordered[1] - ordered[0] + 1 }, (_, i) => ordered[0] + i));
    setSpan(null);
  };

  const margin = 200;
  const columns = readable
    ? layout.columns.filter((c) => {
        const left = c.left * view.sx + view.tx;
        return c.first === homeAt || (left + c.width * view.sx > -margin && left < box.width + margin);
      })
    : [];
  return (
    <div class={`strip${props.roles ? " with-roles" : ""}`}>
      {props.roles && roleRuns(props.roles).map(({ role, first, last }) => {
        const left = layout.columns[layout.columnOf[first]!]!, right = layout.columns[layout.columnOf[last]!]!;
        const from = left.left * view.sx + view.tx, to = (right.left + right.width) * view.sx + view.tx;
        return to < 0 || from > box.width ? null : (
          <span key={first} class={`role of-role-${role}`} data-first={first} data-last={last} style={{ left: `${Math.max(0, from) + 1}px`, width: `${Math.min(box.width, to) - Math.max(0, from) - 2}px` }}>{role}</span>
        );
      })}
      <ul ref={list} class="tokens" aria-label="Tokens, in order; arrow keys move, Enter picks"
        onKeyDown={move} onPointerDown={down} onPointerMove={over} onPointerUp={() => { dragFrom.current = null; }}
        onPointerLeave={() => props.onHover(null, 0, 0)}>
        {columns.map((column) => {
          const { first, last, gap } = column;
          const width = column.width * view.sx;
          const text = visible(graph.tokens[first]!);
          const upright = !gap && widthOf(text) + 10 > width;
          const reached = pruned.reached[first] === 1;
          const name = gap
            ? `${last - first + 1} tokens that are not reached, positions ${first} to ${last}; Enter shows them`
            : `${text}, position ${first}, importance ${digits(pruned.flow[first]!)}`;
          const classes = [
            gap ? "gap" : reached ? "" : "unreached", upright ? "upright" : "",
            litTokens.has(first) && !gap ? "lit" : "",
            ordered && !gap && first >= ordered[0] && first <= ordered[1] ? "marked" : "",
          ].filter(Boolean).join(" ");
          const inset = gap || width < 24 ? 0.5 : 2;
          return (
            <li key={first} class={classes} data-first={first} aria-label={name} tabIndex={first === homeAt ? 0 : -1}
              aria-posinset={layout.columnOf[first]! + 1} aria-setsize={layout.columns.length}
              style={{
                left: `${column.left * view.sx + view.tx + inset}px`, width: `${width - 2 * inset}px`,
                height: `${height - 8 - (props.roles ? 16 : 0)}px`, "--share": gap ? "0" : shade(first).toFixed(3),
              }}
              onPointerEnter={(event) => props.onHover({ column: layout.columnOf[first]! }, event.clientX, event.clientY - 60)}
              onFocus={(event) => {
                const at = event.currentTarget.getBoundingClientRect();
                setHome(first);
                props.onHover({ column: layout.columnOf[first]! }, at.right, at.top - 60);
              }}
              onBlur={() => props.onHover(null, 0, 0)}
              onClick={() => (gap ? props.onUnfold(first, last) : span ? undefined : props.onPick({ node: first }))}>
              {gap ? <bdi>…</bdi> : <Token text={graph.tokens[first]!} />}
            </li>
          );
        })}
      </ul>
      {!readable && <canvas ref={heat} class="heat" aria-hidden="true" />}
      {ordered && ordered[1] > ordered[0] && (
        <div class="span-bar">
          <button type="button" class="primary small" onClick={explain}>
            Explain the {ordered[1] - ordered[0] + 1} predictions after #{ordered[0]} to #{ordered[1]}
          </button>
          <button type="button" class="small" onClick={() => setSpan(null)}>Cancel</button>
        </div>
      )}
    </div>
  );
}
