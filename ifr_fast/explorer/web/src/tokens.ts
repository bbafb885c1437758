/* Tokens as text that shows what is invisible in them, as export/labels.py does. */

export interface Run {
  text: string;
  mark: boolean; // a mark that stands for invisible characters
}

const MARKS: Record<string, string> = { " ": "·", "\n": "↵", "\t": "⇥" };
const PIECE = /^(.+) ([1-9]\d?)\/([1-9]\d?)$/s; // the label of a piece of a character (characters.py)

/** The runs of a token: its text, and marks for spaces and invisible characters. */
export function runs(token: string): Run[] {
  if (!token) return [{ text: "∅", mark: true }];
  const piece = PIECE.exec(token);
  if (piece && Number(piece[3]) > 1 && Number(piece[2]) <= Number(piece[3])) {
    return [...runs(piece[1]!), { text: ` ${piece[2]}/${piece[3]}`, mark: true }];
  }
  const out: Run[] = [];
  const put = (text: string, mark: boolean): void => {
    const last = out[out.length - 1];
    if (last && last.mark === mark) last.text += text;
    else out.push({ text, mark });
  };
  for (const char of token) {
    const last = out[out.length - 1];
    if (Object.hasOwn(MARKS, char)) put(MARKS[char]!, true);
    else if (/[\p{C}\p{Z}]/u.test(char)) {
      put(`‹${char.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}›`, true);
    } else if (!last || last.mark) put((/\p{M}/u.test(char) ? "◌" : "") + char, false);
    else put(char, false);
  }
  return out;
}

export const visible = (token: string): string => runs(token).map((run) => run.text).join("");

/** The token without the spaces at its ends, for running text and narrow labels. */
export function bare(token: string): string {
  const text = token.trim();
  return text ? visible(text) : visible(token);
}

export function digits(x: number): string {
  if (x === 0) return "0";
  return Math.abs(x) < 0.0005 ? x.toExponential(1) : x.toFixed(3);
}

export function percent(x: number): string {
  return `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)}%`;
}

export const count = (x: number): string => x.toLocaleString("en");
