/* A pen that writes SVG: what is drawn on the canvas, as shapes. */
import type { Pen } from "./paint";

const number = (x: number): string => String(Math.round(x * 100) / 100);
const escaped = (text: string): string =>
  text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`)
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ud800-\udfff\ufffe\uffff]/gu, "\ufffd");

export class SvgPen implements Pen {
  strokeStyle = "#000";
  fillStyle = "#000";
  lineWidth = 1;
  globalAlpha = 1;
  private dash = "";
  private d: string[] = [];
  private readonly out: string[] = [];

  constructor(private readonly dx: number, private readonly dy: number) {}

  private point(x: number, y: number): string {
    return `${number(x + this.dx)} ${number(y + this.dy)}`;
  }
  beginPath(): void { this.d = []; }
  moveTo(x: number, y: number): void { this.d.push(`M${this.point(x, y)}`); }
  lineTo(x: number, y: number): void { this.d.push(`L${this.point(x, y)}`); }
  bezierCurveTo(a: number, b: number, c: number, d: number, x: number, y: number): void {
    this.d.push(`C${this.point(a, b)} ${this.point(c, d)} ${this.point(x, y)}`);
  }
  arc(x: number, y: number, r: number): void { // whole circles only
    const size = `${number(r)} ${number(r)} 0 1 1`;
    this.d.push(`M${this.point(x + r, y)}A${size} ${this.point(x - r, y)}A${size} ${this.point(x + r, y)}Z`);
  }
  rect(x: number, y: number, width: number, height: number): void {
    this.d.push(`M${this.point(x, y)}h${number(width)}v${number(height)}h${number(-width)}Z`);
  }
  setLineDash(dash: number[]): void { this.dash = dash.map(number).join(" "); }
  stroke(): void {
    if (!this.d.length) return;
    const dash = this.dash ? ` stroke-dasharray="${this.dash}"` : "";
    this.out.push(`<path fill="none" stroke="${this.strokeStyle}" stroke-width="${number(this.lineWidth)}" ` +
      `stroke-opacity="${number(this.globalAlpha)}" stroke-linecap="round"${dash} d="${this.d.join("")}"/>`);
  }
  fill(): void {
    if (this.d.length) this.out.push(`<path fill="${this.fillStyle}" fill-opacity="${number(this.globalAlpha)}" d="${this.d.join("")}"/>`);
  }
  text(x: number, y: number, text: string, colour: string, size: number, options: { anchor?: string; turn?: boolean; weight?: number } = {}): void {
    const turn = options.turn ? ` transform="rotate(-90 ${number(x)} ${number(y)})"` : "";
    this.out.push(`<text x="${number(x)}" y="${number(y)}" fill="${colour}" font-size="${size}" ` +
      `font-weight="${options.weight ?? 400}" text-anchor="${options.anchor ?? "middle"}"${turn}>${escaped(text)}</text>`);
  }
  box(x: number, y: number, width: number, height: number, colour: string, opacity: number): void {
    this.out.push(`<rect x="${number(x)}" y="${number(y)}" width="${number(width)}" height="${number(height)}" rx="4" fill="${colour}" fill-opacity="${number(opacity)}"/>`);
  }
  document(width: number, height: number, background: string, title: string): string {
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${number(width)}" height="${number(height)}" ` +
      `viewBox="0 0 ${number(width)} ${number(height)}" font-family="system-ui, sans-serif">` +
      `<title>${escaped(title)}</title><rect width="100%" height="100%" fill="${background}"/>${this.out.join("")}</svg>\n`;
  }
}
