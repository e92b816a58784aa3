// Runs a stream at 60 frames a second, plots it, and rolls it back when asked.

import { ARRAYS, numbersOf, volume } from '../javascript/tensors.mjs';
import { BUDGET, Plot } from './plot.mjs';
import { TITLES, element, milliseconds, showFacts } from './view.mjs';

const REWIND = 30; // frames
const KEPT = 600; // latencies that the numbers are of
const $ = (selector) => document.querySelector(selector);

export class StreamView {
  #stream = null;
  #models = [];
  #playing = null; // a promise, while it runs
  #stopping = false;
  #asked = null; // what a button asked for, to be done between two frames
  #index = 0;
  #outputs = new Map(); // of the last frames, to compare with when they are replayed
  #latencies = [];
  #late = 0;
  #replayed = 0;
  #equal = 0;

  constructor(showError) {
    this.showError = showError;
    this.plot = new Plot($('#plot'));
    $('#play').addEventListener('click', () => (this.#playing ? this.stop() : this.play()));
    $('#rewind').addEventListener('click', () => this.#ask(() => this.#rewind()));
    $('#reset').addEventListener('click', () => this.#ask(() => this.#reset()));
  }

  /** Offers to stream models, one for each provider. */
  show(models) {
    this.#models = models;
    $('#providers').replaceChildren(...models.map((model, i) => {
      const input = element('input', { type: 'radio', name: 'provider', value: model.provider });
      input.checked = i === 0;
      input.addEventListener('change', async () => {
        const playing = Boolean(this.#playing);
        await this.#release();
        if (playing && !this.#playing) this.play(); // another change may have come first
      });
      return element('label', {}, input, TITLES[model.provider]);
    }));
    this.#clear();
    this.plot.draw();
  }

  play() {
    this.#stopping = false;
    $('#play').textContent = 'Pause';
    this.#playing = this.#loop().catch(this.showError).finally(() => {
      this.#playing = null;
      $('#play').textContent = 'Start';
    });
  }

  async stop() {
    this.#stopping = true;
    await this.#playing;
  }

  async close() {
    await this.#release();
    this.#models = [];
  }

  async #release() {
    await this.stop();
    this.#stream?.release();
    this.#stream = null;
    this.#clear();
  }

  async #loop() {
    if (!this.#stream) {
      const provider = $('#providers input:checked').value;
      this.#stream = await this.#models.find((model) => model.provider === provider).stream({ history: 2 * REWIND });
    }
    for (const selector of ['#rewind', '#reset']) $(selector).disabled = false;
    let due = 0;
    while (!this.#stopping) {
      const now = await new Promise(requestAnimationFrame);
      if (now < due - 4) continue; // the display is faster than 60 Hz
      due = Math.max(due + BUDGET, now);
      this.#asked?.();
      this.#asked = null;
      const frame = this.#stream.model.bundle.own('stream').inputs.map((spec) => signal(this.#index, spec));
      const start = performance.now();
      const outputs = await this.#stream.step(frame);
      this.#record(Object.values(outputs).map(({ data }) => numbersOf(data)), performance.now() - start);
    }
  }

  #record(outputs, latency) {
    const before = this.#outputs.get(this.#index);
    if (before) {
      this.#replayed++;
      const same = (output, i) => output.every((number, j) => Object.is(number, before[i][j]));
      if (outputs.every(same)) this.#equal++;
    }
    this.#outputs.set(this.#index, outputs);
    this.#outputs.delete(this.#index - 2 * REWIND);
    this.#latencies.push(latency);
    if (this.#latencies.length > KEPT) this.#latencies.shift();
    if (latency > BUDGET) this.#late++;
    this.plot.add(this.#index, Array.from(outputs[0], Number), latency);
    this.plot.draw();
    this.#index++;
    if (this.#index % 15 === 1) this.#showNumbers();
  }

  #clear() {
    this.#index = 0;
    this.#outputs = new Map();
    this.#latencies = [];
    this.#late = this.#replayed = this.#equal = 0;
    this.plot.clear();
    for (const selector of ['#rewind', '#reset']) $(selector).disabled = !this.#stream;
    this.#showNumbers();
  }

  #ask(job) {
    if (this.#playing) this.#asked = job;
    else job();
  }

  #rewind() {
    const frames = Math.min(REWIND, this.#stream.rewindable);
    this.#stream.rewind(frames);
    this.#index -= frames;
    this.plot.rewind(this.#index);
    this.plot.draw();
    this.#showNumbers();
  }

  #reset() {
    this.#stream.reset();
    this.#clear();
  }

  #showNumbers() {
    const sorted = this.#latencies.toSorted((a, b) => a - b);
    const quantile = (part) => milliseconds(sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * part))]);
    showFacts($('#numbers'), [
      ['frame', this.#index.toLocaleString('en')],
      ['p50 ms', quantile(0.5)],
      ['p99 ms', quantile(0.99)],
      ['max ms', quantile(1)],
      ['over the budget', this.#late],
      ['replayed, same bits', this.#replayed ? `${this.#equal} of ${this.#replayed}` : '–'],
    ]);
    const place = this.#stream?.location === 'gpu-buffer' ? 'GPU' : 'CPU';
    $('#state').textContent = this.#index ? `states on the ${place}` : '60 frames a second of slow waves';
  }
}

/** What an input holds at a frame of one stream: slow waves, of another pace in each number. */
function signal(index, { dtype, shape: [, ...shape], values: { kind, below } }) {
  const wave = (i) => Math.sin((index / 60) * (0.6 + (i % 7) * 0.35) + i * 1.7);
  const number = {
    normal: dtype === 'float16' ? (i) => 0x3800 | (wave(i) < 0 ? 0x8000 : 0) : wave, // the bits of 0.5, or negative
    ids: (i) => Math.floor(((wave(i) + 1) / 2) * (below - 1)),
    integers: (i) => Math.floor(((wave(i) + 1) / 2) * (below - 1)),
    mask: () => 1,
  }[kind];
  const whole = dtype === 'int64' ? BigInt : Number;
  return ARRAYS[dtype][0].from({ length: volume(shape) }, (_, i) => whole(number(i)));
}
