// The self-check of a bundle: does this machine's ONNX Runtime compute what the bundle's makers measured, does rolling
// back work, and how long does a frame take?

import { EdificeError } from './edifice.mjs';

const ROLLBACKS = 20;
const TOLERANCES = { webgpu: 1e-3 }; // GPUs round otherwise, and add in another order
const TOLERANCE = 1e-5;

/**
 * @param {Model} model
 * @param {string} options.language what the report calls this program
 * @param {number} options.frames how many steps are timed
 * @param {(what: string) => Promise<void>} options.progress is called and awaited before each piece of work
 * @returns {Promise<object>} what --json prints, and `problems`: a text for each check that failed
 * @throws {EdificeError} the bundle is damaged, or the provider can't be had
 */
export async function selfCheck(model, { language, frames = 10000, progress = async () => {} }) {
  const { bundle, ort, provider } = model;
  const problems = [];
  const limit = TOLERANCES[provider] ?? TOLERANCE;
  await progress('files');
  await bundle.checkFiles();
  const graphs = [];
  for (const graph of ['window', 'stream', 'prefill']) {
    if (!Object.hasOwn(bundle.manifest.graphs, graph)) continue;
    const { errors, worst } = await compareAll(model, graph, progress);
    const error = Math.max(...errors);
    if (!(error <= limit)) problems.push(`${worst} is off by ${error.toExponential(1)}, and ${limit} is allowed`);
    graphs.push({ graph, tensors: errors.length, error });
  }
  const streams = Object.hasOwn(bundle.manifest.graphs, 'stream');
  const stream = streams ? await model.stream({ history: ROLLBACKS }) : null;
  const rollbacks = streams ? await rollBack(stream, problems, progress) : 0;
  const refused = await refusal(model, stream, problems);
  for (const entry of graphs) Object.assign(entry, await latency(model, stream, entry.graph, frames, progress));
  const states = stream?.location ?? null;
  stream?.release();
  return {
    language,
    runtime: ort.env.versions.node ?? ort.env.versions.web,
    provider,
    architecture: bundle.manifest.architecture,
    states, // where they are kept: 'cpu' or 'gpu-buffer'
    limit,
    rollbacks,
    refused,
    graphs,
    ok: problems.length === 0,
    problems,
  };
}

/** The error of each output of each test data set of a graph and, of a stream, of its longer test. */
async function compareAll(model, graph, progress) {
  const { bundle, ort } = model;
  const errors = [];
  let worst = '';
  const add = (error, what) => {
    if (!(error <= Math.max(...errors))) worst = what;
    errors.push(error);
  };
  for await (const { folder, inputs, outputs } of bundle.testData(graph)) {
    await progress(folder);
    const feeds = {};
    for (const [name, { type, data, dims }] of Object.entries(inputs)) feeds[name] = new ort.Tensor(type, data, dims);
    const results = await model.runGraph(graph, feeds);
    for (const [name, expected] of Object.entries(outputs)) add(await difference(results[name], expected), name);
  }
  const longer = bundle.graph(graph).test_sequence;
  if (longer) {
    await progress(longer.folder);
    const frames = await bundle.tensor(`${longer.folder}/input_0.pb`);
    const expected = await bundle.tensor(`${longer.folder}/output_0.pb`);
    add(await sequenceDifference(model, frames, expected), longer.folder);
  }
  return { errors, worst: `${graph}: ${worst}` };
}

/** The error of a stream that is given frames [batch, sequence, size] from its start: one by one, and all at once. */
async function sequenceDifference(model, frames, expected) {
  const [batch, sequence, width] = frames.dims;
  const size = expected.dims[2];
  const stream = await model.stream({ batch, history: 0 });
  const found = new Float32Array(batch * sequence * size);
  for (let t = 0; t < sequence; t++) {
    const frame = new Float32Array(batch * width);
    for (let b = 0; b < batch; b++) {
      const start = (b * sequence + t) * width;
      frame.set(frames.data.subarray(start, start + width), b * width);
    }
    const output = await stream.step(frame);
    for (let b = 0; b < batch; b++) {
      found.set(output.subarray(b * size, (b + 1) * size), (b * sequence + t) * size);
    }
  }
  stream.reset();
  const last = await stream.prefill(frames.data, frames.dims);
  stream.release();
  const ends = Array.from({ length: batch }, (_, b) => ((b + 1) * sequence - 1) * size);
  const lasts = Float32Array.from(ends.flatMap((start) => [...expected.data.subarray(start, start + size)]));
  const [type, dims] = ['float32', [batch, size]];
  return Math.max(
    await difference({ type, dims: [batch, sequence, size], data: found }, expected),
    await difference({ type, dims, data: last }, { type, dims, data: lasts }),
  );
}

/** max |found - expected| / max(1, max |expected|); integers must be equal; infinite for another shape or a NaN. */
async function difference(found, expected) {
  const data = found.getData ? await found.getData(true) : found.data; // from the GPU, if it is there
  if (found.type !== expected.type || String(found.dims) !== String(expected.dims)) return Infinity;
  if (expected.type === 'int64') return expected.data.every((number, i) => number === data[i]) ? 0 : Infinity;
  let error = 0;
  let scale = 1;
  for (let i = 0; i < data.length; i++) {
    const apart = Math.abs(data[i] - expected.data[i]);
    if (Number.isNaN(apart)) return Infinity; // a NaN is greater than nothing, and would be overlooked
    error = Math.max(error, apart);
    scale = Math.max(scale, Math.abs(expected.data[i]));
  }
  return error / scale;
}

/** Goes on from random frames, back, and on again: the same frames must give the same bits. */
async function rollBack(stream, problems, progress) {
  await progress('rollback');
  const width = stream.model.bundle.graph('stream').inputs[0].shape[1];
  const random = randomNumbers(1);
  const play = async (frames) => {
    const outputs = [];
    for (const frame of frames) outputs.push(await stream.step(frame));
    return outputs;
  };
  for (let n = 1; n <= ROLLBACKS; n++) {
    await play(Array.from({ length: random.integer(12) }, () => random.frame(width)));
    const frames = Array.from({ length: 1 + random.integer(ROLLBACKS) }, () => random.frame(width));
    const mark = stream.snapshot();
    const first = await play(frames);
    stream.restore(mark);
    mark.release();
    const second = await play(frames);
    const back = 1 + random.integer(frames.length);
    stream.rewind(back);
    const third = await play(frames.slice(-back));
    if (!sameBits(first, second)) problems.push(`rollback ${n}: the stream gives other bits when restored`);
    if (!sameBits(first.slice(-back), third)) problems.push(`rollback ${n}: the stream gives other bits when rewound`);
  }
  return ROLLBACKS;
}

/** What the library says to a frame that is one wider than the model's. */
async function refusal(model, stream, problems) {
  const width = model.bundle.graph(stream ? 'stream' : 'window').inputs[0].shape.at(-1) + 1;
  try {
    if (stream) await stream.step(new Float32Array(width));
    else await model.run(new Float32Array(width), [1, 1, width]);
  } catch (error) {
    if (error instanceof EdificeError) return error.message;
    throw error;
  }
  problems.push('a frame one wider than the model takes was not refused');
  return null;
}

/** Milliseconds of a frame, or of a window. */
async function latency(model, stream, graph, frames, progress) {
  const length = model.bundle.manifest.options.window_size;
  const width = model.bundle.graph(graph).inputs[0].shape.at(-1);
  const random = randomNumbers(2);
  const input = random.frame(graph === 'stream' ? width : length * width);
  const run = {
    window: () => model.run(input, [1, length, width]),
    stream: () => stream.step(input),
    prefill: () => stream.prefill(input, [1, length, width]),
  }[graph];
  const count = graph === 'stream' ? frames : Math.max(20, Math.floor(frames / 50));
  const times = [];
  for (let i = 0; i < 3; i++) await run(); // the first runs make buffers, and compile shaders
  for (let i = 0; i < count; i++) {
    if (i % 10 === 0) await progress(`timing ${graph}`);
    const start = performance.now();
    await run();
    times.push(performance.now() - start);
  }
  times.sort((a, b) => a - b);
  const quantile = (part) => times[Math.ceil(count * part) - 1];
  return { p50_ms: quantile(0.5), p99_ms: quantile(0.99), max_ms: times.at(-1) };
}

function sameBits(first, second) {
  const bits = ({ buffer, byteOffset, length }) => new Uint32Array(buffer, byteOffset, length);
  return String(first.map(bits)) === String(second.map(bits));
}

/** Random numbers that are the same in every run. */
function randomNumbers(seed) {
  let state = seed;
  const next = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  return {
    integer: (limit) => Math.floor(next() * limit),
    frame: (size) => Float32Array.from({ length: size }, () => 2 * next() - 1),
  };
}
