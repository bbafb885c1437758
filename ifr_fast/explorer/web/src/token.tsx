/* A token as text: marks for invisible characters are set apart. Its text becomes text nodes. */
import { runs } from "./tokens";

export function Token({ text, class: name }: { text: string; class?: string }) {
  return (
    <bdi class={`token ${name ?? ""}`}>
      {runs(text).map((run) => (run.mark ? <span class="mark">{run.text}</span> : run.text))}
    </bdi>
  );
}

export function At({ position }: { position: number }) {
  return <span class="at"> #{position}</span>;
}
