// A koff bundle in JavaScript, on onnxruntime-node or onnxruntime-web: tokens in, tokens out, memories swapped.
//
// JavaScript's ONNX Runtime fills no optional inputs, so this takes the graphs that `export.onnx.javascript: true`
// writes (onnx/model_js.onnx), where every slot of a memory is an ordinary input. Memories are read from the bundle's
// own files, memories/<domain>/.

const text = new TextDecoder();

/** Tensors of a safetensors file: name -> {shape, data: Float32Array}. */
function readSafetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const size = Number(view.getBigUint64(0, true));
  if (size > bytes.byteLength - 8) throw new Error("a safetensors file is truncated: fetch it again");
  const header = JSON.parse(text.decode(bytes.subarray(8, 8 + size)));
  const tensors = {};
  for (const [name, told] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (told.dtype !== "F32") throw new Error(`${name} is ${told.dtype}: memories are float32`);
    const [begin, end] = told.data_offsets.map((at) => at + 8 + size);
    if (end > bytes.byteLength) throw new Error("a safetensors file is truncated: fetch it again");
    tensors[name] = { shape: told.shape, data: new Float32Array(bytes.slice(begin, end).buffer) };
  }
  return tensors;
}

/** [rows, columns] to [columns, rows], every number times `scale`. */
function transposed({ shape: [rows, columns], data }, scale) {
  const turned = new Float32Array(data.length);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) turned[j * rows + i] = scale * data[i * columns + j];
  return [turned, [columns, rows]];
}

export class Bundle {
  /**
   * @param ort The module onnxruntime-node or onnxruntime-web.
   * @param read async (path in the bundle) => Uint8Array.
   * @param session An ort.InferenceSession of one of the manifest's graph.javascript.
   */
  constructor(ort, read, manifest, session) {
    Object.assign(this, { ort, read, manifest, session });
    this.memories = new Map();
  }

  static async open(ort, read, createSession, precision = "fp32") {
    const manifest = JSON.parse(text.decode(await read("koff.json")));
    const graphs = manifest.graph?.javascript ?? {};
    const path = Object.hasOwn(graphs, precision) && graphs[precision];
    if (!path) throw new Error(`the bundle has no JavaScript graph in ${precision}: export.onnx.javascript: true makes one`);
    // int8 weights become float32 when the graph is opened; int8_dynamic, of the same file, computes in 8 bits
    const options = precision === "int8" ? { extra: { session: { disable_quant_qdq: "1" } } } : {};
    return new Bundle(ort, read, manifest, await createSession(path, options));
  }

  /** The inputs that a memory fills; those of no memory are empty. */
  async slots(name) {
    const key = name ?? "";
    if (this.memories.has(key)) return this.memories.get(key);
    const { ort, manifest } = this, { kv_heads, head_dim, inputs } = manifest.graph;
    const feeds = {};
    kv_heads.forEach((heads, i) => {
      for (const kind of ["key", "value"])
        feeds[`memory.${i}.${kind}`] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, head_dim]);
    });
    const found = { lora: {}, kv: {} };
    if (name != null) {
      if (!Object.hasOwn(manifest.domains, name))
        throw new Error(`the bundle has no memory ${name}; it has ${Object.keys(manifest.domains).join(", ")}`);
      const told = manifest.domains[name];
      if (told.lora_rank) found.lora = readSafetensors(await this.read(`${told.peft}/adapter_model.safetensors`));
      if (told.kv_tokens) found.kv = readSafetensors(await this.read(`${told.peft}/kv.safetensors`));
      for (const [tensor, { shape, data }] of Object.entries(found.kv))
        feeds[tensor.replace("layers.", "memory.")] = new ort.Tensor("float32", data, [1, ...shape]);
    }
    const widths = this.#widths();
    for (const input of inputs.filter((i) => i.endsWith(".lora_A.weight") || i.endsWith(".lora_B.weight"))) {
      const tensor = found.lora[`base_model.model.${input}`], isA = input.includes(".lora_A.");
      const told = manifest.domains[name];
      if (tensor) {
        const [data, shape] = transposed(tensor, isA ? 1 : told.lora_alpha / told.lora_rank);
        feeds[input] = new ort.Tensor("float32", data, shape);
      } else {
        feeds[input] = new ort.Tensor("float32", new Float32Array(0), isA ? [widths[input], 0] : [0, widths[input]]);
      }
    }
    // a graph with a memory baked in has no slots, and the browser's runtime refuses what it does not know
    for (const slot of Object.keys(feeds)) if (!this.session.inputNames.includes(slot)) delete feeds[slot];
    this.memories.set(key, feeds);
    return feeds;
  }

  /** The fixed side of every LoRA slot, from the graph's own description of its inputs. */
  #widths() {
    const widths = {};
    for (const told of this.session.inputMetadata)
      if (told.name.includes(".lora_")) widths[told.name] = told.shape.find((size) => typeof size === "number");
    return widths;
  }

  /** Greedy tokens after `ids` (which begin with the manifest's `bos`, where it has one), until one of the manifest's eos (left out) or `most` of them. */
  async generate(ids, memory = null, most = 24) {
    const { ort, manifest, session } = this, { kv_heads, head_dim, vocab_size } = manifest.graph;
    const fixed = await this.slots(memory), answer = [];
    let past = {}, length = 0, pending = ids;
    kv_heads.forEach((heads, i) => {
      for (const kind of ["key", "value"])
        past[`past_key_values.${i}.${kind}`] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, head_dim]);
    });
    const whole = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    while (answer.length < most) {
      const positions = pending.map((_, n) => length + n);
      length += pending.length;
      const out = await session.run({
        ...fixed, ...past, input_ids: whole(pending), position_ids: whole(positions),
        attention_mask: whole(new Array(length).fill(1)),
      });
      for (const name of Object.keys(past)) past[name] = out[name.replace("past_key_values", "present")];
      const logits = out.logits.data.subarray((pending.length - 1) * vocab_size);
      let best = 0;
      for (let token = 1; token < vocab_size; token++) if (logits[token] > logits[best]) best = token;
      if (manifest.eos.includes(best)) break;
      answer.push(best);
      pending = [best];
    }
    return answer;
  }
}
