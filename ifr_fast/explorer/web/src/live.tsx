/* What a backend adds: models, texts, options, traces on demand, generation and comparison. */
import type { ComponentChildren } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Backend, Progress, Report } from "./backend";
import { ask, forget, words } from "./calls";
import { Difference, aligned } from "./difference";
import type { DifferenceDocument } from "./difference";
import type { GraphDocument } from "./document";
import { Drilling } from "./drilling";
import { download, fromBase64 } from "./files";
import { Graph } from "./graph";
import type { Hit } from "./hit";
import { Icon } from "./icons";
import { Panel } from "./panel";
import type { Scene } from "./paint";
import type { State, Store } from "./state";
import { Token } from "./token";
import { visible } from "./tokens";

export interface ModelInfo { name: string; sizes: [string, string | number][]; n_layers: number; n_heads: number }

export interface ModelsInfo {
  current: ModelInfo | null;
  known: string[];
  devices: string[];
  dtypes: string[];
  formats?: string[];
  limits?: { max_tokens?: number; max_upload?: number };
  input?: { text?: string; messages?: { role: string; content: string }[] };
  position?: number;
  threshold?: number;
}

interface Step { token: string; id: number; graph: GraphDocument; position?: number }
interface Generation { steps: { token: string; graph: Graph }[]; at: number }

export interface Comparison {
  names: [string, string];
  first: Graph;
  second: Graph;
  difference: Difference | null;
  reason: string;
}

export interface GenerateOptions { max_new_tokens: number; temperature: number; seed: number }

/** What a backend adds to the page. */
export interface LiveParts {
  graph: Graph | null; // a step of a generation, in place of the trace
  busy: boolean;
  roles: (string | null)[] | null;
  comparison: Comparison | null;
  panel: ComponentChildren;
  status: ComponentChildren; // progress and errors
  facts: ComponentChildren;
  details: (scene: Scene, hit: Hit) => ComponentChildren;
  below: () => ComponentChildren;
  explain: (positions: number[]) => void;
  closeComparison: () => void;
  downloads: Record<string, () => void | Promise<void>>;
}

const FORMATS = ["neuronpedia", "safetensors"];
const TRACES_KEPT = 16;

export function useLive(
  backend: Backend | null, store: Store, state: State, shown: Graph | null, show: (graph: Graph) => void,
): LiveParts | null {
  if (!backend) return null; // the same at every call: hosts have a backend or none
  return useBackend(backend, store, state, shown, show);
}

function inputOf(state: State): object | null {
  if (state.messages?.length) return { messages: state.messages };
  return state.text ? { text: state.text } : null;
}

/** What is explained, and how edges are chosen. */
function howOf(state: State): object {
  return {
    ...(state.positions.length > 1 ? { positions: state.positions } : state.positions.length ? { position: state.positions[0] } : {}),
    granularity: state.byHead ? "head" : "token", renormalize: state.renormalize,
  };
}

function useBackend(
  backend: Backend, store: Store, state: State, shown: Graph | null, show: (graph: Graph) => void,
): LiveParts {
  const [info, setInfo] = useState<ModelsInfo | null>(null);
  const [model, setModel] = useState<ModelInfo | null>(null);
  const [work, setWork] = useState<{ what: string; progress: Progress | null; abort: AbortController } | null>(null);
  const [error, setError] = useState<string | null>(null);
  const [texts, setTexts] = useState<string[]>([]);
  const [roles, setRoles] = useState<(string | null)[] | null>(null);
  const [generation, setGeneration] = useState<Generation | null>(null);
  const [comparison, setComparison] = useState<Comparison | null>(null);
  const traces = useMemo(() => new Map<string, Graph>(), []);
  const [attempt, setAttempt] = useState(0); // explaining a text again tries again
  const current = useRef<AbortController | null>(null);

  /** Runs one piece of work at a time: what is begun anew ends what runs. */
  async function run<Result>(what: string, act: (options: { signal: AbortSignal; onReport: (report: Report) => void }) => Promise<Result>): Promise<Result | null> {
    current.current?.abort();
    const abort = (current.current = new AbortController());
    setError(null);
    setWork({ what, progress: null, abort });
    try {
      const result = await act({
        signal: abort.signal,
        onReport: ({ progress }) => {
          if (progress && !abort.signal.aborted) setWork({ what, progress, abort });
        },
      });
      return abort.signal.aborted ? null : result;
    } catch (problem) {
      if (!abort.signal.aborted) setError(words(problem));
      return null;
    } finally {
      if (current.current === abort) {
        current.current = null;
        setWork(null);
      }
    }
  }

  const openModel = async (name: string, device: string, dtype: string, atFirst = false): Promise<void> => {
    const opened = await run(`Opening ${name}`, (options) => backend.call<ModelInfo>("open_model", {
      name, ...(device ? { device } : {}), ...(dtype ? { dtype } : {}),
    }, options));
    if (!opened) return;
    forget(backend);
    traces.clear();
    setGeneration(null);
    setComparison(null);
    setModel(opened);
    if (atFirst) store.replace({ model: opened.name });
    else store.set({ model: opened.name, positions: [], selected: null, pins: [], unfolded: [] });
  };

  useEffect(() => {
    void (async () => {
      const found = await run("Asking for the models", (options) => backend.call<ModelsInfo>("models", {}, options));
      if (!found) return;
      setInfo(found);
      const now = store.state;
      const first = found.input && !inputOf(now);
      if (first) {
        store.replace({
          text: found.input!.text ?? null, messages: found.input!.messages ?? null,
          positions: found.position === undefined ? [] : [found.position],
          floor: found.threshold ?? now.floor,
        });
      }
      const text = store.state.text;
      if (text) setTexts([text]);
      if (now.model && now.model !== found.current?.name) await openModel(now.model, "", "", true);
      else setModel(found.current);
    })();
    return () => current.current?.abort();
  }, [backend]);

  const input = inputOf(state);
  const full = input && model ? { ...input, model: model.name } : null;
  const wanted = full && JSON.stringify({
    input: full, threshold: state.floor, ...howOf(state),
  });
  const answered = useRef<string | null>(null);
  useEffect(() => {
    if (!wanted || answered.current === wanted) return;
    setGeneration(null);
    void (async () => {
      let graph = traces.get(wanted) ?? null;
      if (!graph) {
        const params = JSON.parse(wanted) as { input: object };
        const result = await run("Tracing", async (options) => {
          const found = await backend.call<{ graph: GraphDocument }>("trace", params, options);
          return new Graph(found.graph);
        });
        if (!result) return;
        graph = result;
        traces.set(wanted, graph);
        if (traces.size > TRACES_KEPT) traces.delete(traces.keys().next().value!);
      } else current.current?.abort();
      answered.current = wanted;
      show(graph);
      setError(null);
      const { messages } = store.state;
      if (!messages) setRoles(null);
      else {
        ask<{ roles?: (string | null)[] }>(backend, "tokenize", { input: full! })
          .then((found) => setRoles(found.roles ?? null)).catch(() => setRoles(null));
      }
    })();
  }, [wanted, attempt]);

  const choose = (change: Partial<State>): void => {
    setComparison(null);
    setError(null);
    setAttempt((n) => n + 1);
    store.set({ positions: [], selected: null, pins: [], unfolded: [], ...change });
  };
  const generate = async (options: GenerateOptions): Promise<void> => {
    if (!full) return;
    const steps: Generation["steps"] = [];
    setComparison(null);
    await run("Generating", (how) => backend.call("generate", { input: full, ...options, threshold: state.floor }, {
      ...how,
      onReport: (report) => {
        how.onReport(report);
        const step = report.step as Step | undefined;
        if (!step || how.signal.aborted) return;
        steps.push({ token: step.token, graph: new Graph(step.graph) });
        setGeneration({ steps: steps.slice(), at: steps.length - 1 });
      },
    }));
  };
  const compare = async (other: { text: string; model: string | null }): Promise<void> => {
    if (!full || !shown) return;
    const { positions, position, ...how } = howOf(state) as { positions?: number[]; position?: number };
    const starts = positions ? { positions } : position === undefined ? {} : { position };
    const found = await run("Comparing", (options) => backend.call<{ a: GraphDocument; b: GraphDocument; difference?: DifferenceDocument | null; reason?: string }>("compare", {
      a: { input: full, ...starts },
      b: { input: { text: other.text, model: other.model ?? model!.name }, ...(other.text === state.text ? starts : {}) },
      threshold: state.floor, ...how,
    }, options));
    if (!found) return;
    const first = new Graph(found.a), second = new Graph(found.b);
    const alike = first.L === second.L && first.T === second.T;
    const between = found.difference ?? (alike ? aligned(first, second) : null);
    setComparison({
      first, second, difference: between && new Difference(first, second, between),
      reason: found.reason ?? "Graphs of different shapes have no difference.",
      names: [state.text ?? "chat", other.model && other.model !== model!.name ? `${other.text} (${other.model})` : other.text],
    });
  };
  const step = generation?.steps[generation.at] ?? null;
  const about = {
    input: step ? { token_ids: Array.from(step.graph.ids), model: model?.name } : full ?? {},
    normalize: state.normalize,
  };
  const save = async (format: string): Promise<void> => {
    const found = await run(`Writing ${format}`, (options) => backend.call<{ name: string; media_type: string; base64: string }>("export", {
      input: about.input, threshold: Math.max(state.floor, store.state.threshold ?? 0), format, ...howOf(state),
      ...(step ? { position: step.graph.position, positions: undefined } : {}),
    }, options));
    if (found) download(found.name, new Blob([fromBase64(found.base64)], { type: found.media_type }));
  };

  const moveTo = (at: number): void => {
    if (generation) setGeneration({ ...generation, at: Math.max(0, Math.min(generation.steps.length - 1, at)) });
  };
  return {
    graph: step?.graph ?? null,
    busy: work !== null || (wanted !== null && answered.current !== wanted && !error),
    roles,
    comparison,
    panel: <Panel info={info} model={model} state={state} texts={texts} working={work !== null}
      onOpen={(...of) => void openModel(...of)} onTexts={setTexts} onChoose={choose}
      onOptions={(change) => store.set(change)} onGenerate={(options) => void generate(options)}
      onCompare={(other) => void compare(other)} onError={setError} />,
    status: (
      <>
        {work && (
          <div class="status" role="status">
            <span>{work.progress?.what ?? work.what} …</span>
            <progress max={work.progress?.total || 1} {...(work.progress ? { value: work.progress.done } : {})} aria-label={work.what} />
            <span class="grow" />
            <button type="button" class="small" onClick={() => { work.abort.abort(); current.current = null; setWork(null); setError("Cancelled."); }}>Cancel</button>
          </div>
        )}
        {error && (
          <div class="status error" role="alert">
            <span class="grow">{error}</span>
            <button type="button" class="small" onClick={() => setError(null)}>Dismiss</button>
          </div>
        )}
        {!work && !error && !shown && (
          <p class="quiet">{model ? "Write a text to explain." : "Open a model to begin."}</p>
        )}
      </>
    ),
    facts: model ? ` · ${model.name}` : null,
    details: (scene, hit) => (full ? <Drilling backend={backend} about={about} scene={scene} hit={hit} /> : null),
    below: () => generation && (
      <section class="steps" aria-label="Generated tokens">
        <button type="button" class="icon" aria-label="Step before" disabled={generation.at === 0} onClick={() => moveTo(generation.at - 1)}>‹</button>
        <button type="button" class="icon" aria-label="Next step" disabled={generation.at === generation.steps.length - 1} onClick={() => moveTo(generation.at + 1)}>›</button>
        <ol>
          {generation.steps.map((one, i) => (
            <li key={i}>
              <button type="button" aria-pressed={i === generation.at} aria-label={`Step ${i + 1}: ${visible(one.token)}`} onClick={() => moveTo(i)}><Token text={one.token} /></button>
            </li>
          ))}
        </ol>
        <button type="button" class="icon" aria-label="Close the generation" onClick={() => setGeneration(null)}><Icon name="close" /></button>
      </section>
    ),
    explain: (positions) => {
      setGeneration(null);
      setAttempt((n) => n + 1);
      store.set({ positions, unfolded: [] });
    },
    closeComparison: () => setComparison(null),
    downloads: Object.fromEntries((info?.formats ?? FORMATS).map((format) => [format, () => save(format)])),
  };
}
