// Runs a bundle of edifice-export with ONNX Runtime, in Node and in browsers alike:
//
//     const bundle = await Bundle.open('../bundle', read); //         read(path) gives a file's bytes
//     const model = new Model(bundle, ort, { provider: 'cpu' }); //   ort: onnxruntime-node or onnxruntime-web
//     const y = await model.run(frames, [1, 60, 287]); //             a window: Float32Array [batch, hidden_size]
//     const { logits } = await model.run({ input_ids: { data: ids, dims: [1, 9] } }); // any inputs to any outputs
//
//     const stream = await model.stream();
//     const y = await stream.step(frame); //                          one frame: Float32Array [batch, hidden_size]
//     const mark = stream.snapshot();
//     await stream.step(guess);
//     stream.restore(mark); //                                        as if the guess had never been

import { Bundle } from './bundle.mjs';
import { CheckError, EdificeError, RequestError, printable } from './errors.mjs';
import { PAST } from './manifest.mjs';
import { Snapshot, State, Stream } from './stream.mjs';
import { ARRAYS, MAX_MAGNITUDE, checkOutputs, plainly, takeInputs, volume } from './tensors.mjs';

export { Bundle, CheckError, EdificeError, MAX_MAGNITUDE, RequestError, Snapshot, Stream, printable };

/** The first ONNX Runtime that is right on every graph. */
export const OLDEST_RUNTIME = '1.24';

export class Model {
  #sessions = new Map();

  /**
   * Graphs are loaded, and their files checked, when they are first needed.
   *
   * @param {Bundle} bundle
   * @param ort the runtime's module
   * @param {string} options.provider an execution provider: 'cpu', 'cuda', ...; in browsers 'wasm' or 'webgpu'
   * @param {number} options.threads in Node; in browsers set ort.env.wasm.numThreads before the first session
   * @throws {RequestError} the runtime is too old
   */
  constructor(bundle, ort, { provider = 'cpu', threads = 1 } = {}) {
    checkRuntime(ort.env.versions.node ?? ort.env.versions.web);
    Object.assign(this, { bundle, ort, provider, threads });
  }

  /**
   * Runs the window graph.
   *
   * @param inputs tensors { data, dims } by name, or an array of them in order; an ort.Tensor is one. Where all sizes
   *   are fixed, a typed array alone is one too. A model of one input and one output takes and gives typed arrays.
   * @param {number[]} dims of a typed array, such as [batch, sequence, embed_dim]
   * @returns {Promise<object | TypedArray>} ort.Tensors by name; of a typed array the one output's numbers, such as
   *   Float32Array [batch, hidden_size]
   * @throws {RequestError} an input that the model does not take
   * @throws {CheckError} ONNX Runtime could not run it, or an output is not finite
   */
  async run(inputs, dims) {
    const { limits } = this.bundle.graph('window');
    const own = this.bundle.own('window');
    return plainly(inputs, dims, own.outputs, async (given) => {
      const feeds = this.tensors(takeInputs(given, own.inputs, limits));
      return checkOutputs(await this.runGraph('window', feeds), own.outputs);
    });
  }

  /**
   * @param {number} options.batch streams side by side
   * @param {number} options.history frames that it can be rewound by at most
   */
  async stream({ batch = 1, history = 16 } = {}) {
    if (!Number.isInteger(batch) || batch < 1) throw new RequestError(`batch must be an integer from 1, got ${batch}`);
    if (!Number.isInteger(history) || history < 0) {
      throw new RequestError(`history must be an integer from 0, got ${history}`);
    }
    await this.session('stream');
    if (this.bundle.has('prefill')) await this.session('prefill');
    return new Stream(this, await this.#initialState(batch), batch, history);
  }

  /** Loads a graph, once. */
  session(graph) {
    if (!this.#sessions.has(graph)) {
      const loading = this.#load(graph);
      this.#sessions.set(graph, loading);
      loading.catch(() => this.#sessions.delete(graph)); // so that it can be tried again
    }
    return this.#sessions.get(graph);
  }

  /** Tensors of the runtime, by name, from { type, data, dims }. */
  tensors(named) {
    const made = ({ type, data, dims }) => {
      if (type !== 'float16' || !this.ort.env.versions.node) return new this.ort.Tensor(type, data, dims);
      // Where there is Float16Array, Node's Tensor turns bits into one, and its session can't read that.
      const bits = new Uint16Array(data.buffer, data.byteOffset, data.length);
      return { type, data: bits, dims, location: 'cpu' };
    };
    return Object.fromEntries(Object.entries(named).map(([name, tensor]) => [name, made(tensor)]));
  }

  /** Runs a graph as it is: tensors by input name to tensors by output name. */
  async runGraph(graph, feeds) {
    const session = await this.session(graph);
    try {
      return await session.run(feeds);
    } catch (error) {
      throw new CheckError(`bundle ${this.bundle.name}: ONNX Runtime failed on the ${graph} graph: ${error.message}`);
    }
  }

  /** Gives the sessions back. */
  async release() {
    const sessions = await Promise.allSettled(this.#sessions.values());
    this.#sessions.clear();
    for (const { value } of sessions) await value?.release();
  }

  async #load(graph) {
    const { model, weights, inputs, outputs } = this.bundle.graph(graph);
    const bytes = await this.bundle.file(model);
    const options = {
      executionProviders: [this.provider],
      intraOpNumThreads: this.threads,
      logSeverityLevel: 3, // no warnings, such as that nodes on shapes run on the CPU
    };
    if (this.provider === 'webgpu' && this.ort.env.versions.web) {
      // States stay where they are computed; the other outputs come back.
      const states = outputs.slice(this.bundle.own(graph).outputs.length);
      options.preferredOutputLocation = Object.fromEntries(states.map(({ name }) => [name, 'gpu-buffer']));
    }
    let source = bytes;
    if (weights && this.ort.env.versions.node) {
      source = await this.bundle.modelPath(model, weights); // Node's runtime reads weights itself, beside the model
    } else if (weights) {
      options.externalData = [{ path: weights.split('/').pop(), data: await this.bundle.file(weights) }];
    }
    const session = await this.#open(model, source, options);
    const same = (found, specs) => JSON.stringify(found) === JSON.stringify(specs.map(({ name }) => name));
    if (same(session.inputNames, inputs) && same(session.outputNames, outputs)) return session;
    await session.release();
    throw this.bundle.damaged(`'${model}' has other inputs or outputs than the manifest says`);
  }

  async #open(model, source, options) {
    try {
      return await this.ort.InferenceSession.create(source, options);
    } catch (error) {
      if (['cpu', 'wasm'].includes(this.provider)) {
        throw new CheckError(`bundle ${this.bundle.name}: ONNX Runtime can't load '${model}': ${error.message}`);
      }
      throw new RequestError(`provider '${this.provider}' can't be had: ${error.message}; take another`);
    }
  }

  async #initialState(batch) {
    const tensors = {};
    for (const { name, dtype, shape: [, ...shape], initial } of this.bundle.manifest.states) {
      const dims = [batch, ...shape.map((size) => (size === PAST ? 0 : size))];
      const data = new ARRAYS[dtype][0](volume(dims));
      if (typeof initial === 'string') {
        const one = await this.bundle.tensor(initial, { name, dtype, shape: [1, ...shape] });
        for (let entry = 0; entry < batch; entry++) data.set(one.data, entry * one.data.length);
      } else {
        data.fill(dtype === 'int64' ? BigInt(Math.trunc(initial)) : initial);
      }
      tensors[`past.${name}`] = { type: dtype, data, dims };
    }
    return new State(this.tensors(tensors));
  }
}

/** Refuses a version that is wrong on some graphs or fails on them. */
function checkRuntime(found) {
  const [major, minor] = String(found).split('.').map(Number);
  const [oldestMajor, oldestMinor] = OLDEST_RUNTIME.split('.').map(Number);
  if (major > oldestMajor || (major === oldestMajor && minor >= oldestMinor)) return;
  throw new RequestError(
    `ONNX Runtime ${found} is older than ${OLDEST_RUNTIME}, the first that is right on every graph of a bundle; ` +
      'install a newer package, such as the one that package.json names',
  );
}
