// Reads the ONNX TensorProto files of a bundle: its test data and, for some models, initial states.
//
// A TensorProto is a protobuf message. A bundle's tensors have four of its fields: dims (1), data_type (2), name (8)
// and raw_data (9), whose numbers are little endian, as typed arrays are wherever JavaScript runs.

import { ARRAYS, volume } from './tensors.mjs';

/** The types by their numbers in the format. */
const TYPES = new Map([
  [1, 'float32'],
  [6, 'int32'],
  [7, 'int64'],
  [9, 'bool'],
  [10, 'float16'],
]);
const VARINT = 0;
const FIXED64 = 1;
const BYTES = 2;
const FIXED32 = 5;

/**
 * @param {Uint8Array} bytes the file
 * @returns {{type: string, dims: number[], data: TypedArray}} the fields of an ort.Tensor
 * @throws {Error} what is wrong with the file
 */
export function parseTensor(bytes) {
  const dims = [];
  let dataType, raw;
  let at = 0;

  function varint(end) {
    let value = 0;
    for (let scale = 1; at < end && scale <= 2 ** 49; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) {
        if (value > Number.MAX_SAFE_INTEGER) break;
        return value;
      }
    }
    throw new Error(at < end ? `holds a number that is too large at byte ${at}` : 'ends in the middle of a number');
  }

  function skip(size) {
    if (size > bytes.length - at) throw new Error(`ends ${size - (bytes.length - at)} bytes early`);
    at += size;
    return bytes.subarray(at - size, at);
  }

  while (at < bytes.length) {
    const key = varint(bytes.length);
    const field = Math.floor(key / 8);
    const wire = key % 8;
    if (wire === VARINT) {
      const value = varint(bytes.length);
      if (field === 1) dims.push(value);
      if (field === 2) dataType = value;
    } else if (wire === BYTES) {
      const content = skip(varint(bytes.length));
      if (field === 9) raw = content;
      if (field === 1) { // packed: all dims in one field
        const end = at;
        at -= content.length;
        while (at < end) dims.push(varint(end));
      }
    } else if (wire === FIXED32 || wire === FIXED64) {
      skip(wire === FIXED32 ? 4 : 8);
    } else {
      throw new Error(`is not a tensor: wire type ${wire} at byte ${at}`);
    }
  }
  const type = TYPES.get(dataType);
  if (!type) throw new Error(`has data_type ${dataType}, which is none of ${[...TYPES.values()].join(', ')}`);
  if (!raw) throw new Error('has no raw_data');
  const [ArrayType] = ARRAYS[type];
  const size = volume(dims) * ArrayType.BYTES_PER_ELEMENT;
  if (size !== raw.length) throw new Error(`is ${type} [${dims.join(', ')}], ${size} bytes, and holds ${raw.length}`);
  return { type, dims, data: new ArrayType(new Uint8Array(raw).buffer) }; // a copy, aligned
}
