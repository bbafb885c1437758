/* Calls of a backend by components: their answers are kept, and dropped calls are cancelled. */
import { useEffect, useState } from "preact/hooks";
import type { Backend, Report } from "./backend";

const KEPT = 300; // answers
const known = new WeakMap<Backend, Map<string, unknown>>();

function answersOf(backend: Backend): Map<string, unknown> {
  let found = known.get(backend);
  if (!found) known.set(backend, (found = new Map()));
  return found;
}

/** Forgets all answers: another model is open. */
export function forget(backend: Backend): void {
  known.delete(backend);
}

export async function ask<Result>(
  backend: Backend, method: string, params: object, options: { signal?: AbortSignal; onReport?: (report: Report) => void } = {},
): Promise<Result> {
  const answers = answersOf(backend), key = `${method} ${JSON.stringify(params)}`;
  if (answers.has(key)) return answers.get(key) as Result;
  const result = await backend.call<Result>(method, params, options);
  if (answers.size >= KEPT) answers.delete(answers.keys().next().value!);
  answers.set(key, result);
  return result;
}

export interface Answer<Result> { data: Result | null; error: string | null; busy: boolean }

let open = 0; // calls of components, so that tests can wait for them
export const openCalls = (): number => open;

/** The answer to a call; params null: nothing is asked. */
export function useCall<Result>(backend: Backend, method: string, params: object | null): Answer<Result> {
  const key = params && `${method} ${JSON.stringify(params)}`;
  const [answer, setAnswer] = useState<Answer<Result> & { key: string | null }>({ key: null, data: null, error: null, busy: false });
  useEffect(() => {
    if (!params) {
      setAnswer({ key, data: null, error: null, busy: false });
      return undefined;
    }
    const abort = new AbortController();
    setAnswer({ key, data: null, error: null, busy: true });
    open++;
    ask<Result>(backend, method, params, { signal: abort.signal })
      .then((data) => { if (!abort.signal.aborted) setAnswer({ key, data, error: null, busy: false }); })
      .catch((error: unknown) => {
        if (!abort.signal.aborted) setAnswer({ key, data: null, error: words(error), busy: false });
      })
      .finally(() => { open--; });
    return () => abort.abort();
  }, [backend, key]);
  return answer.key === key ? answer : { data: null, error: null, busy: key !== null };
}

export function words(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** What stands in the place of an answer that is not there yet, or never comes. */
export function Waiting({ answer, what }: { answer: Answer<unknown>; what: string }) {
  if (answer.error) return <p class="error" role="alert">{answer.error}</p>;
  return answer.busy ? <p class="quiet" role="status">{what} …</p> : null;
}
