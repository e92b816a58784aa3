// Runs a stream at 60 frames a second, plots it, and rolls it back when asked.

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
      const frame = signal(this.#index, this.#stream.model.bundle.graph('stream').inputs[0].shape[1]);
      const start = performance.now();
      const output = await this.#stream.step(frame);
      this.#record(output, performance.now() - start);
    }
  }

  #record(output, latency) {
    const before = this.#outputs.get(this.#index);
    if (before) {
      this.#replayed++;
      if (output.every((number, i) => Object.is(number, before[i]))) this.#equal++;
    }
    this.#outputs.set(this.#index, output);
    this.#outputs.delete(this.#index - 2 * REWIND);
    this.#latencies.push(latency);
    if (this.#latencies.length > KEPT) this.#latencies.shift();
    if (latency > BUDGET) this.#late++;
    this.plot.add(this.#index, output, latency);
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

/** A frame of slow waves, of another pace in each number. */
function signal(index, width) {
  const time = index / 60;
  return Float32Array.from({ length: width }, (_, i) => Math.sin(time * (0.6 + (i % 7) * 0.35) + i * 1.7));
}
