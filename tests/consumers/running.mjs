// Run one ONNX file in onnxruntime-node or in onnxruntime-web's WebAssembly, as running.py does: PACKAGE FILE INPUTS OUTPUTS,
// the last two plain float32 of [N, 1, 16, 16] and [N, classes].
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [name, file, inputs, outputs] = process.argv.slice(2);
const found = createRequire(join(process.cwd(), "package.json")).resolve(name);
const loaded = await import(pathToFileURL(found).href);
const ort = loaded.default ?? loaded;
if (name === "onnxruntime-web") ort.env.wasm.numThreads = 1;
const provider = name === "onnxruntime-web" ? "wasm" : "cpu";
const bytes = readFileSync(inputs);
const x = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
try {
  const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(file)), { executionProviders: [provider] });
  const { output } = await session.run({ input: new ort.Tensor("float32", x, [x.length / 256, 1, 16, 16]) });
  writeFileSync(outputs, Buffer.from(output.data.buffer, output.data.byteOffset, output.data.byteLength));
} catch (error) {
  console.error(error.message); // not its stack, which begins with the whole of a minified file
  process.exit(1);
}
process.exit(0);
