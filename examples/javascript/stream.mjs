// A stream: one frame in, one output out, and a state that can be kept and gone back to.
//
// Each run reads one set of tensors and makes another. Nothing is updated in place, so a snapshot is a reference to a
// set, and going back to one copies nothing. States that grow are larger in every set.

import { RequestError } from './errors.mjs';
import { checkOutputs, framesOf, plainly, takeInputs } from './tensors.mjs';

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
   * @param frame typed arrays by input name, or an array of them in order, each for all streams, such as Float32Array
   *   [batch, embed_dim]. A stream of one input and one output takes and gives typed arrays.
   * @returns {Promise<object | TypedArray>} ort.Tensors by name; of a typed array the one output's numbers, such as
   *   Float32Array [batch, hidden_size]
   */
  async step(frame) {
    const { limits } = this.model.bundle.graph('stream');
    return this.#take('stream', limits, frame, undefined, async (inputs) => {
      const [outputs, after] = await this.#run('stream', inputs, this.#current);
      this.#advance(after);
      return outputs;
    });
  }

  /**
   * Many frames on at once: what as many steps give, to rounding, and faster. A rewind goes back over all of them as
   * over one frame.
   *
   * @param frames tensors { data, dims } by name, or an array of them in order, of one input a typed array
   * @param {number[]} dims of a typed array, such as [batch, sequence, embed_dim]
   * @returns {Promise<object | TypedArray>} the outputs at the last frame, as those of a step
   * @throws {RequestError} the bundle has no prefill graph, or as for a step
   */
  async prefill(frames, dims) {
    const { bundle } = this.model;
    // Of frames there may be any number: they are handed over in pieces.
    const { [bundle.manifest.frames]: [, limit] = [1, null], ...limits } = bundle.graph('prefill').limits;
    const most = Math.min(limit ?? Infinity, Math.max(PIECE, bundle.windowSize));
    return this.#take('prefill', limits, frames, dims, async (inputs) => {
      const length = Object.values(inputs)[0].dims[1];
      let state = this.#current.keep();
      let outputs;
      for (let start = 0; start < length; start += most) {
        const piece = ([name, tensor]) => [name, framesOf(tensor, start, Math.min(start + most, length))];
        const before = state;
        try {
          [outputs, state] = await this.#run('prefill', Object.fromEntries(Object.entries(inputs).map(piece)), before);
        } finally {
          before.release();
        }
      }
      this.#advance(state);
      return outputs;
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

  /** Checks what was given, and gives it to a job while nothing else is done. */
  #take(graph, limits, given, dims, job) {
    const { bundle } = this.model;
    const { inputs, outputs } = bundle.own(graph);
    return plainly(given, dims, outputs, async (tensors) => {
      const known = { [bundle.batch]: [this.batch, 'the stream'] };
      const taken = takeInputs(tensors, inputs, limits, known);
      this.#checkIdle();
      this.#busy = true;
      try {
        return await job(taken);
      } finally {
        this.#busy = false;
      }
    });
  }

  async #run(graph, inputs, before) {
    const { bundle } = this.model;
    const results = await this.model.runGraph(graph, { ...this.model.tensors(inputs), ...before.tensors });
    const after = {};
    for (const { name } of bundle.manifest.states) after[`past.${name}`] = results[`present.${name}`];
    const state = new State(after);
    try {
      return [checkOutputs(results, bundle.own(graph).outputs, ', and the stream stays where it was'), state];
    } catch (error) {
      state.release();
      throw error;
    }
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
