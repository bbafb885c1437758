/* The token by layer grid: edges on canvases, tokens, layers and predictions as text around them. */
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { LOOKS } from "./graph";
import type { LooksName, Paths } from "./graph";
import { nodeText } from "./describe";
import { find } from "./hit";
import type { Hit } from "./hit";
import { Icon } from "./icons";
import { clamped, firstView, wholeView, zoomed } from "./layout";
import type { Box, View } from "./layout";
import { Minimap } from "./minimap";
import type { Scene } from "./paint";
import { Predictions } from "./predictions";
import type { Pin } from "./state";
import { Strip, stripHeight } from "./strip";
import { Tiles } from "./tiles";
import { digits } from "./tokens";

export const AXIS = 40; // width of the layers' numbers

export interface GridHandle {
  view(): View;
  setView(view: View): void;
  box(): Box;
  zoom(by: number): void;
  fit(): void;
  complete(): boolean;
  /** Brings a node, or the node that an edge leads into, into sight. */
  reveal(hit: Hit): void;
  /** Client coordinates of a point of the grid. */
  client(x: number, y: number): [number, number];
}

interface Props {
  scene: Scene;
  hidden: ReadonlySet<LooksName>;
  lit: Paths | null; // what is highlighted
  selected: Hit | null;
  pins: Pin[];
  live: boolean;
  roles: (string | null)[] | null; // of the tokens of a chat
  handle: { current: GridHandle | null };
  onHover: (hit: Hit | { column: number } | null, x: number, y: number) => void;
  onPick: (hit: Hit | null) => void;
  onUnfold: (first: number, last: number) => void;
  onExplain: (positions: number[]) => void;
}

export function Grid(props: Props) {
  const { scene, hidden, lit } = props;
  const { graph, layout, pruned } = scene;
  const area = useRef<HTMLDivElement>(null);
  const [box, setBox] = useState<Box>({ width: 0, height: 0 });
  const [view, setViewState] = useState<View | null>(null);
  const [cursor, setCursor] = useState<number | null>(null); // node that the keyboard is at
  const base = useMemo(() => new Tiles(true), []);
  const over = useMemo(() => new Tiles(false), []);
  const live = useRef({ view, box, scene, complete: false, frame: 0, auto: "first" as "first" | "whole" | null });
  live.current.box = box;
  live.current.scene = scene;

  useLayoutEffect(() => {
    const element = area.current!;
    element.prepend(base.canvas, over.canvas);
    base.canvas.className = "edges";
    over.canvas.className = "edges over";
    const measure = (): void => setBox((old) => {
      const now = { width: element.clientWidth, height: element.clientHeight };
      return now.width === old.width && now.height === old.height ? old : now;
    });
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => {
      observer.disconnect();
      cancelAnimationFrame(live.current.frame);
      props.handle.current = null;
    };
  }, []);

  const shown = useMemo(
    () => (hidden.size ? pruned.kept.filter((e) => !hidden.has(LOOKS[graph.looks[e]!]!)) : pruned.kept),
    [pruned, hidden]);

  // The view is kept where the graph stays; another graph or layout begins or is clamped anew.
  const known = useRef<{ graph: Scene["graph"] | null; box: Box }>({ graph: null, box });
  const current = useMemo(() => {
    if (!box.width) return null;
    let next = live.current.view;
    // Until the reader moves it, a view goes on to fit the room, which labels change.
    if (!next || known.current.graph !== graph) live.current.auto = "first";
    const { auto } = live.current;
    if (!next || auto === "first") next = firstView(layout, box, graph.position);
    else if (auto === "whole") next = wholeView(layout, box);
    else if (known.current.box !== box && known.current.box.width) {
      // The right end stays in place: the prediction is mostly there.
      next = clamped({ ...next, tx: next.tx + box.width - known.current.box.width }, layout, box);
    } else next = clamped(next, layout, box);
    known.current = { graph, box };
    return next;
  }, [graph, layout, box, view]);
  live.current.view = current;

  const paint = (): void => {
    const at = live.current;
    at.frame = 0;
    if (!at.view || !at.box.width) return;
    const deadline = performance.now() + 11;
    // Both pictures get their turn; a highlight is seen first.
    const done = over.paint(at.view, deadline);
    at.complete = base.paint(at.view, Math.max(deadline, performance.now() + 3)) && done;
    if (!at.complete) schedule();
  };
  const schedule = (): void => {
    live.current.complete = false;
    if (!live.current.frame) live.current.frame = requestAnimationFrame(paint);
  };
  useLayoutEffect(() => {
    const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
    base.resize(box, ratio);
    over.resize(box, ratio);
    if (box.width && current) paint();
  }, [box]);
  useLayoutEffect(() => { base.show(scene, shown, null); schedule(); }, [scene, shown]);
  useLayoutEffect(() => {
    if (lit) {
      const edges = hidden.size ? lit.edges.filter((e) => !hidden.has(LOOKS[graph.looks[e]!]!)) : lit.edges;
      over.show(scene, edges, lit.nodes);
    } else over.clear();
    schedule();
  }, [lit, scene, hidden]);
  useLayoutEffect(schedule, [current]);

  const moving = useRef<{ next: View | null; frame: number }>({ next: null, frame: 0 });
  const setView = (next: View): void => {
    const { scene: now, box: room } = live.current;
    live.current.auto = null;
    moving.current.next = clamped(next, now.layout, room);
    live.current.view = moving.current.next;
    if (!moving.current.frame) {
      moving.current.frame = requestAnimationFrame(() => {
        moving.current.frame = 0;
        setViewState(moving.current.next);
      });
    }
  };
  const zoomAt = (by: number, x: number, y: number): void => {
    const at = live.current;
    if (at.view) setView(zoomed(at.view, by, x, y, at.scene.layout, at.box));
  };
  props.handle.current = {
    view: () => live.current.view!,
    setView,
    box: () => live.current.box,
    zoom: (by) => zoomAt(by, live.current.box.width / 2, live.current.box.height / 2),
    fit: () => {
      setView(wholeView(live.current.scene.layout, live.current.box));
      live.current.auto = "whole";
    },
    reveal: (hit) => show(hit.node ?? graph.above[hit.edge]!),
    complete: () => live.current.complete && !live.current.frame && !moving.current.frame,
    client: (x, y) => {
      const at = area.current!.getBoundingClientRect();
      return [at.left + x, at.top + y];
    },
  };

  // Pointers: dragging pans, two fingers zoom, a click picks.
  const pointers = useRef(new Map<number, { x: number; y: number }>());
  const drag = useRef({ moved: 0 });
  const local = (event: { clientX: number; clientY: number }): { x: number; y: number } => {
    const at = area.current!.getBoundingClientRect();
    return { x: event.clientX - at.left, y: event.clientY - at.top };
  };
  const hitAt = (x: number, y: number): Hit | null =>
    current ? find(scene, shown, hidden, live.current.view ?? current, x, y) : null;
  const onPointerDown = (event: PointerEvent): void => {
    if (event.button !== 0) return;
    pointers.current.set(event.pointerId, local(event));
    drag.current.moved = 0;
  };
  const onPointerMove = (event: PointerEvent): void => {
    const now = local(event), old = pointers.current.get(event.pointerId);
    if (!old) {
      props.onHover(hitAt(now.x, now.y), event.clientX, event.clientY);
      return;
    }
    const at = live.current.view;
    if (!at) return;
    pointers.current.set(event.pointerId, now);
    if (pointers.current.size === 2) {
      const other = [...pointers.current].find(([id]) => id !== event.pointerId)![1];
      const apart = (p: { x: number; y: number }): number => Math.hypot(p.x - other.x, p.y - other.y);
      zoomAt(apart(now) / Math.max(1, apart(old)), (now.x + other.x) / 2, (now.y + other.y) / 2);
      drag.current.moved = 100;
      return;
    }
    const dx = now.x - old.x, dy = now.y - old.y;
    drag.current.moved += Math.abs(dx) + Math.abs(dy);
    if (drag.current.moved > 4) {
      if (!area.current!.hasPointerCapture(event.pointerId)) area.current!.setPointerCapture(event.pointerId);
      area.current!.classList.add("dragging");
      props.onHover(null, 0, 0);
      setView({ ...at, tx: at.tx + dx, ty: at.ty + dy });
    }
  };
  const onPointerUp = (event: PointerEvent): void => {
    if (!pointers.current.delete(event.pointerId)) return;
    area.current!.classList.remove("dragging");
    if (drag.current.moved > 4) return;
    const { x, y } = local(event);
    props.onPick(hitAt(x, y));
  };
  useEffect(() => {
    const element = area.current!;
    const onWheel = (event: WheelEvent): void => {
      const at = live.current.view;
      if (!at) return;
      const { x, y } = local(event);
      const unit = event.deltaMode === 1 ? 16 : 1;
      if (event.ctrlKey || event.metaKey) zoomAt(Math.exp(-event.deltaY * unit * 0.004), x, y);
      else {
        const [dx, dy] = event.shiftKey ? [event.deltaY, 0] : [event.deltaX, event.deltaY];
        const next = clamped({ ...at, tx: at.tx - dx * unit, ty: at.ty - dy * unit }, live.current.scene.layout, live.current.box);
        // What the grid does not need scrolls the page around it.
        if (next.tx === at.tx && next.ty === at.ty) return;
        setView(next);
      }
      event.preventDefault();
    };
    element.addEventListener("wheel", onWheel, { passive: false });
    return () => element.removeEventListener("wheel", onWheel);
  }, []);

  const show = (node: number): void => {
    const at = live.current.view!, room = live.current.box;
    const x = layout.x[node % graph.T]! * at.sx + at.tx, y = layout.y[Math.floor(node / graph.T)]! * at.sy + at.ty;
    const dx = x < 30 ? 30 - x : x > room.width - 30 ? room.width - 30 - x : 0;
    const dy = y < 12 ? 12 - y : y > room.height - 12 ? room.height - 12 - y : 0;
    if (dx || dy) setView({ ...at, tx: at.tx + dx, ty: at.ty + dy });
  };
  const onKeyDown = (event: KeyboardEvent): void => {
    const at = live.current.view;
    if (!at || event.ctrlKey || event.metaKey || event.altKey) return;
    const steps: Record<string, [number, number]> = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1],
    };
    const step = steps[event.key];
    if (step && event.shiftKey) setView({ ...at, tx: at.tx - 90 * step[0], ty: at.ty + 60 * step[1] });
    else if (step) {
      const top = 2 * graph.L * graph.T + graph.position;
      const next = cursor === null ? top : neighbour(scene, cursor, step[0], step[1]);
      setCursor(next);
      show(next);
      const [x, y] = props.handle.current!.client(
        layout.x[next % graph.T]! * at.sx + at.tx, layout.y[Math.floor(next / graph.T)]! * at.sy + at.ty);
      props.onHover({ node: next }, x, y);
    } else if (event.key === "Enter" && cursor !== null) props.onPick({ node: cursor });
    else if (event.key === "+" || event.key === "=") props.handle.current!.zoom(1.3);
    else if (event.key === "-") props.handle.current!.zoom(1 / 1.3);
    else if (event.key === "0") props.handle.current!.fit();
    else return;
    event.preventDefault();
  };

  const marks = current ? marksOf(props, current, cursor) : [];
  const every = current ? Math.max(1, Math.ceil(15 / current.sy)) : 1;
  const strip = stripHeight(scene, current) + (props.roles ? 16 : 0);
  return (
    <div class="grid" style={{ gridTemplateRows: `auto minmax(0, 1fr) ${strip}px` }}>
      <div class="corner"><span>layer</span></div>
      {current ? <Predictions scene={scene} view={current} box={box} live={props.live} onExplain={props.onExplain} /> : <div />}
      <div class="axis" aria-hidden="true">
        {current && Array.from({ length: graph.L }, (_, l) => l).filter((l) => l % every === 0).map((l) => {
          const y = (layout.height - l - 0.5) * current.sy + current.ty;
          return y > 4 && y < box.height - 4 ? <span key={l} style={{ top: `${y}px` }}>{l}</span> : null;
        })}
      </div>
      <div ref={area} class={`plot${lit ? " tracing" : ""}`} tabIndex={0} role="application"
        aria-roledescription="route graph"
        aria-label="Route graph: arrow keys move between nodes, Enter picks, plus and minus zoom, 0 shows all, Shift and arrows pan"
        onPointerDown={onPointerDown} onPointerMove={onPointerMove} onPointerUp={onPointerUp}
        onPointerCancel={onPointerUp} onPointerLeave={() => props.onHover(null, 0, 0)}
        onKeyDown={onKeyDown} onBlur={() => { setCursor(null); props.onHover(null, 0, 0); }}>
        {marks}
        <span class="unseen" role="status">
          {cursor !== null && `${nodeText(graph, cursor)}: ${pruned.reached[cursor] ? `importance ${digits(pruned.flow[cursor]!)}` : "not reached"}`}
        </span>
        {current && <Minimap scene={scene} view={current} box={box} onMove={setView} />}
        <div class="zoom" onPointerDown={(event) => event.stopPropagation()} onKeyDown={(event) => event.stopPropagation()}>
          <button type="button" aria-label="Zoom in" title="Zoom in (+)" onClick={() => props.handle.current!.zoom(1.4)}><Icon name="plus" /></button>
          <button type="button" aria-label="Zoom out" title="Zoom out (-)" onClick={() => props.handle.current!.zoom(1 / 1.4)}><Icon name="minus" /></button>
          <button type="button" aria-label="Show the whole graph" title="Show the whole graph (0)" onClick={() => props.handle.current!.fit()}><Icon name="whole" /></button>
        </div>
      </div>
      <div class="corner" />
      {current ? (
        <Strip scene={scene} view={current} box={box} height={strip} lit={lit} onHover={props.onHover}
          live={props.live} roles={props.roles} onPick={props.onPick} onUnfold={props.onUnfold} onExplain={props.onExplain} show={show} />
      ) : <div />}
    </div>
  );
}

/** The next node in a direction: a column that is no gap, or a level that the layer has. */
function neighbour(scene: Scene, node: number, across: number, up: number): number {
  const { graph, layout } = scene;
  let level = Math.floor(node / graph.T) + up;
  if (up && level % 2 === 1 && graph.parallel[(level - 1) / 2]) level += up;
  level = Math.max(0, Math.min(2 * graph.L, level));
  let column = layout.columnOf[node % graph.T]!;
  for (let c = column + across; across && layout.columns[c]; c += across) {
    if (!layout.columns[c]!.gap) { column = c; break; }
  }
  return level * graph.T + layout.columns[column]!.first;
}

/** Rings and names of the selected node, of pins, and of the keyboard's node. */
function marksOf(props: Props, view: View, cursor: number | null) {
  const { graph, layout } = props.scene;
  const at = (node: number): { left: string; top: string } => ({
    left: `${layout.x[node % graph.T]! * view.sx + view.tx}px`,
    top: `${layout.y[Math.floor(node / graph.T)]! * view.sy + view.ty}px`,
  });
  const out = props.pins.filter((pin) => pin.node < graph.nodes).map((pin) => (
    <span class="pin" key={`pin ${pin.node}`} style={at(pin.node)}>
      {pin.name && <span class="pin-name">{pin.name}</span>}
    </span>
  ));
  if (props.selected?.node !== undefined) out.push(<span class="ring" key="selected" style={at(props.selected.node)} />);
  if (cursor !== null) out.push(<span class="ring cursor" key="cursor" style={at(cursor)} />);
  return out;
}
