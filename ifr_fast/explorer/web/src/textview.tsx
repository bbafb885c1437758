/* The text as it runs, tinted by importance; a click on a word follows it. */
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";
import type { Paths } from "./graph";
import type { Scene } from "./paint";
import { digits, runs, visible } from "./tokens";

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

const MOST = 400; // tokens of a block that has no line's end

/** Blocks of lines: the browser lays out only those in sight. */
function blocksOf(tokens: string[]): [number, number][] {
  const out: [number, number][] = [];
  let first = 0;
  tokens.forEach((token, t) => {
    if (token.endsWith("\n") && t - first >= 40) {
      out.push([first, t + 1]);
      first = t + 1;
    }
  });
  if (first < tokens.length) out.push([first, tokens.length]);
  return out;
}

export function TextView(props: Props) {
  const { scene, selected, lit, live, roles, onPick, onExplain, onHover } = props;
  const { graph } = scene;
  const element = useRef<HTMLDivElement>(null);
  const blocks = useMemo(() => blocksOf(graph.tokens), [graph]);
  // Words are drawn once for a scene; what changes under the pointer is set on their elements.
  const words = useMemo(
    () => blocks.map(([first, end]) => <Block key={first} {...{ scene, roles, first, end }} />), [scene, roles, blocks]);
  const wordAt = (t: number): HTMLElement | null =>
    element.current!.querySelector<HTMLElement>(`.word[data-position="${t}"]`);
  useLayoutEffect(() => {
    const through = new Set<number>();
    lit?.nodes.forEach((node) => { if (node < graph.T) through.add(node); });
    element.current!.querySelectorAll<HTMLElement>(".word").forEach((word) => {
      word.classList.toggle("off", lit !== null && !through.has(Number(word.dataset.position)));
    });
  }, [lit, words]);
  useLayoutEffect(() => {
    const word = selected === null ? null : wordAt(selected);
    word?.classList.add("chosen");
    word?.setAttribute("aria-pressed", "true");
    return () => {
      word?.classList.remove("chosen");
      word?.setAttribute("aria-pressed", "false");
    };
  }, [selected, words]);

  const positionOf = (event: Event): number | null => {
    const word = (event.target as Element).closest<HTMLElement>(".word");
    return word ? Number(word.dataset.position) : null;
  };
  const hover = (event: PointerEvent): void => onHover(positionOf(event), event.clientX, event.clientY);
  const onKeyDown = (event: KeyboardEvent): void => {
    const at = positionOf(event), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (at === null) return;
    if (event.key === "Enter" || event.key === " ") onPick(at);
    else if (step) {
      const next = wordAt(at + step);
      if (!next) return;
      wordAt(at)!.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    } else return;
    event.preventDefault();
  };
  const pick = (event: Event): void => {
    const at = positionOf(event);
    if (at !== null) onPick(at);
  };
  const explain = (event: Event): void => {
    const at = positionOf(event);
    if (at !== null && live) onExplain([at]);
  };
  return (
    <div class="text-view" role="region" aria-label="Text, tinted by importance; arrow keys move between words, Enter picks">
      <div ref={element} class="running" onClick={pick} onDblClick={explain} onKeyDown={onKeyDown}
        onPointerOver={hover} onPointerLeave={() => onHover(null, 0, 0)}>{words}</div>
      <p class="quiet">Tint is importance: the weight of all paths down to the token. Click a word to light up
        the paths from it{live ? "; double-click to explain the prediction after it" : ""}.</p>
    </div>
  );
}

interface BlockProps { scene: Scene; roles: (string | null)[] | null; first: number; end: number }

function Block({ scene, roles, first, end }: BlockProps) {
  const { graph, pruned } = scene;
  const explained = new Set(graph.starts.map((s) => s.position));
  let most = 0;
  for (let t = 0; t < graph.T; t++) most = Math.max(most, pruned.flow[t]!);
  const size = { containIntrinsicSize: `auto ${Math.ceil((end - first) / 14) * 32}px` };
  return (
    <div class={end - first > MOST ? "lines" : "lines lazy"} style={size}>
      {graph.tokens.slice(first, end).map((token, i) => {
        const t = first + i, flow = pruned.flow[t]!;
        const word = (
          <span key={t} class={explained.has(t) ? "word explained" : "word"} role="button" tabIndex={t === graph.position ? 0 : -1}
            data-position={t} style={{ "--share": Math.sqrt(flow / (most || 1)).toFixed(3) }} aria-pressed="false"
            aria-label={`${visible(token)}, position ${t}, importance ${digits(flow)}`}>
            <Plain token={token} last={t === end - 1} />
          </span>
        );
        const role = roles?.[t] && roles[t] !== roles[t - 1] ? roles[t] : null;
        return role ? [t > first && <br />, <span class="role-start">{role}</span>, word] : word;
      })}
    </div>
  );
}

/** Spaces and line ends are themselves in running text; only what cannot be seen is marked. A block
    ends the line by itself. */
function Plain({ token, last }: { token: string; last: boolean }) {
  const lines = token.split("\n");
  return (
    <bdi>
      {lines.map((line, i) => [
        i > 0 && <span class="mark">↵</span>,
        i > 0 && !(last && i === lines.length - 1 && !line) && "\n",
        ...(line || lines.length === 1 ? runs(line) : []).map((run) =>
          !run.mark ? run.text : /^\u00b7+$/.test(run.text) ? " ".repeat(run.text.length) : <span class="mark">{run.text}</span>),
      ])}
    </bdi>
  );
}
