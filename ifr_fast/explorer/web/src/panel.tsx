/* The panel of a live page: the model, the texts, the options, generation and comparison. */
import { useState } from "preact/hooks";
import type { ComponentChildren } from "preact";
import type { GenerateOptions, ModelInfo, ModelsInfo } from "./live";
import type { State } from "./state";
import { Table } from "./table";

const MAX_UPLOAD = 1_000_000; // bytes, where the backend names no limit

interface Props {
  info: ModelsInfo | null;
  model: ModelInfo | null;
  state: State;
  texts: string[];
  working: boolean;
  onOpen: (name: string, device: string, dtype: string) => void;
  onTexts: (texts: string[]) => void;
  onChoose: (change: Partial<State>) => void;
  onOptions: (change: Partial<State>) => void;
  onGenerate: (options: GenerateOptions) => void;
  onCompare: (other: { text: string; model: string | null }) => void;
  onError: (words: string) => void;
}

export function Panel(props: Props) {
  const [open, setOpen] = useState(innerWidth > 900);
  return (
    <aside class={`panel${open ? "" : " closed"}`} aria-label="Model and texts">
      <button type="button" class="fold" aria-expanded={open} onClick={() => setOpen(!open)}>
        {open ? "‹ Hide" : "› Model and texts"}
      </button>
      {open && (
        <div class="panel-parts">
          <ModelPart {...props} />
          <Texts {...props} />
          <Options {...props} />
          <Generate {...props} />
          <Compare {...props} />
        </div>
      )}
    </aside>
  );
}

function Part({ name, children, closed }: { name: string; children: ComponentChildren; closed?: boolean }) {
  return (
    <details class="part" open={!closed}>
      <summary>{name}</summary>
      <div>{children}</div>
    </details>
  );
}

function ModelPart({ info, model, working, onOpen }: Props) {
  const [name, setName] = useState("");
  const [device, setDevice] = useState("");
  const [dtype, setDtype] = useState("");
  const submit = (event: Event): void => {
    event.preventDefault();
    const wanted = name.trim() || model?.name;
    if (wanted) onOpen(wanted, device, dtype);
  };
  return (
    <Part name="Model">
      {model && <p class="model-name">{model.name}</p>}
      <form class="form" onSubmit={submit}>
        <input list="known-models" aria-label="Model's name or path" placeholder="name or path" value={name} onInput={(event) => setName(event.currentTarget.value)} />
        <datalist id="known-models">{info?.known.map((known) => <option value={known} />)}</datalist>
        <div class="row">
          <Choice label="Device" value={device} of={info?.devices ?? []} onChange={setDevice} />
          <Choice label="Number type" value={dtype} of={info?.dtypes ?? []} onChange={setDtype} />
          <button type="submit" disabled={working || !(name.trim() || model)}>Open</button>
        </div>
      </form>
      {model && (
        <details class="sizes"><summary>Sizes</summary>
          <Table label="Sizes" rows={model.sizes} page={40} columns={[
            { name: "size", value: (row) => row[0] },
            { name: "value", value: (row) => row[1], show: (row) => (typeof row[1] === "number" ? row[1].toLocaleString("en") : row[1]) },
          ]} />
        </details>
      )}
    </Part>
  );
}

function Choice({ label, value, of, onChange }: { label: string; value: string; of: string[]; onChange: (value: string) => void }) {
  return (
    <select aria-label={label} value={value} onChange={(event) => onChange(event.currentTarget.value)}>
      <option value="">{label.toLowerCase()}</option>
      {of.map((name) => <option value={name}>{name}</option>)}
    </select>
  );
}

/** The texts of a file: a JSON list, lines of JSON, or lines. */
export function textsOf(content: string): string[] {
  const textOf = (value: unknown): string => {
    if (typeof value === "string") return value;
    const text = (value as { text?: unknown } | null)?.text;
    if (typeof text !== "string") throw new Error("a JSON value is no text and has no \"text\"");
    return text;
  };
  const lines = content.split(/\r?\n/).filter((line) => line.trim());
  const start = content.trimStart();
  if (start.startsWith("[")) return (JSON.parse(content) as unknown[]).map(textOf);
  if (start.startsWith("{")) return lines.map((line) => textOf(JSON.parse(line)));
  return lines;
}

function Texts({ info, state, texts, onTexts, onChoose, onError }: Props) {
  const [draft, setDraft] = useState("");
  const chat = state.messages !== null;
  const add = (event: Event): void => {
    event.preventDefault();
    if (!draft) return;
    onTexts([...texts.filter((text) => text !== draft), draft]);
    onChoose({ text: draft, messages: null });
    setDraft("");
  };
  const load = async (files: FileList | null): Promise<void> => {
    const file = files?.[0], most = info?.limits?.max_upload ?? MAX_UPLOAD;
    if (!file) return;
    if (file.size > most) {
      onError(`${file.name} has ${file.size.toLocaleString("en")} bytes; at most ${most.toLocaleString("en")} are read`);
      return;
    }
    try {
      const found = textsOf(await file.text());
      if (!found.length) throw new Error("it holds no text");
      onTexts([...texts, ...found.filter((text) => !texts.includes(text))]);
      onChoose({ text: found[0]!, messages: null });
    } catch (problem) {
      onError(`${file.name} cannot be read: ${problem instanceof Error ? problem.message : problem}`);
    }
  };
  return (
    <Part name="Texts">
      <ul class="texts">
        {texts.map((text) => (
          <li key={text}>
            <button type="button" class="text" title={text} aria-pressed={!chat && state.text === text} onClick={() => onChoose({ text, messages: null })}><bdi>{text}</bdi></button>
            <button type="button" class="small" aria-label={`Remove ${text.slice(0, 60)}`} onClick={() => onTexts(texts.filter((other) => other !== text))}>×</button>
          </li>
        ))}
      </ul>
      <form class="form" onSubmit={add}>
        <textarea rows={3} aria-label="New text" placeholder="Write a text" value={draft} onInput={(event) => setDraft(event.currentTarget.value)}
          onKeyDown={(event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) add(event); }} />
        <div class="row">
          <button type="submit" class="primary" disabled={!draft}>Explain</button>
          <label class="file">Load a file<input type="file" accept=".txt,.json,.jsonl,text/plain,application/json"
            onChange={(event) => { void load(event.currentTarget.files); event.currentTarget.value = ""; }} /></label>
        </div>
      </form>
      <Chat key={chat ? "chat" : "text"} state={state} onChoose={onChoose} />
    </Part>
  );
}

const ROLES = ["system", "user", "assistant"];

function Chat({ state, onChoose }: { state: State; onChoose: Props["onChoose"] }) {
  const [messages, setMessages] = useState(state.messages ?? [{ role: "user", content: "" }]);
  const change = (at: number, to: Partial<{ role: string; content: string }>): void =>
    setMessages(messages.map((message, i) => (i === at ? { ...message, ...to } : message)));
  return (
    <details class="chat" open={state.messages !== null}>
      <summary>Chat messages</summary>
      {messages.map((message, i) => (
        <div class="message" key={i}>
          <select aria-label={`Role of message ${i + 1}`} value={message.role} onChange={(event) => change(i, { role: event.currentTarget.value })}>
            {ROLES.map((role) => <option value={role}>{role}</option>)}
          </select>
          <button type="button" class="small" aria-label={`Remove message ${i + 1}`} disabled={messages.length === 1} onClick={() => setMessages(messages.filter((_, j) => j !== i))}>×</button>
          <textarea rows={2} aria-label={`Message ${i + 1}`} value={message.content} onInput={(event) => change(i, { content: event.currentTarget.value })} />
        </div>
      ))}
      <div class="row">
        <button type="button" onClick={() => setMessages([...messages, { role: messages.length % 2 ? "assistant" : "user", content: "" }])}>Add a message</button>
        <button type="button" class="primary" disabled={!messages.some((m) => m.content)} onClick={() => onChoose({ messages, text: null })}>Explain chat</button>
      </div>
    </details>
  );
}

function Options({ state, onOptions }: Props) {
  const check = (name: "byHead" | "renormalize" | "normalize", label: string, title: string) => (
    <label class="option" title={title}>
      <input type="checkbox" checked={state[name]} onChange={(event) => onOptions({ [name]: event.currentTarget.checked })} />{label}
    </label>
  );
  return (
    <Part name="Options" closed>
      {check("byHead", "Compare each head to the threshold", "Otherwise the sum over heads is compared")}
      {check("renormalize", "Renormalize after thresholding", "The edges kept into a node then sum to 1, as in the LM Transparency Tool")}
      {check("normalize", "Normalize before the unembedding", "Applies the model's last norm in the logit lens and for promoted tokens")}
      <label class="option">Lowest threshold
        <input type="number" min="0" max="1" step="any" value={state.floor} onChange={(event) => {
          const value = Number(event.currentTarget.value);
          if (event.currentTarget.value !== "" && value >= 0 && value <= 1) onOptions({ floor: value });
          else event.currentTarget.value = String(state.floor);
        }} />
      </label>
    </Part>
  );
}

function Generate({ state, working, onGenerate }: Props) {
  const [options, setOptions] = useState<GenerateOptions>({ max_new_tokens: 8, temperature: 0, seed: 0 });
  const field = (name: keyof GenerateOptions, label: string, step: string, most: number) => (
    <label class="option">{label}
      <input type="number" min={name === "max_new_tokens" ? 1 : 0} max={most} step={step} value={options[name]}
        onInput={(event) => setOptions({ ...options, [name]: Number(event.currentTarget.value) })} />
    </label>
  );
  return (
    <Part name="Generate" closed>
      {field("max_new_tokens", "New tokens", "1", 512)}
      {field("temperature", "Temperature", "any", 10)}
      {field("seed", "Seed", "1", 2 ** 31)}
      <button type="button" disabled={working || !(state.text || state.messages)} onClick={() => onGenerate(options)}>Generate</button>
    </Part>
  );
}

function Compare({ info, model, state, texts, working, onCompare }: Props) {
  const [text, setText] = useState("");
  const [other, setOther] = useState("");
  const wanted = text || state.text || "";
  return (
    <Part name="Compare" closed>
      <div class="form">
        <textarea rows={2} aria-label="Text to compare with" placeholder="Another text, or the same with another model" value={text} onInput={(event) => setText(event.currentTarget.value)} />
        {texts.length > 1 && <Choice label="Text of the list" value={texts.includes(text) ? text : ""} of={texts} onChange={setText} />}
        <input aria-label="Model to compare with" placeholder={model?.name ?? "model"} list="other-models" value={other} onInput={(event) => setOther(event.currentTarget.value)} />
        <datalist id="other-models">{info?.known.map((known) => <option value={known} />)}</datalist>
        <button type="button" disabled={working || !wanted} onClick={() => onCompare({ text: wanted, model: other.trim() || null })}>Compare</button>
      </div>
    </Part>
  );
}
