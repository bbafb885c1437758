import type { ComponentChildren } from "preact";
import type { Backend } from "./backend";
import type { Graph } from "./graph";
import type { Hit } from "./hit";
import type { Scene } from "./paint";
import type { State, Store } from "./state";

/** What a backend adds to the page. */
export interface LiveParts {
  graph: Graph | null;
  busy: boolean;
  panel: ComponentChildren; // beside the graph
  status: ComponentChildren; // progress and errors
  facts: ComponentChildren;
  details: (scene: Scene, hit: Hit) => ComponentChildren;
  below: (scene: Scene) => ComponentChildren;
  explain: (positions: number[]) => void;
  downloads: Record<string, () => void | Promise<void>>;
}

export function useLive(
  backend: Backend | null, _store: Store, _state: State, _graph: Graph | null, _show: (graph: Graph) => void,
): LiveParts | null {
  return backend ? null : null;
}
