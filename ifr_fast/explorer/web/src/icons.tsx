/* Signs on buttons, drawn so that no font has to have them. */
const PATHS = {
  undo: "M6 3 3 6l3 3M3 6h6.5a3.5 3.5 0 0 1 0 7H6",
  redo: "M10 3l3 3-3 3M13 6H6.5a3.5 3.5 0 0 0 0 7H10",
  plus: "M8 3v10M3 8h10",
  minus: "M3 8h10",
  whole: "M2.5 5V2.5H5M11 2.5h2.5V5M13.5 11v2.5H11M5 13.5H2.5V11M5.5 8h5",
  full: "M9.5 2.5h4v4M6.5 13.5h-4v-4M13.5 2.5 9 7M2.5 13.5 7 9",
  moon: "M13 9.5A5.5 5.5 0 0 1 6.5 3a5.5 5.5 0 1 0 6.5 6.5Z",
  sun: "M8 5.2a2.8 2.8 0 1 0 0 5.6 2.8 2.8 0 0 0 0-5.6ZM8 1.5v1.4M8 13.1v1.4M1.5 8h1.4M13.1 8h1.4M3.4 3.4l1 1M11.6 11.6l1 1M12.6 3.4l-1 1M4.4 11.6l-1 1",
  close: "M4 4l8 8M12 4l-8 8",
} as const;

export function Icon({ name }: { name: keyof typeof PATHS }) {
  return <svg class="sign" viewBox="0 0 16 16" aria-hidden="true"><path d={PATHS[name]} /></svg>;
}

export function IconButton(props: { icon: keyof typeof PATHS; label: string; hint?: string; disabled?: boolean; onClick: () => void }) {
  return (
    <button type="button" class="icon" aria-label={props.label} title={props.hint ? `${props.label} (${props.hint})` : props.label}
      disabled={props.disabled ?? false} onClick={props.onClick}><Icon name={props.icon} /></button>
  );
}
