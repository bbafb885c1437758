/* How the page asks Python: over HTTP at a server, by messages in a notebook (docs/explorer.md). */

export interface Progress { done: number; total: number; what: string }

/** A line of progress: how far the work is, or a finished step of a generation. */
export type Report = { progress?: Progress; step?: unknown };

export interface CallOptions {
  onReport?: (report: Report) => void;
  signal?: AbortSignal;
}

export interface Backend {
  call<Result>(method: string, params: object, options?: CallOptions): Promise<Result>;
}

/** An error that Python explained; `argument` names what was wrong. */
export class BackendError extends Error {
  constructor(message: string, readonly argument: string | null = null) {
    super(message);
  }
}

interface Line {
  progress?: Progress & { step?: unknown };
  result?: unknown;
  error?: { message: string; argument?: string | null };
}

function report(line: Line, options: CallOptions): void {
  if (!line.progress) return;
  const { step, ...progress } = line.progress;
  options.onReport?.({
    ...(step === undefined ? {} : { step }),
    ...("total" in progress || "done" in progress ? { progress: progress as Progress } : {}),
  });
}

/** Methods as POST requests; answers are lines of JSON. */
export function httpBackend({ base, token }: { base: string; token: string }): Backend {
  return {
    async call<Result>(method: string, params: object, options: CallOptions = {}): Promise<Result> {
      let response: Response;
      try {
        response = await fetch(base + method, {
          method: "POST",
          headers: { "Content-Type": "application/json", "X-Ifr-Token": token },
          body: JSON.stringify(params),
          signal: options.signal ?? null,
          credentials: "omit",
        });
      } catch (error) {
        if (options.signal?.aborted) throw error;
        throw new BackendError("The server does not answer. Is `ifr-fast explore` still running?");
      }
      const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      let last: Line | null = null;
      const take = (text: string): void => {
        if (!text.trim()) return;
        let line: Line;
        try {
          line = JSON.parse(text) as Line;
        } catch {
          throw new BackendError(response.ok ? "The server's answer cannot be read." : `The server refused: ${response.status} ${text.slice(0, 200)}`);
        }
        report(line, options);
        if ("result" in line || line.error) last = line;
      };
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop()!;
        lines.forEach(take);
      }
      take(rest);
      return answered<Result>(last);
    },
  };
}

function answered<Result>(line: Line | null): Result {
  if (line?.error) throw new BackendError(line.error.message, line.error.argument ?? null);
  if (!line) throw new BackendError("The answer ended before its result.");
  return line.result as Result;
}

/** The part of an anywidget model that is used. */
export interface WidgetModel {
  get(name: string): unknown;
  send(content: unknown): void;
  on(event: string, listener: (message: unknown) => void): void;
  off(event: string, listener: (message: unknown) => void): void;
}

export function widgetBackend(model: WidgetModel): Backend & { close(): void } {
  let last = 0;
  const open = new Map<number, { options: CallOptions; resolve: (value: never) => void; reject: (error: unknown) => void }>();
  const listen = (message: unknown): void => {
    const line = message as Line & { id?: number };
    const call = open.get(line?.id ?? -1);
    if (!call) return;
    report(line, call.options);
    if (!("result" in line) && !line.error) return;
    open.delete(line.id!);
    try {
      call.resolve(answered(line));
    } catch (error) {
      call.reject(error);
    }
  };
  model.on("msg:custom", listen);
  return {
    call<Result>(method: string, params: object, options: CallOptions = {}): Promise<Result> {
      const id = ++last;
      return new Promise<Result>((resolve, reject) => {
        open.set(id, { options, resolve: resolve as (value: never) => void, reject });
        options.signal?.addEventListener("abort", () => {
          if (!open.delete(id)) return;
          model.send({ id, cancel: true });
          reject(new DOMException("cancelled", "AbortError"));
        });
        model.send({ id, method, params });
      });
    },
    close: () => model.off("msg:custom", listen),
  };
}
