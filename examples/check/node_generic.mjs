// node node_generic.mjs DIR BUNDLE: what the JavaScript library promises of modules of any inputs and outputs: five
// types, sizes that belong together, and a stream without a prefill. BUNDLE is handmade.py's.

import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

import { ensure, refusing } from './ensure.mjs';

const [dir, folder] = process.argv.slice(2);
const load = (file) => import(pathToFileURL(path.join(dir, file)));
const ort = createRequire(path.join(dir, 'node/main.mjs'))('onnxruntime-node');
const { Bundle, CheckError, Model, RequestError } = await load('javascript/edifice.mjs');
const { selfCheck } = await load('javascript/self_check.mjs');
const { openFolder } = await load('node/folder.mjs');
const { checkOutputs, numbersOf } = await load('javascript/tensors.mjs');

const read = await openFolder(folder);
const model = new Model(await Bundle.open(folder, read), ort);

const refuses = refusing(RequestError);

const halves = (...bits) => Uint16Array.from(bits); // 0x3c00 is 1, 0xc000 is -2
const ids = (...numbers) => BigInt64Array.from(numbers, BigInt);
const window = (changes = {}) => ({
  signal: { data: Float32Array.of(1, 2, 3, -4, -5, -6, 0, 0, 0), dims: [1, 3, 3] },
  kinds: { data: ids(0, 4, 1), dims: [1, 3] },
  gain: { data: halves(0x3c00, 0xc000, 0x3800, 0), dims: [1, 4] },
  mask: { data: Uint8Array.of(1, 1, 0), dims: [1, 3] },
  codes: { data: Int32Array.of(1, 2, 3), dims: [1, 3] },
  level: Int32Array.of(2), // of no sizes at all
  offset: Float32Array.of(1, 2, 4), // of sizes that are all fixed
  ...changes,
});

async function windows() {
  const named = await model.run(window());
  const listed = await model.run(Object.values(window()));
  const { gain } = window();
  const ready = new ort.Tensor('float16', gain.data, gain.dims); // which has a Float16Array in newer engines
  const tensors = await model.run(window({ gain: ready }));
  const right = {
    sums: ['float32', [1, 3], '13,-4,8'],
    square: ['float16', [1, 4], '1,4,0.25,0'],
    flags: ['bool', [1, 4], '1,0,0,1'],
    total: ['float32', [], '17'],
    count: ['int64', [], '5'],
    counts: ['int64', [1], '7'],
    twice: ['int32', [1, 3], '2,4,6'],
  };
  ensure(String(Object.keys(named)) === String(Object.keys(right)), `gives all outputs, got ${Object.keys(named)}`);
  for (const [name, [type, dims, numbers]] of Object.entries(right)) {
    for (const found of [named, listed, tensors].map((outputs) => outputs[name])) {
      const same = found.type === type && String(found.dims) === String(dims);
      ensure(same && String(numbersOf(found.data)) === numbers, `${name} is ${numbers}, got ${numbersOf(found.data)}`);
    }
  }
  console.log('node: a module of five types takes inputs by name, in order and as tensors of the runtime');
}

async function refusals() {
  const odd = (changes, says) => refuses(() => model.run(window(changes)), says);
  const codes = (size, dims) => ({ codes: { data: new Int32Array(size), dims } });
  const { signal, kinds, gain, mask } = window();
  const pair = { data: ids(0, 1), dims: [1, 2] };
  await odd({ kinds: { data: ids(0, 4, 5), dims: [1, 3] } }, 'kinds holds 5 at [0, 2]; there are 0 to 4, give those');
  await odd({ kinds: { data: ids(-1, 0, 0), dims: [1, 3] } }, 'kinds holds -1 at [0, 0]; there are 0 to 4');
  await odd({ codes: { data: Int32Array.of(0, 4, 5), dims: [1, 3] } }, 'codes holds 5 at [0, 2]; there are 0 to 4');
  await odd({ mask: { data: Uint8Array.of(0, 2, 1), dims: [1, 3] } }, 'mask holds 2 at [0, 1]; there are 0 to 1');
  await odd({ kinds: pair }, 'kinds: time is 2, and that of signal is 3; give the same');
  await odd({ gain: { data: gain.data, dims: [2, 2] } }, 'gain: entries is 2, and that of signal is 1');
  await odd(codes(4, [1, 4]), 'codes is [1, 4], and the model takes int32 [entries, 3]');
  await odd(codes(3, [3]), 'codes is [3], and the model takes int32 [entries, 3]');
  await odd(codes(2, [1, 3]), 'codes has 2 numbers, and the model takes 3 (int32');
  await odd({ level: new Int32Array(2) }, 'level has 2 numbers, and the model takes 1 (int32 [])');
  await odd({ offset: new Float32Array(4) }, 'offset has 4 numbers, and the model takes 3 (float32 [3])');
  await odd({ offset: Float32Array.of(0, NaN, 0) }, 'offset holds NaN at [1]; the model takes finite numbers');
  await odd({ offset: Float32Array.of(0, 0, 2e12) }, 'offset holds 2000000000000 at [2]; numbers up to 1e12');
  await odd({ codes: kinds }, 'codes should be int32 [entries, 3] in a Int32Array, got BigInt64Array');
  await odd({ mask: new ort.Tensor('uint8', mask.data, [1, 3]) }, 'mask should be bool [entries, time]');
  await odd({ gain: { data: halves(0x7c00), dims: [1, 1] } }, 'gain: width is 1, and the model takes 2 or more');
  await odd({ gain: { data: new Uint16Array(9), dims: [1, 9] } }, 'gain: width is 9, and the model takes at most 8');
  await odd({ gain: { data: halves(0, 0x7c00), dims: [1, 2] } }, 'gain holds Infinity at [0, 1]');
  await odd({ gain: { data: halves(0x7e00, 0), dims: [1, 2] } }, 'gain holds NaN at [0, 0]');
  await odd({ signal: signal.data }, 'signal has 9 numbers, which is not [entries,time,3]; give its dims');
  await odd({ gain: halves(0, 0) }, 'gain has 2 numbers, which is not [1,width]; give its dims');
  await odd({ gain: { data: halves(), dims: [0, 2] } }, 'gain has 0 numbers, which is not [0,2]');
  await odd({ offset: undefined }, 'offset should be float32 [3] in a Float32Array, got nothing');
  await odd({ more: gain }, 'the model takes signal float32 [entries, time, 3], kinds');
  const { signal: _, ...lacking } = window();
  const rest = Object.keys(lacking).join(', ');
  await refuses(() => model.run(lacking), `got ${rest}; give each input once`);
  await refuses(() => model.run([signal]), 'got an array of 1');
  await refuses(() => model.run(signal.data, signal.dims), 'got an array of 1');
  await refuses(() => model.run(), 'got nothing');
  const outputs = (data) => checkOutputs({ y: { data } }, [{ name: 'y', dtype: 'float16' }]);
  await refuses(async () => outputs(halves(0, 0xfc00)), 'y is not finite: float16 overflows', CheckError);
  console.log('node: ids that there are not, sizes that disagree and other types are refused');
}

async function streams() {
  const stream = await model.stream({ batch: 2 });
  const twin = await model.stream({ batch: 2 });
  const frame = (seed) => ({
    signal: Float32Array.from({ length: 6 }, (_, i) => seed + i),
    kinds: ids(seed % 5, (seed + 2) % 5),
  });
  const text = (outputs) =>
    Object.entries(outputs).map(([name, { type, dims, data }]) => [name, type, dims, ...data]).join();
  const first = await stream.step(frame(1));
  ensure(String(Object.keys(first)) === 'score,seen_so_far', `gives its own outputs, got ${Object.keys(first)}`);
  const { score, seen_so_far: seen } = first; // of states that start from a file, 0.5, 7 and 3
  ensure(score.type === 'float32' && String(score.data) === '2.125,2.9375,4.125,7.1875', `scores, got ${score.data}`);
  ensure(seen.type === 'int64' && String(seen.data) === '32,40', `32,40, got ${seen.data}`);
  ensure(text(first) === text(await twin.step(Object.values(frame(1)))), 'frames in order are as those by name');
  const odd = (kinds, says) => refuses(() => stream.step({ ...frame(2), kinds }), says);
  await odd(ids(0, 7), 'kinds holds 7 at [1]; there are 0 to 4');
  await odd(ids(0), 'kinds has 1 numbers, and the model takes 2 (int64 [2])');
  await odd({ data: ids(0, 1, 2), dims: [3] }, 'kinds: entries is 3, and that of the stream is 2');
  await refuses(() => stream.step(frame(2).signal), 'takes signal float32 [entries, 3], kinds int64 [entries]');
  await refuses(() => stream.prefill(frame(2)), 'has no prefill graph, only window and stream; its module');
  const mark = stream.snapshot();
  const second = await stream.step(frame(2));
  ensure(text(second) === text(await twin.step(frame(2))), 'a refused call leaves the stream as it was');
  await stream.step(frame(3));
  stream.restore(mark);
  ensure(text(second) === text(await stream.step(frame(2))), 'the same frame gives the same after a restore');
  stream.rewind(2);
  ensure(text(first) === text(await stream.step(frame(1))), 'and after a rewind');
  console.log('node: a stream of two inputs and two outputs without a prefill steps, rewinds, and refuses a prefill');
}

/** What a manifest must not say, since the rest would stumble over it. */
async function manifests() {
  const text = new TextDecoder().decode(await read('manifest.json'));
  const opening = (change) => {
    const manifest = JSON.parse(text);
    change(manifest, manifest.graphs.window.inputs, manifest.graphs.stream);
    const changed = new TextEncoder().encode(JSON.stringify(manifest));
    return Bundle.open(folder, async (file) => (file === 'manifest.json' ? changed : read(file)));
  };
  const cases = [
    [(manifest) => delete manifest.program, 'program should have a kind'],
    [(manifest) => (manifest.sizes = null), 'sizes should be an object'],
    [(manifest) => (manifest.sizes.width = 2 ** 21), "the size 'width' is 2097152"],
    [(manifest) => (manifest.sizes['a b'] = 1), "the size 'a b' is 1"],
    [(manifest) => (manifest.frames = 'sequence'), "frames is 'sequence', which is none of the sizes"],
    [(_, [signal]) => (signal.shape = ['entries', 'height', 3]), 'signal of graph window is [entries, height'],
    [(_, [signal]) => (signal.dtype = 'float64'), 'graph window should have inputs and outputs'],
    [(_, [, , gain]) => (gain.values = { kind: 'ids', below: 5 }), 'gain of graph window is float16, and can'],
    [(_, [, kinds]) => (kinds.values.below = null), 'the input kinds of graph window is int64, and can'],
    [(_, [signal, kinds]) => (kinds.name = signal.name), 'each name once'],
    [(manifest) => (manifest.graphs.window.limits.width = [3, 2]), 'the limits of width'],
    [(manifest) => (manifest.graphs.other = manifest.graphs.window), "graph 'other' is none of window"],
    [(_, __, stream) => stream.inputs.pop(), 'after them the states'],
    [(_, __, stream) => stream.outputs.reverse(), 'after them the states'],
    [(_, __, stream) => (stream.inputs[0].shape = [3, 'entries']), 'signal of graph stream should begin with'],
    [(_, __, stream) => stream.test_sequence.inputs.pop(), 'test_sequence should have'],
    [(manifest) => (manifest.states[2].shape = ['time']), 'state 1.seen should be'],
    [(manifest) => (manifest.states[2].dtype = 'bool'), 'state 1.seen should be'],
  ];
  for (const [change, says] of cases) await refuses(() => opening(change), says, CheckError);
  const renamed = await opening((_, [signal]) => (signal.name = 'y'));
  await refuses(() => new Model(renamed, ort).run({ ...window(), y: 0 }), 'the model takes y');
  await refuses(() => new Model(renamed, ort).session('window'), 'has other inputs or outputs', CheckError);
  console.log(`node: ${cases.length} manifests that can't be are refused, and a model that is not the manifest's`);
}

/** A test that can't fail is none: of every output, one number that is wrong. */
async function wrongOutputs() {
  const { graphs } = model.bundle.manifest;
  const sets = Object.values(graphs).flatMap((graph) => [
    ...graph.test_data.map((set) => [set, graph.outputs]),
    ...(graph.test_sequence ? [[graph.test_sequence.folder, graph.test_sequence.outputs]] : []),
  ]);
  const files = sets.flatMap(([set, outputs]) => outputs.map(({ name }, i) => [`${set}/output_${i}.pb`, name]));
  for (const [file, name] of files) {
    const bundle = await Bundle.open(folder, read);
    const tensor = bundle.tensor.bind(bundle);
    bundle.tensor = async (path, spec) => {
      const found = await tensor(path, spec);
      const { type, data } = found;
      if (path === file && type === 'float32') data[data.length - 1] += 1e-3;
      else if (path === file) data[data.length - 1] ^= type === 'int64' ? 1n : 1; // of a float16 the last bit
      return found;
    };
    const { ok, problems } = await selfCheck(new Model(bundle, ort), { language: 'node', frames: 1 });
    ensure(!ok && problems[0].includes(`${name} `), `finds the wrong number of ${file}, got ${problems}`);
  }
  console.log(`node: the self-check finds a wrong number in each of ${files.length} outputs`);
}

await windows();
await refusals();
await streams();
await manifests();
await wrongOutputs();
