// Token ids begin with koff.json's `bos`, where it has one; @huggingface/transformers makes them of tokenizer.json.
// node node.mjs BUNDLE MEMORY TOKEN,TOKEN,… [PRECISION]      (npm install onnxruntime-node; MEMORY none: the backbone)
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import ort from "onnxruntime-node";
import { Bundle } from "./koff.mjs";

const [folder, memory, tokens = "", precision = "fp32"] = process.argv.slice(2);
try {
  if (!/^\d+(,\d+)*$/.test(tokens)) throw new Error("usage: node node.mjs BUNDLE MEMORY TOKEN,TOKEN,… [PRECISION]");
  const bundle = await Bundle.open(
    ort,
    async (path) => new Uint8Array(await readFile(join(folder, path))),
    (path, options) => ort.InferenceSession.create(join(folder, path), options),
    precision,
  );
  const ids = tokens.split(",").map(Number), { vocab_size } = bundle.manifest.graph;
  if (ids.some((id) => id >= vocab_size)) throw new Error(`tokens: the model knows those below ${vocab_size} alone`);
  console.log((await bundle.generate(ids, memory === "none" ? null : memory)).join(" "));
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exit(2);
}
