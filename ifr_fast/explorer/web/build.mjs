/* Builds ifr_fast/export/explorer.js: one script, its styles inside. `--check` compares instead. */
import { readFile, writeFile } from "node:fs/promises";
import * as esbuild from "esbuild";

const target = new URL("../../export/explorer.js", import.meta.url);

const styles = {
  name: "styles",
  setup(build) {
    build.onLoad({ filter: /\.css$/ }, async ({ path }) => {
      const { code } = await esbuild.transform(await readFile(path, "utf8"), { loader: "css", minify: true });
      return { contents: code, loader: "text" };
    });
  },
};

const { outputFiles } = await esbuild.build({
  absWorkingDir: new URL(".", import.meta.url).pathname,
  entryPoints: ["src/index.tsx"],
  bundle: true,
  minify: true,
  format: "iife",
  globalName: "ifrExplorer",
  target: "es2022",
  charset: "ascii", // every page holds it, whatever its encoding
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none",
  plugins: [styles],
  write: false,
});
const banner = "/* Built from ifr_fast/explorer/web by `make web`; holds Preact (MIT licence). */\n";
const built = banner + outputFiles[0].text;
if (/<\/script|<!--/i.test(built)) throw new Error("the script could end the element that holds it");
if (/[^\x00-\x7f]/.test(built)) throw new Error("a regular expression holds other characters than ASCII");
if (process.argv.includes("--check")) {
  if ((await readFile(target, "utf8").catch(() => "")) !== built) {
    console.error("ifr_fast/export/explorer.js is not what its sources give; run `make web`");
    process.exit(1);
  }
} else {
  await writeFile(target, built);
  console.log(`${built.length} bytes`);
}
