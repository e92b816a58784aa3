// Tensors: what goes into a graph is checked before it does, and what comes out before it is believed.

import { CheckError, RequestError } from './errors.mjs';

/** The largest number that an input may hold: models square them, and are verified up to here. */
export const MAX_MAGNITUDE = 1e12;

/** Of each type, what holds its numbers. A bool is a byte, 0 or 1; a float16 its bits, or a number in newer engines. */
export const ARRAYS = {
  float32: [Float32Array],
  float16: globalThis.Float16Array ? [Uint16Array, Float16Array] : [Uint16Array],
  int64: [BigInt64Array],
  int32: [Int32Array],
  bool: [Uint8Array],
};

/** A type and sizes as text, such as float32 [batch, sequence, 8]. */
export const describe = (type, sizes) => `${type} [${sizes.join(', ')}]`;

export const isCount = (value) => Number.isSafeInteger(value) && value >= 1;

/** Whether dims have a shape; a free size may be any number. */
export function fits(dims, shape) {
  return dims.length === shape.length && shape.every((size, axis) => typeof size === 'string' || size === dims[axis]);
}

/** How many numbers a tensor holds. */
export const volume = (dims) => dims.reduce((product, size) => product * size, 1);

/** Numbers to compute with: as they are, but for the bits of float16. (Those of int64 are BigInts.) */
export function numbersOf(data) {
  return data instanceof Uint16Array ? Float32Array.from(data, fromHalf) : data;
}

/**
 * What a graph takes, from what a caller gave.
 *
 * @param given tensors by input name, or an array of them in the order of `specs`. A tensor is { data, dims }, such as
 *   an ort.Tensor; a typed array alone will do where all sizes are known.
 * @param {object[]} specs the inputs, as the manifest has them
 * @param {object} limits the least and the most of free sizes, by symbol
 * @param {object} known free sizes that are fixed already, by symbol: the size, and what has it
 * @returns {object} { type, data, dims } by input name
 * @throws {RequestError} names the input, what the model takes and what was given
 */
export function takeInputs(given, specs, limits, known = {}) {
  const sizes = new Map(Object.entries(known));
  const tensors = {};
  for (const [i, value] of inOrder(given, specs).entries()) {
    const spec = specs[i];
    const tensor = takeTensor(value, spec, sizes);
    checkSizes(tensor, spec, limits, sizes);
    checkValues(tensor, spec);
    tensors[spec.name] = tensor;
  }
  return tensors;
}

/** The outputs by name, none of which holds a float that is not finite. */
export function checkOutputs(results, specs, consequence = '') {
  const outputs = {};
  for (const { name, dtype } of specs) {
    const { data } = (outputs[name] = results[name]);
    if (!dtype.startsWith('float') || numbersOf(data).every(Number.isFinite)) continue;
    throw new CheckError(
      `${name} is not finite: ${dtype} overflows in this model on these inputs${consequence}; ` +
        'scale them down, or mend the weights',
    );
  }
  return outputs;
}

/**
 * Runs a job on tensors in a form that suits models of one input and one output: a typed array in, a typed array out.
 *
 * @param given tensors as takeInputs has them, or a typed array
 * @param {number[]} dims of a typed array
 * @param {object[]} outputs what there is, as the manifest has them
 * @param job tensors as takeInputs has them to outputs by name
 */
export async function plainly(given, dims, outputs, job) {
  if (!ArrayBuffer.isView(given)) return job(given);
  const results = await job([{ data: given, dims }]);
  return outputs.length === 1 ? results[outputs[0].name].data : results;
}

/** Some frames of a tensor [batch, frames, ...]. */
export function framesOf(tensor, start, end) {
  const { type, data, dims: [batch, frames, ...rest] } = tensor;
  if (start === 0 && end === frames) return tensor;
  const [size, count] = [volume(rest), end - start];
  const piece = new data.constructor(batch * count * size);
  for (let entry = 0; entry < batch; entry++) {
    const offset = entry * frames;
    piece.set(data.subarray((offset + start) * size, (offset + end) * size), entry * count * size);
  }
  return { type, dims: [batch, count, ...rest], data: piece };
}

function inOrder(given, specs) {
  const names = Array.isArray(given) ? null : Object.keys(given ?? {});
  const complete = !names || specs.every(({ name }) => names.includes(name));
  if (complete && (names ?? given).length === specs.length) return names ? specs.map(({ name }) => given[name]) : given;
  const wanted = specs.map(({ name, dtype, shape }) => `${name} ${describe(dtype, shape)}`);
  const found = names ? names.join(', ') || 'nothing' : `an array of ${given.length}`;
  throw new RequestError(
    `the model takes ${wanted.join(', ')}; got ${found}; give each input once, as a typed array or { data, dims }`,
  );
}

function takeTensor(given, { name, dtype, shape }, sizes) {
  const taken = describe(dtype, shape);
  const { type = dtype, data, dims = shape.map((size) => sizes.get(size)?.[0] ?? size) } =
    ArrayBuffer.isView(given) ? { data: given } : given ?? {};
  if (type !== dtype || !ARRAYS[dtype].some((array) => data instanceof array)) {
    const arrays = ARRAYS[dtype].map((array) => array.name).join(' or ');
    const found = type === dtype ? data?.constructor?.name ?? 'nothing' : type;
    throw new RequestError(`${name} should be ${taken} in a ${arrays}, got ${found}; convert it`);
  }
  if (!Array.isArray(dims) || !dims.every(isCount)) {
    throw new RequestError(`${name} has ${data.length} numbers, which is not [${dims}]; give its dims (${taken})`);
  }
  if (!fits(dims, shape)) throw new RequestError(`${name} is [${dims.join(', ')}], and the model takes ${taken}`);
  if (data.length !== volume(dims)) {
    const wanted = `${volume(dims)} (${describe(dtype, dims)})`;
    throw new RequestError(`${name} has ${data.length} numbers, and the model takes ${wanted}`);
  }
  return { type, data, dims };
}

/** One symbol is one number in all inputs. */
function checkSizes({ dims }, { name, shape }, limits, sizes) {
  for (const [axis, symbol] of shape.entries()) {
    if (typeof symbol !== 'string') continue;
    const found = dims[axis];
    if (!sizes.has(symbol)) sizes.set(symbol, [found, name]);
    const [size, place] = sizes.get(symbol);
    if (size !== found) {
      throw new RequestError(
        `${name}: ${symbol} is ${found}, and that of ${place} is ${size}; give the same everywhere`,
      );
    }
    const [least, most] = Object.hasOwn(limits, symbol) ? limits[symbol] : [1, null];
    if (found >= least && found <= (most ?? found)) continue;
    const bound = found < least ? `${least} or more` : `at most ${most}`;
    throw new RequestError(`${name}: ${symbol} is ${found}, and the model takes ${bound}`);
  }
}

function checkValues({ data, dims }, { name, dtype, values: { kind, below } }) {
  const refuse = (at, value, what) => {
    throw new RequestError(`${name} holds ${value} at [${placeOf(at, dims).join(', ')}]; ${what}`);
  };
  if (kind === 'normal') {
    const numbers = numbersOf(data);
    const odd = numbers.findIndex((number) => !(Math.abs(number) <= MAX_MAGNITUDE)); // a NaN is not
    if (odd < 0) return;
    const wanted = Number.isFinite(numbers[odd])
      ? 'numbers up to 1e12 are taken, beyond which float32 may overflow; scale or mend the input'
      : 'the model takes finite numbers';
    refuse(odd, Number(numbers[odd].toPrecision(6)), wanted);
  }
  const end = kind === 'ids' ? below : dtype === 'bool' ? 2 : null;
  const odd = end === null ? -1 : data.findIndex((number) => number < 0 || number >= end);
  if (odd >= 0) refuse(odd, data[odd], `there are 0 to ${end - 1}, give those`);
}

/** The index along each axis of a number that is at a place in the data. */
function placeOf(at, dims) {
  const place = [];
  for (const size of dims.toReversed()) {
    place.unshift(at % size);
    at = Math.floor(at / size);
  }
  return place;
}

function fromHalf(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
}
