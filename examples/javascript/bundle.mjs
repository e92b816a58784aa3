// A bundle of edifice-export: its manifest, and its files, each checked against the manifest before it is used.

import { parseTensor } from './tensor_file.mjs';

const MANIFEST = 'manifest.json';
const SCHEMA_VERSION = 4;
const MAX_FRAMES = 8192; // of a window: what edifice-export makes at most

/**
 * Text that may come from a file of anybody's, as a terminal or a page may be given it: nothing in it moves the cursor,
 * hides or reorders text; letters of any script stay as they are. In JSON it is the same text.
 */
export function printable(text) {
  const escape = (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`;
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (letter) => letter.split('').map(escape).join(''));
}

/** An error that is for the user to read; `status` is what a program should exit with. */
export class EdificeError extends Error {
  constructor(message, status) {
    super(printable(message.replace(/\s+/g, ' ').trim())); // ONNX Runtime's own messages have several lines
    this.name = new.target.name;
    this.status = status;
  }
}

/** The bundle is damaged, or what was computed is wrong. */
export class CheckError extends EdificeError {
  constructor(message) {
    super(message, 1);
  }
}

/** What was asked for can't be had. */
export class RequestError extends EdificeError {
  constructor(message) {
    super(message, 2);
  }
}

export class Bundle {
  #read;

  /**
   * @param {string} name what messages call it, such as its folder
   * @param {(path: string) => Promise<Uint8Array | null>} read gives a file of the folder, or null where there is none.
   *   Paths are relative, with forward slashes, and don't leave the folder.
   */
  static async open(name, read) {
    const bytes = await read(MANIFEST);
    if (!bytes) {
      throw new RequestError(`bundle ${name}: has no ${MANIFEST}; name the folder that \`edifice-export build\` made`);
    }
    const bundle = new Bundle(name, read);
    try {
      bundle.manifest = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
    } catch (error) {
      throw bundle.damaged(`${MANIFEST} is not JSON (${error.message})`);
    }
    bundle.#checkManifest();
    return bundle;
  }

  constructor(name, read) {
    this.name = name;
    this.#read = read;
  }

  /** The manifest's entry of a graph: 'window', 'stream' or 'prefill'. */
  graph(name) {
    const { graphs } = this.manifest;
    if (Object.hasOwn(graphs, name)) return graphs[name];
    throw new RequestError(
      `bundle ${this.name}: has no ${name} graph, only ${Object.keys(graphs).join(' and ')}; ` +
        'build one with --graph both',
    );
  }

  /** The contents of a file, if they are what the manifest says. */
  async file(path) {
    const expected = Object.hasOwn(this.manifest.files, path) && this.manifest.files[path];
    if (!expected) throw this.damaged(`'${path}' is used and not listed in ${MANIFEST}`);
    const bytes = await this.#read(path);
    if (!bytes) throw this.damaged(`'${path}' is missing`);
    const sha256 = await hash(bytes);
    if (bytes.length !== expected.size || sha256 !== expected.sha256) {
      throw this.damaged(
        `'${path}' was changed: its SHA-256 is ${sha256.slice(0, 12)}..., ` +
          `the manifest says ${expected.sha256.slice(0, 12)}...`,
      );
    }
    return bytes;
  }

  /** Checks every file that the manifest lists. */
  async checkFiles() {
    for (const path of Object.keys(this.manifest.files)) await this.file(path);
  }

  /** A tensor of the bundle: { type, dims, data }. */
  async tensor(path) {
    const bytes = await this.file(path);
    try {
      return parseTensor(bytes);
    } catch (error) {
      throw this.damaged(`'${path}' ${error.message}`);
    }
  }

  /** The test data sets of a graph, one after the other: its inputs and its outputs by name. */
  async *testData(name) {
    const graph = this.graph(name);
    const read = async (specs, path) => {
      const tensors = {};
      for (const [i, { name }] of specs.entries()) tensors[name] = await this.tensor(`${path}_${i}.pb`);
      return tensors;
    };
    for (const folder of graph.test_data) {
      const inputs = await read(graph.inputs, `${folder}/input`);
      yield { folder, inputs, outputs: await read(graph.outputs, `${folder}/output`) };
    }
  }

  damaged(problem) {
    return new CheckError(`bundle ${this.name}: ${problem}; build or copy the bundle again`);
  }

  /** Refuses a manifest that the rest of this program could stumble over. Nothing in it is trusted. */
  #checkManifest() {
    const { manifest } = this;
    if (!isObject(manifest)) throw this.damaged(`${MANIFEST} is not a JSON object`);
    const schema = manifest.schema_version;
    if (!isCount(schema)) throw this.damaged(`${MANIFEST} has no schema_version`);
    if (schema > SCHEMA_VERSION) {
      throw new RequestError(
        `bundle ${this.name}: has schema ${schema}, newer than ${SCHEMA_VERSION}, ` +
          'the newest that this program reads; take a newer sample',
      );
    }
    if (schema < SCHEMA_VERSION) {
      throw new RequestError(`bundle ${this.name}: has schema ${schema}, older than ${SCHEMA_VERSION}; build it again`);
    }
    const expect = (condition, what) => {
      if (!condition) throw this.damaged(`${MANIFEST}: ${what}`);
    };
    const window = isObject(manifest.options) ? manifest.options.window_size : undefined;
    expect(isCount(window) && window <= MAX_FRAMES, `window_size is ${window}, and not 1 to ${MAX_FRAMES}`);
    expect(isObject(manifest.files), 'files should be an object');
    for (const [path, entry] of Object.entries(manifest.files)) {
      this.#checkPath(path);
      const sound = isObject(entry) && Number.isSafeInteger(entry.size) && typeof entry.sha256 === 'string';
      expect(sound, `files '${path}' should have a size and a sha256`);
    }
    expect(isObject(manifest.graphs) && Object.keys(manifest.graphs).length, 'graphs should hold some');
    for (const [name, graph] of Object.entries(manifest.graphs)) {
      expect(isObject(graph), `graph ${name} should be an object`);
      this.#checkPath(graph.model);
      for (const list of [graph.inputs, graph.outputs]) {
        const sound = Array.isArray(list) && list.length && list.every(isTensor);
        expect(sound, `graph ${name} should have inputs and outputs`);
      }
      expect(Array.isArray(graph.test_data) && graph.test_data.length, `graph ${name} should have test_data`);
      graph.test_data.forEach((folder) => this.#checkPath(folder));
      const limit = graph.max_sequence ?? null;
      expect(limit === null || isCount(limit), `graph ${name}: max_sequence should be a number from 1 or null`);
      if (graph.test_sequence) this.#checkPath(graph.test_sequence.folder);
    }
    expect(Array.isArray(manifest.states), 'states should be a list');
    for (const state of manifest.states) {
      const typed = isTensor(state) && ['float32', 'int64'].includes(state.dtype);
      const sized = typed && state.shape[0] === 'batch' && state.shape.slice(1).every(isCount);
      expect(sized, `state ${state?.name} should be float32 or int64 [batch, sizes]`);
      if (typeof state.initial === 'string') this.#checkPath(state.initial);
      else expect(Number.isFinite(state.initial), `state ${state.name} should have an initial value`);
    }
  }

  /** A path of a manifest may come from anybody. It must stay in the bundle, on every operating system. */
  #checkPath(path) {
    if (typeof path !== 'string' || path === '' || /[\\:\p{C}]/u.test(path)) {
      throw this.damaged(`${JSON.stringify(path)} is not the path of a file of the bundle`);
    }
    if (path.startsWith('/') || path.split('/').includes('..')) {
      throw this.damaged(`the path '${path}' leaves the bundle`);
    }
  }
}

async function hash(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new RequestError('SHA-256 is not there: pages have Web Crypto from https or http://localhost only; use that');
  }
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

function isObject(value) {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isCount(value) {
  return Number.isSafeInteger(value) && value >= 1;
}

function isTensor(value) {
  const sizes = isObject(value) && Array.isArray(value.shape) ? value.shape : [];
  const sound = sizes.length > 0 && sizes.every((size) => typeof size === 'string' || isCount(size));
  return sound && typeof value.name === 'string' && typeof value.dtype === 'string';
}
