/* The one entrance: `ifrExplorer.mount(element, { graph, backend })`. A page that has an element
   with `data-ifr-host` is served by itself. */
import { render as renderInto } from "preact";
import { App } from "./app";
import type { Host } from "./app";
import { words } from "./calls";
import { httpBackend, widgetBackend } from "./backend";
import type { Backend, WidgetModel } from "./backend";
import type { GraphDocument } from "./document";
import { Probe } from "./probe";
import { INITIAL, Store, fromHash, toHash } from "./state";
import styles from "./styles.css";

export interface Options { graph?: GraphDocument; backend?: Backend; host?: Host }

export interface Handle extends Probe {
  /** Draws another graph in place of the present one. */
  show(graph: GraphDocument): void;
  destroy(): void;
}

declare global {
  interface HTMLElement { explorer?: Handle }
}

/** Draws an explorer into an element, within a shadow root of its own. */
export function mount(element: HTMLElement, options: Options): Handle {
  const shadow = element.shadowRoot ?? element.attachShadow({ mode: "open" });
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(styles);
  shadow.adoptedStyleSheets = [sheet];
  const root = document.createElement("div");
  root.className = "root";
  root.dataset.host = options.host ?? "static";
  shadow.replaceChildren(root);
  const ownsPage = options.host !== "widget"; // a widget leaves the notebook's address alone
  const store = new Store(ownsPage ? fromHash(location.hash) : { ...INITIAL });
  const probe = new Probe(store);
  let written = location.hash;
  let timer = 0;
  const write = (): void => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const hash = toHash(store.state);
      written = hash ? `#${hash}` : "";
      try {
        history.replaceState(null, "", written || location.pathname + location.search);
      } catch {
        // A frame without an address of its own, as in a notebook, keeps no state there.
      }
    }, 120);
  };
  const read = (): void => {
    if (location.hash === written) return;
    written = location.hash;
    // An address that names no text is about the present one.
    const { text, messages, model, floor } = store.state, found = fromHash(location.hash);
    store.set(found.text === null && !found.messages ? { ...found, text, messages, model, floor } : found);
  };
  const stop = ownsPage ? store.listen(write) : () => undefined;
  if (ownsPage) addEventListener("hashchange", read);
  const draw = (graph: GraphDocument | null): void => {
    try {
      renderInto(<App document={graph} backend={options.backend ?? null} store={store} root={root} probe={probe} />, root);
    } catch (error) {
      renderInto(<p role="alert" class="broken">The graph cannot be drawn: {words(error)}</p>, root);
    }
  };
  draw(options.graph ?? null);
  const handle = Object.assign(probe, {
    show: draw,
    destroy: () => {
      stop();
      clearTimeout(timer);
      removeEventListener("hashchange", read);
      renderInto(null, root);
      shadow.replaceChildren();
      delete element.explorer;
    },
  });
  element.explorer = handle;
  return handle;
}

/** anywidget's entrance. */
export function render({ model, el }: { model: WidgetModel; el: HTMLElement }): () => void {
  const backend = widgetBackend(model);
  const graph = model.get("graph"), height = model.get("height");
  el.style.height = `${typeof height === "number" ? height : 640}px`;
  const handle = mount(el, {
    backend, host: "widget",
    ...(typeof graph === "string" && graph ? { graph: JSON.parse(graph) as GraphDocument } : {}),
  });
  const changed = (): void => {
    const now = model.get("graph");
    if (typeof now === "string" && now) handle.show(JSON.parse(now) as GraphDocument);
  };
  model.on("change:graph", changed);
  return () => {
    model.off("change:graph", changed);
    handle.destroy();
    backend.close();
  };
}

/** The server's token, from the address or from earlier in this tab; it leaves the address bar. */
function takeToken(): string {
  const url = new URL(location.href), found = url.searchParams.get("token");
  if (found === null) return sessionStorage.getItem("ifr-token") ?? "";
  sessionStorage.setItem("ifr-token", found);
  url.searchParams.delete("token");
  history.replaceState(null, "", url);
  return found;
}

const host = typeof document === "undefined" ? null : document.querySelector<HTMLElement>("[data-ifr-host]");
if (host?.dataset.ifrHost === "server") {
  mount(host, { host: "server", backend: httpBackend({ base: "/api/", token: takeToken() }) });
} else if (host?.dataset.ifrHost === "static") {
  const data = document.getElementById(host.dataset.ifrData ?? "data")!.textContent!;
  mount(host, { host: "static", graph: JSON.parse(data) as GraphDocument });
}

export { httpBackend, widgetBackend };
