/* The whole graph in small: how much flows through each place, and the part in view. */
import { useLayoutEffect, useRef } from "preact/hooks";
import { clamped } from "./layout";
import type { Box, View } from "./layout";
import type { Scene } from "./paint";

const SIZE = { width: 168, height: 76 };

interface Props { scene: Scene; view: View; box: Box; onMove: (view: View) => void }

export function Minimap({ scene, view, box, onMove }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const { layout, graph, pruned, theme } = scene;
  const whole = layout.width * view.sx <= box.width && layout.height * view.sy <= box.height;
  useLayoutEffect(() => {
    const pen = canvas.current?.getContext("2d");
    if (!pen) return;
    const { width, height } = SIZE;
    const sum = new Float64Array(width * height);
    for (let node = 0; node < graph.nodes; node++) {
      if (!pruned.reached[node]) continue;
      const x = Math.min(width - 1, Math.floor((layout.x[node % graph.T]! / layout.width) * width));
      const y = Math.min(height - 1, Math.floor((layout.y[Math.floor(node / graph.T)]! / layout.height) * height));
      sum[y * width + x]! += 0.02 + pruned.flow[node]!;
    }
    const image = pen.createImageData(width, height), [r, g, b] = theme.heat;
    for (let i = 0; i < sum.length; i++) {
      image.data.set([r, g, b, Math.min(255, 255 * Math.sqrt(sum[i]!))], 4 * i);
    }
    pen.putImageData(image, 0, 0);
  }, [scene, whole]);
  if (whole || box.width < 420) return null;
  const kx = SIZE.width / (layout.width * view.sx), ky = SIZE.height / (layout.height * view.sy);
  const left = Math.max(0, -view.tx * kx), top = Math.max(0, -view.ty * ky);
  const frame = {
    left: `${left}px`, top: `${top}px`,
    width: `${Math.max(3, Math.min(SIZE.width, (box.width - view.tx) * kx) - left)}px`,
    height: `${Math.max(3, Math.min(SIZE.height, (box.height - view.ty) * ky) - top)}px`,
  };
  const go = (event: PointerEvent): void => {
    event.stopPropagation();
    if (!(event.buttons & 1)) return;
    const at = canvas.current!.getBoundingClientRect();
    const x = (event.clientX - at.left) / kx, y = (event.clientY - at.top) / ky;
    onMove(clamped({ ...view, tx: box.width / 2 - x, ty: box.height / 2 - y }, layout, box));
  };
  const down = (event: PointerEvent): void => {
    (event.currentTarget as Element).setPointerCapture(event.pointerId);
    go(event);
  };
  return (
    <div class="minimap" aria-hidden="true" style={{ width: `${SIZE.width}px`, height: `${SIZE.height}px` }}
      onPointerDown={down} onPointerMove={go} onPointerUp={(event) => event.stopPropagation()}>
      <canvas ref={canvas} width={SIZE.width} height={SIZE.height} />
      <i style={frame} />
    </div>
  );
}
