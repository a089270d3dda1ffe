// node node.mjs BUNDLE MEMORY TOKEN,TOKEN,… [PRECISION]      (npm install onnxruntime-node; MEMORY none: the backbone)
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import ort from "onnxruntime-node";
import { Bundle } from "./koff.mjs";

const [folder, memory, tokens, precision = "fp32"] = process.argv.slice(2);
const bundle = await Bundle.open(
  ort,
  async (path) => new Uint8Array(await readFile(join(folder, path))),
  (path, options) => ort.InferenceSession.create(join(folder, path), options),
  precision,
);
console.log((await bundle.generate(tokens.split(",").map(Number), memory === "none" ? null : memory)).join(" "));
