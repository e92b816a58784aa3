// A bundle of edifice-export: its manifest, and its files, each checked against the manifest before it is used.

import { CheckError, RequestError } from './errors.mjs';
import { MANIFEST, PAST, checkManifest } from './manifest.mjs';
import { parseTensor } from './tensor_file.mjs';
import { describe, fits } from './tensors.mjs';

/** What browsers of files leave in folders that they show, and no part of a bundle. */
const OF_BROWSERS = ['Thumbs.db', 'desktop.ini', '.DS_Store'];

export class Bundle {
  #read;

  /**
   * @param {string} name what messages call it, such as its folder
   * @param {(path: string) => Promise<Uint8Array | null>} read gives a file of the folder, or null where there is none.
   *   Paths are relative, with forward slashes, and don't leave the folder. In Node it has two methods: `place(path)`,
   *   where a file is on disk, and `beside(path)`, the paths of all that is in its folder.
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
    checkManifest(bundle);
    return bundle;
  }

  constructor(name, read) {
    this.name = name;
    this.#read = read;
  }

  /** Whether there is a graph: 'window', 'stream' or 'prefill'. */
  has(graph) {
    return Object.hasOwn(this.manifest.graphs, graph);
  }

  /** The manifest's entry of a graph. */
  graph(name) {
    if (this.has(name)) return this.manifest.graphs[name];
    const { graphs, program } = this.manifest;
    const found = Object.keys(graphs).join(' and ');
    const remedy = program.kind === 'module' ? 'its module gives no other' : 'build one with --graph both';
    throw new RequestError(`bundle ${this.name}: has no ${name} graph, only ${found}; ${remedy}`);
  }

  /** What a graph takes and gives beside the states. */
  own(graph) {
    const { inputs, outputs } = this.graph(graph);
    const carried = graph === 'window' ? 0 : this.manifest.states.length;
    return {
      inputs: inputs.slice(0, inputs.length - carried),
      outputs: outputs.slice(0, outputs.length - carried),
    };
  }

  /** Of a stream, the symbol of its batch. */
  get batch() {
    return this.manifest.states[0].shape[0];
  }

  /** Whether a stream has states that are longer after every frame. */
  get grows() {
    return this.manifest.states.some(({ shape }) => shape.includes(PAST));
  }

  /** Frames that the graphs are made for at once; 1 where there are no frames. */
  get windowSize() {
    const { sizes, frames } = this.manifest;
    return frames === null ? 1 : sizes[frames];
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

  /** Where a model is that reads its weights itself, when these are what the manifest says, and nothing else is there. */
  async modelPath(model, weights) {
    await this.file(weights);
    for (const path of await this.#read.beside(model)) {
      const known = path === MANIFEST || OF_BROWSERS.includes(path.split('/').at(-1));
      if (!known && !Object.hasOwn(this.manifest.files, path)) {
        throw this.damaged(`'${path}' is beside a model and not listed in ${MANIFEST}`);
      }
    }
    return this.#read.place(model);
  }

  /** Checks every file that the manifest lists. */
  async checkFiles() {
    for (const path of Object.keys(this.manifest.files)) await this.file(path);
  }

  /** A tensor of the bundle, { type, dims, data }, of the type and shape that it should have. */
  async tensor(path, spec) {
    const bytes = await this.file(path);
    let tensor;
    try {
      tensor = parseTensor(bytes);
    } catch (error) {
      throw this.damaged(`'${path}' ${error.message}`);
    }
    if (tensor.type === spec.dtype && fits(tensor.dims, spec.shape)) return tensor;
    const found = describe(tensor.type, tensor.dims);
    throw this.damaged(`'${path}' is ${found}, and ${spec.name} is ${describe(spec.dtype, spec.shape)}`);
  }

  /** The test data sets of a graph, one after the other: its inputs and its outputs by name. */
  async *testData(name) {
    const graph = this.graph(name);
    for (const folder of graph.test_data) yield { folder, ...(await this.#tensors(folder, graph)) };
  }

  /** The longer test of a stream, its inputs and outputs at all frames by name; null where there is none. */
  async testSequence() {
    const longer = this.graph('stream').test_sequence;
    return longer && { folder: longer.folder, ...(await this.#tensors(longer.folder, longer)) };
  }

  damaged(problem) {
    return new CheckError(`bundle ${this.name}: ${problem}; build or copy the bundle again`);
  }

  async #tensors(folder, specs) {
    const read = async (kind) => {
      const tensors = {};
      for (const [i, spec] of specs[`${kind}s`].entries()) {
        tensors[spec.name] = await this.tensor(`${folder}/${kind}_${i}.pb`, spec);
      }
      return tensors;
    };
    return { inputs: await read('input'), outputs: await read('output') };
  }
}

async function hash(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new RequestError('SHA-256 is not there: pages have Web Crypto from https or http://localhost only; use that');
  }
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
}
