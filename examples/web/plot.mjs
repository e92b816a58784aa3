// Draws a stream as it runs: some channels of its output, and how long each frame took.

export const BUDGET = 1000 / 60; // milliseconds of a frame at 60 Hz
const SPAN = 600; // frames that are shown
const CHANNELS = 6;
const LATENCY = [0.05, 100]; // milliseconds, on a logarithmic axis
const MARGIN = { left: 52, right: 44, top: 24, gap: 44, bottom: 26 };

export class Plot {
  #frames = []; // { index, output, latency }
  #scale = 0.1;

  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext('2d');
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.draw());
  }

  clear() {
    this.#frames = [];
    this.#scale = 0.1;
    this.draw();
  }

  add(index, output, latency) {
    const step = Math.max(1, Math.floor(output.length / CHANNELS));
    const channels = Array.from({ length: Math.min(CHANNELS, output.length) }, (_, i) => i * step);
    this.channels = channels;
    this.size = output.length;
    this.#frames.push({ index, output: channels.map((channel) => output[channel]), latency });
    if (this.#frames.length > SPAN) this.#frames.shift();
  }

  /** Goes back on the screen as the stream did. */
  rewind(index) {
    while (this.#frames.length && this.#frames.at(-1).index >= index) this.#frames.pop();
  }

  draw() {
    const { canvas, context } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    const ratio = devicePixelRatio;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const style = getComputedStyle(canvas);
    const color = (name) => style.getPropertyValue(name);
    this.color = color;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = `12px ${style.fontFamily}`;
    context.textBaseline = 'middle';
    const inner = height - MARGIN.top - MARGIN.gap - MARGIN.bottom;
    const left = MARGIN.left;
    const right = width - MARGIN.right;
    const upper = { left, right, top: MARGIN.top, bottom: MARGIN.top + inner * 0.6 };
    const lower = { left, right, top: upper.bottom + MARGIN.gap, bottom: height - MARGIN.bottom };
    const last = this.#frames.at(-1)?.index ?? 0;
    const start = Math.max(0, last - SPAN + 1);
    const x = (index) => left + ((index - start) / (SPAN - 1)) * (right - left);
    this.#drawOutput(upper, x);
    this.#drawLatency(lower, x);
    context.fillStyle = color('--muted');
    context.textAlign = 'center';
    for (let second = Math.ceil(start / 60); second * 60 < start + SPAN; second++) {
      const at = x(second * 60);
      if (second % 2 === 0 && at < right + 1) context.fillText(`${second} s`, at, height - MARGIN.bottom / 2);
    }
  }

  #drawOutput(area, x) {
    const { context, color } = this;
    const values = this.#frames.flatMap(({ output }) => output);
    const extent = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0.05) * 1.1;
    this.#scale = extent > this.#scale ? extent : this.#scale + (extent - this.#scale) * 0.02; // shrinks calmly
    const middle = (area.top + area.bottom) / 2;
    const y = (value) => middle - (value / this.#scale) * (area.bottom - area.top) / 2;
    this.#title(this.#frames.length ? `output, ${this.channels.length} of ${this.size} channels` : 'output', area);
    const tick = 10 ** Math.floor(Math.log10(this.#scale));
    const stride = this.#scale / tick > 5 ? 5 * tick : this.#scale / tick > 2 ? 2 * tick : tick;
    for (let value = -stride; value <= stride; value += stride) {
      this.#rule(area, y(value), value ? '--grid' : '--axis', String(Number(value.toPrecision(2))));
    }
    const labels = [];
    for (const [i, channel] of (this.#frames.length ? this.channels : []).entries()) {
      context.strokeStyle = color(`--series-${i + 1}`);
      context.lineWidth = 1.75;
      context.lineJoin = 'round';
      context.beginPath();
      for (const { index, output } of this.#frames) context.lineTo(x(index), y(output[i]));
      context.stroke();
      labels.push({ text: String(channel), at: y(this.#frames.at(-1).output[i]), color: context.strokeStyle });
    }
    this.#labels(labels, area);
  }

  #drawLatency(area, x) {
    const { context, color } = this;
    const [low, high] = LATENCY.map(Math.log);
    const y = (time) => {
      const part = (Math.log(Math.min(Math.max(time, LATENCY[0]), LATENCY[1])) - low) / (high - low);
      return area.bottom - part * (area.bottom - area.top);
    };
    this.#title('milliseconds a frame', area);
    for (const time of [0.1, 1, 10, 100]) this.#rule(area, y(time), '--grid', String(time));
    for (const { index, latency } of this.#frames) {
      context.fillStyle = color(latency > BUDGET ? '--bad' : '--dots');
      context.fillRect(x(index) - 1, y(latency) - 1, 2.5, 2.5);
    }
    context.strokeStyle = color('--bad');
    context.lineWidth = 1.5;
    context.setLineDash([6, 4]);
    context.beginPath();
    context.moveTo(area.left, y(BUDGET));
    context.lineTo(area.right, y(BUDGET));
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = color('--bad');
    context.textAlign = 'right';
    context.fillText('budget 16.67 ms', area.right, y(BUDGET) - 10);
  }

  #title(text, area) {
    this.context.fillStyle = this.color('--ink');
    this.context.textAlign = 'left';
    this.context.fillText(text, area.left, area.top - 14);
  }

  #rule(area, y, stroke, label) {
    const { context, color } = this;
    context.strokeStyle = color(stroke);
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(area.left, Math.round(y) + 0.5);
    context.lineTo(area.right, Math.round(y) + 0.5);
    context.stroke();
    context.fillStyle = color('--muted');
    context.textAlign = 'right';
    context.fillText(label, area.left - 8, y);
  }

  /** Channel numbers at the right end, moved apart where they would overlap. */
  #labels(labels, area) {
    labels.sort((a, b) => a.at - b.at);
    for (let i = 1; i < labels.length; i++) labels[i].at = Math.max(labels[i].at, labels[i - 1].at + 13);
    const over = (labels.at(-1)?.at ?? 0) - area.bottom;
    this.context.textAlign = 'left';
    for (const { text, at, color } of labels) {
      this.context.fillStyle = color;
      this.context.fillText(text, area.right + 8, at - Math.max(0, over));
    }
  }
}
