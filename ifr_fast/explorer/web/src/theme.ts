/* Colours of the canvas; those of the text are in styles.css. Blue, orange and grey stay apart for
   every common kind of colour-blind eyes; kinds differ in shape as well. */

export interface Theme {
  dark: boolean;
  background: string;
  text: string;
  muted: string;
  line: string;
  band: string;
  alert: string;
  accent: string;
  heat: [number, number, number]; // of importance, over the background
  edges: [string, string, string, string]; // by Looks
  signs: [string, string]; // of a difference: heavier in the first, in the second
}

export const LIGHT: Theme = {
  dark: false,
  background: "#ffffff", text: "#17202b", muted: "#5a6572", line: "#d9dfe6", band: "#f6f8fa",
  alert: "#b0186e", accent: "#1f5fd0", heat: [20, 150, 136],
  edges: ["#8d97a3", "#2b62d6", "#c8590b", "#6b4fb3"],
  signs: ["#c8590b", "#2b62d6"],
};

export const DARK: Theme = {
  dark: true,
  background: "#0f141a", text: "#e8edf3", muted: "#9aa7b5", line: "#2b3541", band: "#141b23",
  alert: "#ff7cc2", accent: "#7eabff", heat: [30, 178, 160],
  edges: ["#76828f", "#7ca5ff", "#ff9e4f", "#b79cff"],
  signs: ["#ff9e4f", "#7ca5ff"],
};
