// manifest.json: refuses one that the rest of this program could stumble over. Nothing in it is trusted.

import { RequestError } from './errors.mjs';
import { ARRAYS, isCount } from './tensors.mjs';

export const MANIFEST = 'manifest.json';

/** The size of states that grow: the frames that a stream has seen, 0 before the first. */
export const PAST = 'past';

const SCHEMA_VERSION = 6;
const GRAPHS = ['window', 'stream', 'prefill'];
const MAX_SIZE = 2 ** 20; // of what graphs are made for: what edifice-export makes at most
const SYMBOL = /^[A-Za-z_]\w*$/;
const FLOATS = ['float32', 'float16'];
const STATE_TYPES = ['float32', 'int64', 'int32'];
const BOUNDED = ['ids', 'integers']; // kinds of values that are below a number

/**
 * @param {Bundle} bundle whose manifest was parsed, and not looked at yet
 * @throws {RequestError} it is of another schema
 * @throws {CheckError} it is damaged
 */
export function checkManifest(bundle) {
  const { manifest } = bundle;
  const expect = (condition, what) => {
    if (!condition) throw bundle.damaged(`${MANIFEST}: ${what}`);
  };
  expect(isObject(manifest), 'should be a JSON object');
  checkSchema(bundle, expect);
  const { program, sizes, frames, files, graphs, states } = manifest;
  const named = isObject(program) && typeof program.name === 'string' && isObject(program.options);
  expect(named && typeof program.kind === 'string', 'program should have a kind, a name and options');
  expect(isObject(sizes), 'sizes should be an object');
  for (const [symbol, size] of Object.entries(sizes)) {
    const sound = SYMBOL.test(symbol) && isCount(size) && size <= MAX_SIZE;
    expect(sound, `the size '${symbol}' is ${size}, and should be a word, of 1 to ${MAX_SIZE}`);
  }
  expect(frames === null || Object.hasOwn(sizes, frames), `frames is '${frames}', which is none of the sizes`);
  expect(isObject(files), 'files should be an object');
  for (const [path, entry] of Object.entries(files)) {
    checkPath(bundle, path);
    const sound = isObject(entry) && Number.isSafeInteger(entry.size) && typeof entry.sha256 === 'string';
    expect(sound, `files '${path}' should have a size and a sha256`);
  }
  expect(Array.isArray(states), 'states should be a list');
  for (const state of states) checkState(bundle, state, expect);
  expect(isObject(graphs) && Object.keys(graphs).length, 'graphs should hold some');
  expect(!graphs.prefill || graphs.stream, 'a prefill graph goes with a stream graph');
  for (const [name, graph] of Object.entries(graphs)) checkGraph(bundle, name, graph, expect);
}

function checkSchema({ name, manifest }, expect) {
  const schema = manifest.schema_version;
  expect(isCount(schema), 'there is no schema_version');
  if (schema > SCHEMA_VERSION) {
    throw new RequestError(
      `bundle ${name}: has schema ${schema}, newer than ${SCHEMA_VERSION}, ` +
        'the newest that this program reads; take a newer sample',
    );
  }
  if (schema < SCHEMA_VERSION) {
    throw new RequestError(`bundle ${name}: has schema ${schema}, older than ${SCHEMA_VERSION}; build it again`);
  }
}

/** A path may come from anybody. It must stay in the bundle, on every operating system. */
function checkPath(bundle, path) {
  if (typeof path !== 'string' || path === '' || /[\\:\p{C}]/u.test(path)) {
    throw bundle.damaged(`${JSON.stringify(path)} is not the path of a file of the bundle`);
  }
  if (path.startsWith('/') || path.split('/').includes('..')) {
    throw bundle.damaged(`the path '${path}' leaves the bundle`);
  }
}

/** All states are of one batch: their first size is its symbol. One that grows starts from nothing. */
function checkState(bundle, state, expect) {
  const { sizes, states } = bundle.manifest;
  const typed = isTensor(state) && STATE_TYPES.includes(state.dtype) && isTensor(states[0]);
  const [batch, ...rest] = typed ? state.shape : [];
  const growing = rest.filter((size) => size === PAST).length;
  const sized = typed && Object.hasOwn(sizes, batch) && batch === states[0].shape[0] && batch !== PAST;
  const fixed = rest.every((size) => size === PAST || isCount(size));
  const wanted = `${STATE_TYPES.join(' or ')} [batch, sizes], of which one may be ${PAST}`;
  expect(sized && fixed && growing <= 1, `state ${state?.name} should be ${wanted}`);
  const starts = !growing || (Object.hasOwn(sizes, PAST) && typeof state.initial === 'number');
  expect(starts, `state ${state.name} grows: it should have the size ${PAST}, and no file`);
  if (typeof state.initial === 'string') checkPath(bundle, state.initial);
  else expect(Number.isFinite(state.initial), `state ${state.name} should have an initial value`);
}

function checkGraph(bundle, name, graph, expect) {
  expect(GRAPHS.includes(name), `graph '${name}' is none of ${GRAPHS.join(', ')}`);
  expect(isObject(graph), `graph ${name} should be an object`);
  checkPath(bundle, graph.model);
  if (graph.weights != null) {
    checkPath(bundle, graph.weights);
    const beside = folderOf(graph.weights) === folderOf(graph.model) && graph.weights !== graph.model;
    expect(beside, `the weights '${graph.weights}' of graph ${name} are not a file beside '${graph.model}'`);
    expect(Object.hasOwn(bundle.manifest.files, graph.weights), `'${graph.weights}' is used and not listed under files`);
  }
  checkTensors(bundle, `graph ${name}`, graph, expect);
  expect(Array.isArray(graph.test_data) && graph.test_data.length, `graph ${name} should have test_data`);
  graph.test_data.forEach((folder) => checkPath(bundle, folder));
  expect(isObject(graph.limits), `limits of graph ${name} should be an object`);
  for (const [symbol, limit] of Object.entries(graph.limits)) {
    const [least, most] = Array.isArray(limit) && limit.length === 2 ? limit : [];
    const sound = isCount(least) && (most === null || (isCount(most) && most >= least));
    expect(sound, `the limits of ${symbol} in graph ${name} should be the least, and the most or null`);
  }
  if (name === 'window') return;
  checkCarried(bundle, name, graph, expect);
  if (name === 'stream' && graph.test_sequence) checkSequence(bundle, graph.test_sequence, expect);
}

/** After its own inputs and outputs a graph has the states. Its own inputs begin with the batch, and then frames. */
function checkCarried(bundle, name, { inputs, outputs }, expect) {
  const { states, frames } = bundle.manifest;
  const carried = (tensors, way) => {
    const last = tensors.slice(-states.length).map(nameOf);
    return tensors.length > states.length && same(last, states.map((state) => way + state.name));
  };
  const sound = states.length && carried(inputs, 'past.') && carried(outputs, 'present.');
  expect(sound, `graph ${name} should have inputs and outputs, and after them the states`);
  const start = name === 'prefill' ? [bundle.batch, frames] : [bundle.batch];
  for (const { name: input, shape } of bundle.own(name).inputs) {
    expect(same(shape.slice(0, start.length), start), `${input} of graph ${name} should begin with [${start}]`);
  }
}

/** A longer test has all frames of what the stream graph takes and gives one by one. */
function checkSequence(bundle, longer, expect) {
  expect(isObject(longer), 'test_sequence should be an object');
  checkPath(bundle, longer.folder);
  checkTensors(bundle, 'test_sequence', longer, expect);
  const { inputs, outputs } = bundle.own('stream');
  const frames = bundle.manifest.frames ?? 'sequence';
  const all = ({ name, dtype, shape: [batch, ...rest] }) => [name, dtype, [batch, frames, ...rest]];
  const one = ({ name, dtype, shape }) => [name, dtype, shape];
  const sound = same(longer.inputs.map(one), inputs.map(all)) && same(longer.outputs.map(one), outputs.map(all));
  expect(sound, 'test_sequence should have [batch, frames, ...] of what the stream graph takes and gives');
}

/** What goes in and what comes out: inputs have sizes that are known, and values that their types can hold. */
function checkTensors({ manifest: { sizes } }, place, { inputs, outputs }, expect) {
  for (const list of [inputs, outputs]) {
    const sound = Array.isArray(list) && list.length && list.every(isTensor);
    expect(sound, `${place} should have inputs and outputs`);
    expect(new Set(list.map(nameOf)).size === list.length, `${place} should have each name once`);
  }
  for (const { name, dtype, shape, values } of inputs) {
    const known = shape.every((size) => isCount(size) || Object.hasOwn(sizes, size));
    expect(known, `the input ${name} of ${place} is [${shape.join(', ')}], of which not all is known`);
    const { kind, below } = isObject(values) ? values : {};
    const held = FLOATS.includes(dtype) ? kind === 'normal' : ['mask', ...BOUNDED].includes(kind);
    const bounded = BOUNDED.includes(kind) ? isCount(below) : below === null;
    expect(held && bounded, `the input ${name} of ${place} is ${dtype}, and can't hold ${JSON.stringify(values)}`);
  }
}

const nameOf = ({ name }) => name;

const folderOf = (path) => path.slice(0, path.lastIndexOf('/') + 1);

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function isObject(value) {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isTensor(value) {
  if (!isObject(value) || !Array.isArray(value.shape)) return false;
  const sized = value.shape.every((size) => isCount(size) || (typeof size === 'string' && size));
  return sized && typeof value.name === 'string' && Object.hasOwn(ARRAYS, value.dtype);
}
