// Runs a bundle of edifice-export with ONNX Runtime, in Node and in browsers alike:
//
//     const bundle = await Bundle.open('../bundle', read); //         read(path) gives a file's bytes
//     const model = new Model(bundle, ort, { provider: 'cpu' }); //   ort: onnxruntime-node or onnxruntime-web
//     const y = await model.run(frames, [1, 60, 287]); //             a window: Float32Array [batch, hidden_size]
//
//     const stream = await model.stream();
//     const y = await stream.step(frame); //                          one frame: Float32Array [batch, hidden_size]
//     const mark = stream.snapshot();
//     await stream.step(guess);
//     stream.restore(mark); //                                        as if the guess had never been

import { Bundle, CheckError, EdificeError, RequestError, printable } from './bundle.mjs';
import { MAX_MAGNITUDE, Snapshot, State, Stream, checkOutput, checkSequence } from './stream.mjs';

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
   * A window of any batch and length.
   *
   * @param {Float32Array} frames
   * @param {number[]} dims [batch, sequence, embed_dim]
   * @returns {Promise<Float32Array>} [batch, hidden_size]
   */
  async run(frames, dims) {
    const graph = this.bundle.graph('window');
    checkSequence(frames, dims, graph);
    const { name } = graph.inputs[0];
    const outputs = await this.runGraph('window', { [name]: new this.ort.Tensor('float32', frames, dims) });
    return checkOutput(outputs[graph.outputs[0].name].data, '');
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
    await this.session('prefill');
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
    const { model, outputs } = this.bundle.graph(graph);
    const bytes = await this.bundle.file(model);
    const options = {
      executionProviders: [this.provider],
      intraOpNumThreads: this.threads,
      logSeverityLevel: 3, // no warnings, such as that nodes on shapes run on the CPU
    };
    if (this.provider === 'webgpu' && this.ort.env.versions.web) {
      // States stay where they are computed; the output comes back.
      options.preferredOutputLocation = Object.fromEntries(outputs.slice(1).map(({ name }) => [name, 'gpu-buffer']));
    }
    const data = `${model}.data`; // models beyond 2 GiB keep their weights beside them
    if (Object.hasOwn(this.bundle.manifest.files, data)) {
      options.externalData = [{ path: data.split('/').pop(), data: await this.bundle.file(data) }];
    }
    try {
      return await this.ort.InferenceSession.create(bytes, options);
    } catch (error) {
      if (['cpu', 'wasm'].includes(this.provider)) {
        throw new CheckError(`bundle ${this.bundle.name}: ONNX Runtime can't load '${model}': ${error.message}`);
      }
      throw new RequestError(`provider '${this.provider}' can't be had: ${error.message}; take another`);
    }
  }

  async #initialState(batch) {
    const tensors = {};
    for (const { name, dtype, shape, initial } of this.bundle.manifest.states) {
      const dims = [batch, ...shape.slice(1)];
      const size = dims.reduce((product, dim) => product * dim);
      const data = dtype === 'int64' ? new BigInt64Array(size) : new Float32Array(size);
      if (typeof initial === 'string') {
        const one = await this.bundle.tensor(initial); // of one entry of the batch
        if (one.type !== dtype || String(one.dims) !== String([1, ...shape.slice(1)])) {
          throw this.bundle.damaged(`'${initial}' is ${one.type} [${one.dims.join(', ')}], not the state ${name}`);
        }
        for (let entry = 0; entry < batch; entry++) data.set(one.data, entry * one.data.length);
      } else {
        data.fill(dtype === 'int64' ? BigInt(Math.trunc(initial)) : initial);
      }
      tensors[`past.${name}`] = new this.ort.Tensor(dtype, data, dims);
    }
    return new State(tensors);
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
