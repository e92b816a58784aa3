// The self-check of a bundle: does this machine's ONNX Runtime compute what the bundle's makers measured, does rolling
// back work, and how long does a frame take?

import { EdificeError } from './edifice.mjs';
import { ARRAYS, framesOf, numbersOf, volume } from './tensors.mjs';

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
  for (const graph of ['window', 'stream', 'prefill'].filter((name) => bundle.has(name))) {
    const { errors, worst } = await compareAll(model, graph, progress);
    const error = Math.max(...errors);
    if (!(error <= limit)) problems.push(`${worst} is off by ${error.toExponential(1)}, and ${limit} is allowed`);
    graphs.push({ graph, tensors: errors.length, error });
  }
  const batch = bundle.has('stream') && bundle.manifest.sizes[bundle.batch];
  const stream = batch ? await model.stream({ batch, history: ROLLBACKS }) : null;
  const rollbacks = stream ? await rollBack(stream, problems, progress) : 0;
  const refused = await refusal(model, stream, problems);
  for (const entry of graphs) Object.assign(entry, await latency(model, stream, entry.graph, frames, progress));
  const states = stream?.location ?? null;
  stream?.release();
  return {
    language,
    runtime: ort.env.versions.node ?? ort.env.versions.web,
    provider,
    program: bundle.manifest.program.name,
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
  const { bundle } = model;
  const errors = [];
  let worst = '';
  const add = (error, what) => {
    if (!(error <= Math.max(...errors))) worst = what;
    errors.push(error);
  };
  for await (const { folder, inputs, outputs } of bundle.testData(graph)) {
    await progress(folder);
    const results = await model.runGraph(graph, model.tensors(inputs));
    for (const [name, expected] of Object.entries(outputs)) add(await difference([[results[name], expected]]), name);
  }
  const longer = graph === 'stream' ? await bundle.testSequence() : null;
  if (longer) {
    await progress(longer.folder);
    for (const [name, pairs] of await sequencePairs(model, longer)) {
      add(Math.max(await difference(pairs.steps), await difference(pairs.prefill)), `${name} of ${longer.folder}`);
    }
  }
  return { errors, worst: `${graph}: ${worst}` };
}

/** What a stream gives from its start, frame by frame and all at once, and what is right: pairs by output name. */
async function sequencePairs(model, { inputs, outputs }) {
    const pairs = new Map(Object.keys(outputs).map((name) => [name, { steps: [], prefill: [] }]));
  const add = (found, way, t) => {
    for (const [name, { [way]: list }] of pairs) list.push([found[name], frameOf(outputs[name], t)]);
  };
  const inOrder = model.bundle.own('stream').inputs.map(({ name }) => inputs[name]);
  const [batch, length] = inOrder[0].dims;
  const stream = await model.stream({ batch, history: 0 });
  for (let t = 0; t < length; t++) {
    add(await stream.step(inOrder.map((tensor) => frameOf(tensor, t))), 'steps', t);
  }
  stream.reset();
  if (model.bundle.has('prefill')) add(await stream.prefill(inOrder), 'prefill', length - 1);
  stream.release();
  return pairs;
}

function frameOf(tensor, t) {
  const { type, dims: [batch, , ...rest], data } = framesOf(tensor, t, t + 1);
  return { type, dims: [batch, ...rest], data };
}

/**
 * max |found - expected| / max(1, max |expected|) of all pairs together; integers must be equal; infinite for another
 * type or shape, or a NaN.
 */
async function difference(pairs) {
  let error = 0;
  let scale = 1;
  for (const [found, expected] of pairs) {
    if (found.type !== expected.type || String(found.dims) !== String(expected.dims)) return Infinity;
    const data = found.getData ? await found.getData(true) : found.data; // from the GPU, if it is there
    if (!expected.type.startsWith('float')) {
      if (!sameBytes(data, expected.data)) return Infinity;
      continue;
    }
    const [numbers, right] = [numbersOf(data), numbersOf(expected.data)];
    for (let i = 0; i < numbers.length; i++) {
      const apart = Math.abs(numbers[i] - right[i]);
      if (Number.isNaN(apart)) return Infinity; // a NaN is greater than nothing, and would be overlooked
      error = Math.max(error, apart);
      scale = Math.max(scale, Math.abs(right[i]));
    }
  }
  return error / scale;
}

/** Goes on from random frames, back, and on again: the same frames must give the same bits. */
async function rollBack(stream, problems, progress) {
  await progress('rollback');
  const { bundle } = stream.model;
  const random = randomNumbers(1);
  const someFrames = (count) => Array.from({ length: count }, () => drawAll(bundle, 'stream', random));
  const play = async (frames) => {
    const outputs = [];
    for (const frame of frames) outputs.push(...Object.values(await stream.step(frame)));
    return outputs;
  };
  for (let n = 1; n <= ROLLBACKS; n++) {
    await play(someFrames(random.integer(12)));
    const frames = someFrames(1 + random.integer(ROLLBACKS));
    const mark = stream.snapshot();
    const first = await play(frames);
    stream.restore(mark);
    mark.release();
    const second = await play(frames);
    const back = 1 + random.integer(frames.length);
    stream.rewind(back);
    const third = await play(frames.slice(-back));
    if (!sameBits(first, second)) problems.push(`rollback ${n}: the stream gives other bits when restored`);
    if (!sameBits(first.slice(-third.length), third)) {
      problems.push(`rollback ${n}: the stream gives other bits when rewound`);
    }
  }
  return ROLLBACKS;
}

/** What the library says to an input that lacks a number. */
async function refusal(model, stream, problems) {
  const inputs = drawAll(model.bundle, stream ? 'stream' : 'window', randomNumbers(3));
  inputs[0].data = inputs[0].data.slice(1);
  try {
    if (stream) await stream.step(inputs);
    else await model.run(inputs);
  } catch (error) {
    if (error instanceof EdificeError) return error.message;
    throw error;
  }
  problems.push('an input that lacks a number was not refused');
  return null;
}

/** Milliseconds of a frame, or of a window. Where states grow, a frame is that after a window's. */
async function latency(model, stream, graph, frames, progress) {
  const inputs = drawAll(model.bundle, graph, randomNumbers(2));
  const run = {
    window: () => model.run(inputs),
    stream: () => stream.step(inputs),
    prefill: () => stream.prefill(inputs),
  }[graph];
  const count = graph === 'stream' ? frames : Math.max(20, Math.floor(frames / 50));
  const times = [];
  const mark = graph !== 'window' && model.bundle.grows ? await afterAWindow(stream) : null;
  for (let i = 0; i < 3; i++) await run(); // the first runs make buffers, and compile shaders
  for (let i = 0; i < count; i++) {
    if (i % 10 === 0) await progress(`timing ${graph}`);
    if (mark) stream.restore(mark);
    const start = performance.now();
    await run();
    times.push(performance.now() - start);
  }
  mark?.release();
  times.sort((a, b) => a - b);
  const quantile = (part) => times[Math.ceil(count * part) - 1];
  return { p50_ms: quantile(0.5), p99_ms: quantile(0.99), max_ms: times.at(-1) };
}

async function afterAWindow(stream) {
  const { bundle } = stream.model;
  const frame = drawAll(bundle, 'stream', randomNumbers(4));
  stream.reset();
  for (let i = 0; i < bundle.windowSize; i++) await stream.step(frame);
  return stream.snapshot();
}

function sameBits(first, second) {
  return first.length === second.length && first.every((tensor, i) => sameBytes(tensor.data, second[i].data));
}

function sameBytes(first, second) {
  const [a, b] = [first, second].map(({ buffer, byteOffset, byteLength }) => {
    return new Uint8Array(buffer, byteOffset, byteLength);
  });
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}

/** All inputs of a graph, in order, for the sizes that the graphs are made for. */
function drawAll(bundle, graph, random) {
  return bundle.own(graph).inputs.map((spec) => draw(spec, bundle.manifest.sizes, random));
}

/** A tensor of the kind of values that an input holds. */
function draw({ dtype, shape, values: { kind, below } }, sizes, random) {
  const dims = shape.map((size) => sizes[size] ?? size);
  const hidden = random.integer(dims.at(-1) ?? 1); // of a mask: zeros, and then ones
  const number = {
    normal: dtype === 'float16' ? random.half : random.number,
    ids: () => random.integer(below),
    integers: () => random.integer(below),
    mask: (i) => Number(i % dims.at(-1) >= hidden),
  }[kind];
  const whole = dtype === 'int64' ? BigInt : Number;
  return { data: ARRAYS[dtype][0].from({ length: volume(dims) }, (_, i) => whole(number(i))), dims };
}

/** Random numbers that are the same in every run. */
function randomNumbers(seed) {
  let state = seed;
  const next = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  const integer = (limit) => Math.floor(next() * limit);
  return {
    integer,
    number: () => 2 * next() - 1,
    half: () => 0x3800 | integer(1024) | (integer(2) << 15), // the bits of a number between 0.5 and 1, or negative
  };
}
