// node node_extra.mjs DIR BUNDLE OVERFLOWING: what the JavaScript library promises beyond the self-check. The second
// bundle gives outputs beyond float32.

import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

import { ensure, refusing } from './ensure.mjs';

const [dir, folder, overflowing] = process.argv.slice(2);
const load = (file) => import(pathToFileURL(path.join(dir, file)));
const ort = createRequire(path.join(dir, 'node/main.mjs'))('onnxruntime-node');
const { Bundle, CheckError, MAX_MAGNITUDE, Model, RequestError, printable } = await load('javascript/edifice.mjs');
const { parseTensor } = await load('javascript/tensor_file.mjs');
const { openFolder } = await load('node/folder.mjs');

const bundle = await Bundle.open(folder, await openFolder(folder));
const model = new Model(bundle, ort);
const width = bundle.graph('stream').inputs[0].shape[1];

const refuses = refusing(RequestError);

const frame = (seed, size = width) => Float32Array.from({ length: size }, (_, i) => Math.sin(seed * 12.9 + i * 78.2));
const apart = (a, b) => Math.max(...a.map((number, i) => Math.abs(number - b[i])));
const same = (a, b) => a.length === b.length && a.every((number, i) => Object.is(number, b[i]));

async function refusals() {
  const stream = await model.stream({ history: 3 });
  const twin = await model.stream();
  for (let t = 0; t < 5; t++) {
    await stream.step(frame(t));
    await twin.step(frame(t));
  }
  const released = stream.snapshot();
  released.release();
  const other = new Model(bundle, ort);
  const foreign = (await other.stream()).snapshot();
  const nan = frame(0);
  nan[1] = NaN;
  await refuses(() => stream.step(frame(0, width + 1)), `${width + 1} numbers, and the model takes ${width}`);
  await refuses(() => stream.step(nan), 'NaN at [0, 1]');
  for (const value of [3.4e38, -3.4e38, 1e30, 1e19, -1e18, 1.001e12]) {
    const large = frame(0, 3 * width);
    large[3 * width - 1] = value;
    await refuses(() => stream.step(large.slice(2 * width)), `at [0, ${width - 1}]; numbers up to 1e12`);
    await refuses(() => stream.prefill(large, [1, 3, width]), `at [0, 2, ${width - 1}]; numbers up to 1e12`);
    await refuses(() => model.run(large, [1, 3, width]), `at [0, 2, ${width - 1}]; numbers up to 1e12`);
  }
  await refuses(() => stream.step(Array.from(frame(0))), 'typed array');
  await refuses(() => stream.prefill(frame(0, 2 * width), [2, 1, width]), 'batch is 2, and that of the stream is 1');
  await refuses(() => stream.prefill(frame(0), [1, 2, width]), `${width} numbers, and the model takes ${2 * width}`);
  await refuses(() => stream.prefill(frame(0)), 'give its dims');
  await refuses(() => stream.rewind(4), 'history holds 3');
  await refuses(() => stream.restore(released), 'was released');
  await refuses(() => stream.restore(foreign), 'restore it where it was taken');
  await refuses(() => stream.restore({}), 'what snapshot gave');
  const running = stream.step(frame(5));
  await refuses(() => stream.step(frame(5)), 'await each call');
  await refuses(() => stream.rewind(1), 'await each call');
  ensure(same(await running, await twin.step(frame(5))), 'a refused call leaves the stream as it was');
  ensure(same(await stream.step(frame(6)), await twin.step(frame(6))), 'and what comes after it');
  await other.release();
  await stream.step(frame(7).map(Math.sign).map((sign) => sign * MAX_MAGNITUDE));
  console.log('node: wrong calls and numbers too large are refused, and leave the stream as it was');
}

async function overflow() {
  const large = new Model(await Bundle.open(overflowing, await openFolder(overflowing)), ort);
  const stream = await large.stream();
  await refuses(() => large.run(frame(0), [1, 1, width]), 'output is not finite', CheckError);
  await refuses(() => stream.step(frame(0)), 'the stream stays where it was', CheckError);
  await refuses(() => stream.prefill(frame(0), [1, 1, width]), 'the stream stays where it was', CheckError);
  ensure(stream.rewindable === 0, 'an output that is not finite leaves the stream as it was');
  console.log('node: an output that is not finite is not handed out, and the stream stays where it was');
}

function escapes() {
  const raw = 'a\x1b[2J\x7f\x9b\u202e\u2028 größe 一 😀\ud800';
  const shown = String.raw`a\u001b[2J\u007f\u009b\u202e\u2028 größe 一 😀\ud800`;
  ensure(printable(raw) === shown, `escapes what moves or hides text, got ${printable(raw)}`);
  ensure(JSON.parse(printable(JSON.stringify({ raw }))).raw === raw, 'and JSON stays the same');
}

async function runtimes() {
  const of = (versions) => new Model(bundle, { env: { versions } });
  for (const old of ['1.23.2', '1.9.0', '0.25.0', '1.23.0-dev.20260114', undefined]) {
    await refuses(() => of({ common: '1.30.0', node: old }), `ONNX Runtime ${old} is older than 1.24`);
    await refuses(() => of({ common: '1.30.0', web: old }), `ONNX Runtime ${old} is older than 1.24`);
  }
  for (const right of ['1.24.1', '1.100.0', '2.0.0']) {
    of({ node: right });
    of({ web: right });
  }
  console.log('node: an ONNX Runtime below 1.24 is refused');
}

async function damagedModel() {
  const read = await openFolder(folder);
  const changing = async (file) => {
    const bytes = await read(file);
    return file === 'stream/model.onnx' ? bytes.map((byte, i) => (i === 1000 ? byte ^ 1 : byte)) : bytes;
  };
  const damaged = new Model(await Bundle.open(folder, changing), ort);
  await refuses(() => damaged.stream(), "'stream/model.onnx' was changed", CheckError);
  const losing = async (file) => (file === 'stream/model.onnx' ? null : read(file));
  const lacking = new Model(await Bundle.open(folder, losing), ort);
  await refuses(() => lacking.stream(), "'stream/model.onnx' is missing", CheckError);
  console.log('node: a model that was changed or is missing is not opened');
}

async function batches() {
  const streams = [];
  for (let b = 0; b < 3; b++) streams.push(await model.stream());
  const together = await model.stream({ batch: 3 });
  for (let t = 0; t < 30; t++) {
    const frames = [0, 1, 2].map((b) => frame(t * 3 + b));
    const joined = await together.step(Float32Array.from(frames.flatMap((numbers) => [...numbers])));
    for (const [b, stream] of streams.entries()) {
      const alone = await stream.step(frames[b]);
      const size = alone.length;
      ensure(apart(alone, joined.slice(b * size, (b + 1) * size)) < 1e-5, 'a stream among three is as one alone');
    }
  }
  console.log('node: three streams side by side are as three alone');
}

async function prefills() {
  const length = 1500; // more than is handed over at once
  const frames = frame(1, 2 * length * width);
  const steps = await model.stream({ batch: 2 });
  const whole = await model.stream({ batch: 2 });
  let last;
  for (let t = 0; t < length; t++) {
    const at = (b) => frames.subarray((b * length + t) * width, (b * length + t + 1) * width);
    last = await steps.step(Float32Array.from([...at(0), ...at(1)]));
  }
  const found = await whole.prefill(frames, [2, length, width]);
  ensure(apart(last, found) < 1e-4, `a prefill of ${length} frames is what as many steps give`);
  const mark = whole.snapshot();
  const next = await whole.step(frame(3, 2 * width));
  whole.rewind(2); // the frame and, as one, the prefill
  ensure(whole.rewindable === 0, 'a prefill is one place in the history');
  whole.restore(mark);
  ensure(same(next, await whole.step(frame(3, 2 * width))), 'a snapshot outlives a rewind');
  whole.reset();
  const fresh = await model.stream({ batch: 2 });
  ensure(same(await whole.step(frame(4, 2 * width)), await fresh.step(frame(4, 2 * width))), 'reset goes to the start');
  console.log(`node: a prefill of ${length} frames is what as many steps give; rewind and reset go over it`);
}

/** A prefill graph that takes 5 frames at once is given 12 in three pieces. */
async function pieces() {
  const limited = await Bundle.open(folder, await openFolder(folder));
  limited.graph('prefill').limits = { sequence: [1, 5] };
  const inPieces = new Model(limited, ort);
  const lengths = [];
  inPieces.runGraph = (graph, feeds) => {
    lengths.push(feeds[limited.graph('prefill').inputs[0].name].dims[1]);
    return Model.prototype.runGraph.call(inPieces, graph, feeds);
  };
  const frames = frame(5, 12 * width);
  const found = await (await inPieces.stream()).prefill(frames, [1, 12, width]);
  const right = await (await model.stream()).prefill(frames, [1, 12, width]);
  ensure(String(lengths) === '5,5,2' && apart(found, right) < 1e-5, `12 frames as 5, 5 and 2, got ${lengths}`);
  console.log('node: a prefill in pieces is as one');
}

async function tensorFiles() {
  const [set] = bundle.graph('stream').test_data;
  const sound = await readFile(path.join(folder, set, 'input_0.pb'));
  let refused = 0;
  let state = 1;
  const random = (limit) => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) % limit;
  for (let n = 0; n < 20000; n++) {
    const damaged = new Uint8Array(sound);
    for (let i = 0; i <= n % 3; i++) damaged[random(40)] = random(256);
    try {
      parseTensor(damaged.subarray(0, n % 2 ? damaged.length : random(damaged.length)));
    } catch (error) {
      ensure(error.constructor === Error, `a damaged tensor is refused as one, got ${error.stack}`);
      refused++;
    }
  }
  console.log(`node: ${refused} of 20000 damaged tensor files are refused, none is read beyond its end`);
}

await refusals();
await runtimes();
await overflow();
escapes();
await damagedModel();
await batches();
await prefills();
await pieces();
await tensorFiles();
