// A stream: one frame in, one output out, and a state that can be kept and gone back to.
//
// Each run reads one set of tensors and makes another. Nothing is updated in place, so a snapshot is a reference to a
// set, and going back to one copies nothing.

import { CheckError, RequestError } from './bundle.mjs';

/** The largest number that a frame may hold: models square them, and are verified up to here. */
export const MAX_MAGNITUDE = 1e12;

const PIECE = 1024; // frames that prefill hands over at once, unless the window is longer

/** Frame by frame. Every call must be awaited before the next. A call that is refused leaves the stream as it was. */
export class Stream {
  #initial;
  #current;
  #before = []; // the states to rewind to, the latest last
  #busy = false;

  constructor(model, initial, batch, history) {
    Object.assign(this, { model, batch, history });
    this.#initial = initial;
    this.#current = initial.keep();
  }

  /** By how many frames it can be rewound now. */
  get rewindable() {
    return this.#before.length;
  }

  /** Where the state is: 'cpu', or 'gpu-buffer' (from the first frame on, with WebGPU). */
  get location() {
    return Object.values(this.#current.tensors)[0].location;
  }

  /**
   * One frame on.
   *
   * @param {Float32Array} frame [batch, embed_dim]
   * @returns {Promise<Float32Array>} [batch, hidden_size]
   */
  async step(frame) {
    const { name, shape } = this.model.bundle.graph('stream').inputs[0];
    const dims = [this.batch, shape[1]];
    checkNumbers(frame, name);
    if (frame.length !== dims[0] * dims[1]) {
      throw new RequestError(
        `${name} has ${frame.length} numbers, and the model takes ${dims[0] * dims[1]} ` +
          `(float32 [${dims.join(', ')}]); give embed_dim numbers for each stream`,
      );
    }
    return this.#work(async () => {
      const tensor = new this.model.ort.Tensor('float32', frame, dims);
      const [output, after] = await this.#run('stream', tensor, this.#current);
      this.#advance(after);
      return output;
    });
  }

  /**
   * Many frames on at once: what as many steps give, to rounding, and faster. A rewind goes back over all of them as
   * over one frame.
   *
   * @param {Float32Array} frames
   * @param {number[]} dims [batch, sequence, embed_dim]
   * @returns {Promise<Float32Array>} the output at the last frame, [batch, hidden_size]
   */
  async prefill(frames, dims) {
    checkSequence(frames, dims, this.model.bundle.graph('prefill'));
    if (dims[0] !== this.batch) {
      throw new RequestError(`state_sequence has a batch of ${dims[0]}, and the stream one of ${this.batch}`);
    }
    return this.#work(async () => {
      const length = Math.max(PIECE, this.model.bundle.manifest.options.window_size);
      let state = this.#current.keep();
      let output;
      for (let start = 0; start < dims[1]; start += length) {
        const piece = this.#piece(frames, dims, start, Math.min(start + length, dims[1]));
        const before = state;
        try {
          [output, state] = await this.#run('prefill', piece, before);
        } finally {
          before.release();
        }
      }
      this.#advance(state);
      return output;
    });
  }

  /** Back to before the first frame. */
  reset() {
    this.#checkIdle();
    this.#forget(0);
    this.#go(this.#initial.keep());
  }

  /** The state now. Nothing is copied; what it holds is given back when it is released (on a GPU that matters). */
  snapshot() {
    this.#checkIdle();
    return new Snapshot(this, this.#current.keep());
  }

  /** Goes to a snapshot of this stream, or of another of the same model and batch. Nothing is copied. */
  restore(snapshot) {
    this.#checkIdle();
    if (!(snapshot instanceof Snapshot)) throw new RequestError('restore takes what snapshot gave');
    if (!snapshot.state) throw new RequestError('the snapshot was released; take another');
    const { model, batch } = snapshot;
    if (model !== this.model || batch !== this.batch) {
      throw new RequestError(
        `the snapshot is of ${model.bundle.name} with a batch of ${batch}, and this stream of ` +
          `${this.model.bundle.name} with one of ${this.batch}; restore it where it was taken`,
      );
    }
    if (snapshot.state === this.#current) return;
    this.#forget(Math.max(0, this.#before.indexOf(snapshot.state))); // the history goes back as well, if it was there
    this.#go(snapshot.state.keep());
  }

  /** Back by a number of frames, at most `rewindable`. */
  rewind(frames) {
    this.#checkIdle();
    if (!Number.isInteger(frames) || frames < 0) throw new RequestError(`rewind takes a number from 0, got ${frames}`);
    if (frames > this.rewindable) {
      throw new RequestError(
        `rewind ${frames} frames: the history holds ${this.rewindable}, of at most ${this.history}; ` +
          'open the stream with a larger history, or keep snapshots',
      );
    }
    for (let i = 0; i < frames; i++) this.#go(this.#before.pop());
  }

  /** Gives the states back that no snapshot holds. The stream can't be used after that. */
  release() {
    this.#checkIdle();
    this.#busy = true;
    this.#forget(0);
    this.#current.release();
    this.#initial.release();
  }

  #checkIdle() {
    if (this.#busy) throw new RequestError('the stream is at work, or was released; await each call before the next');
  }

  async #work(job) {
    this.#checkIdle();
    this.#busy = true;
    try {
      return await job();
    } finally {
      this.#busy = false;
    }
  }

  async #run(graph, frames, before) {
    const { inputs, outputs } = this.model.bundle.graph(graph);
    const results = await this.model.runGraph(graph, { [inputs[0].name]: frames, ...before.tensors });
    const after = {};
    for (const { name } of this.model.bundle.manifest.states) after[`past.${name}`] = results[`present.${name}`];
    const state = new State(after);
    try {
      return [checkOutput(results[outputs[0].name].data, ', and the stream stays where it was'), state];
    } catch (error) {
      state.release();
      throw error;
    }
  }

  #piece(frames, [batch, sequence, width], start, end) {
    if (end - start === sequence) return new this.model.ort.Tensor('float32', frames, [batch, sequence, width]);
    const piece = new Float32Array(batch * (end - start) * width);
    for (let entry = 0; entry < batch; entry++) {
      const offset = entry * sequence;
      piece.set(frames.subarray((offset + start) * width, (offset + end) * width), entry * (end - start) * width);
    }
    return new this.model.ort.Tensor('float32', piece, [batch, end - start, width]);
  }

  #advance(after) {
    this.#before.push(this.#current);
    this.#current = after;
    if (this.#before.length > this.history) this.#before.shift().release();
  }

  #go(state) {
    this.#current.release();
    this.#current = state;
  }

  #forget(kept) {
    for (const state of this.#before.splice(kept)) state.release();
  }
}

/** The state of a stream at one moment. */
export class Snapshot {
  constructor({ model, batch }, state) {
    Object.assign(this, { model, batch, state });
  }

  release() {
    this.state?.release();
    this.state = null;
  }
}

/** The tensors that go into the next run. They are never written to; whoever refers to them counts. */
export class State {
  #users = 1;

  constructor(tensors) {
    this.tensors = tensors;
  }

  keep() {
    this.#users++;
    return this;
  }

  release() {
    if (--this.#users > 0) return;
    for (const tensor of Object.values(this.tensors)) if (tensor.location !== 'cpu') tensor.dispose();
  }
}

/** Refuses frames [batch, sequence, embed_dim] that a graph does not take. */
export function checkSequence(frames, dims, graph) {
  const [{ name, shape }] = graph.inputs;
  checkNumbers(frames, name, (i) => ` in frame ${Math.floor(i / shape[2]) % dims?.[1]}`);
  const shaped = Array.isArray(dims) && dims.length === 3 && dims.every((size) => Number.isInteger(size) && size > 0);
  const [batch, sequence, width] = shaped ? dims : [];
  const expected = `(float32 [${shape.join(', ')}])`;
  if (!shaped || frames.length !== batch * sequence * width) {
    throw new RequestError(`${name} has ${frames.length} numbers, which is not [${dims}]; give its dims ${expected}`);
  }
  if (width !== shape[2]) {
    throw new RequestError(`a frame of ${name} has ${width} numbers, and the model takes ${shape[2]} ${expected}`);
  }
  if (graph.max_sequence && sequence > graph.max_sequence) {
    throw new RequestError(`${name} has ${sequence} frames, and the model takes at most ${graph.max_sequence}`);
  }
}

/** Refuses an output that is not finite. */
export function checkOutput(output, consequence) {
  if (output.every(Number.isFinite)) return output;
  throw new CheckError(
    `output is not finite: float32 overflows in this model on these frames${consequence}; ` +
      'scale them down, or mend the weights',
  );
}

function checkNumbers(frames, name, where = () => '') {
  if (!(frames instanceof Float32Array)) throw new RequestError(`${name} should be a Float32Array`);
  const odd = frames.findIndex((number) => !(Math.abs(number) <= MAX_MAGNITUDE)); // a NaN is not
  if (odd < 0) return;
  const wanted = Number.isFinite(frames[odd])
    ? 'numbers up to 1e12 are taken, beyond which float32 may overflow; scale or mend the input'
    : 'the model takes finite numbers';
  throw new RequestError(`${name} holds ${Number(frames[odd].toPrecision(6))} at ${odd}${where(odd)}; ${wanted}`);
}
