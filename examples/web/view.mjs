// What the page shows, made from the manifest and from reports of the self-check. Texts are set as texts, never as
// HTML: a manifest may come from anybody.

import { printable } from '../javascript/edifice.mjs';
import { describe } from '../javascript/tensors.mjs';

export const TITLES = { wasm: 'WebAssembly', webgpu: 'WebGPU' };

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.map((child) => (typeof child === 'string' ? printable(child) : child)));
  return made;
}

/** Pairs of a name and a value into a <dl>. */
export function showFacts(list, pairs) {
  list.replaceChildren(
    ...pairs.map(([name, value]) => element('div', {}, element('dt', {}, name), element('dd', {}, String(value)))),
  );
}

export function showManifest(bundle) {
  const { manifest } = bundle;
  const { parity, program, sizes, files, states } = manifest;
  const bytes = Object.values(files).reduce((sum, { size }) => sum + size, 0);
  showFacts(document.querySelector('#facts'), [
    [program.kind, program.name],
    ...Object.entries(program.options).map(([name, value]) => [name.replaceAll('_', ' '), value]),
    ...(program.numerics ? [['numerics', program.numerics]] : []),
    ['made for', Object.entries(sizes).map((pair) => pair.join(' ')).join(', ') || '–'],
    ['precision', manifest.precision],
    ['target', manifest.target],
    ['opset', manifest.opset],
    ['parameters', Number(manifest.param_count).toLocaleString('en')],
    ['files', `${Object.keys(files).length}, ${bytesOf(bytes)}`],
    ['largest error when built', exponent(parity?.max_abs)],
    ['cases verified', parity?.cases ?? '–'],
  ]);
  const cards = Object.entries(manifest.graphs).map(([name, graph]) => {
    const { inputs, outputs } = bundle.own(name);
    const own = (tensors, way) => tensors.map((tensor) => [way, ...shown(tensor)]);
    const made = card(`${name} graph`, bytesOf(files[graph.model]?.size ?? 0));
    made.append(table('tensors', [], [...own(inputs, 'in'), ...own(outputs, 'out')]));
    const carried = graph.inputs.length - inputs.length;
    if (carried) made.append(element('p', { class: 'muted' }, `and ${carried} states, in and out`));
    return made;
  });
  document.querySelector('#graphs').replaceChildren(...cards);
  const rows = states.map((state) => [
    ...shown(state),
    typeof state.initial === 'string' ? `from ${state.initial}` : state.initial,
  ]);
  document.querySelector('#states').hidden = !states.length;
  document.querySelector('#states summary').textContent = `${states.length} states, carried from frame to frame`;
  document.querySelector('#states div').replaceChildren(table('tensors', ['state', 'is', 'at first'], rows));
}

/** A card for a provider's self-check; `outcome` has a report, or an error, or neither while it runs. */
export function reportCard(provider, { report, error, absent }) {
  let [mark, word] = ['', 'running'];
  if (absent) [mark, word] = ['', 'not here'];
  else if (error || report?.ok === false) [mark, word] = ['bad', 'failed'];
  else if (report) [mark, word] = ['good', 'passed'];
  const made = card(TITLES[provider], '', element('p', { class: `pill ${mark}` }, word));
  if (absent || error) made.append(element('p', { class: absent ? 'muted' : 'problem' }, absent ?? error));
  if (report) {
    made.append(reportTable(report));
    for (const problem of report.problems) made.append(element('p', { class: 'problem' }, problem));
    made.append(element('p', { class: 'muted' }, summary(report)), quote(report.refused));
  }
  return made;
}

export function exponent(value) {
  return Number.isFinite(value) ? value.toExponential(1).replace('e-', 'e−') : String(value ?? '–');
}

/** Without cross-origin isolation a page's clock has steps of 0.1 ms. */
export function milliseconds(value) {
  if (!Number.isFinite(value)) return '–';
  return value < 0.095 && !crossOriginIsolated ? '< 0.1' : value.toFixed(value < 10 ? 2 : 1);
}

function summary({ runtime, states, rollbacks, limit }) {
  const place = states && ` States are kept on the ${states === 'gpu-buffer' ? 'GPU' : 'CPU'}.`;
  const back = rollbacks && ` Rolled back ${rollbacks} times.`;
  return `ONNX Runtime ${runtime}; errors up to ${exponent(limit)} are allowed.${back || ''}${place || ''}`;
}

function quote(refused) {
  return element('p', { class: 'muted' }, 'A wrong input is refused: ', element('q', {}, refused ?? 'it was not'));
}

function reportTable({ graphs, limit }) {
  const rows = graphs.map(({ graph, tensors, error, p50_ms, p99_ms, max_ms }) => {
    const wrong = !(error <= limit);
    return [graph, tensors, wrong ? element('span', { class: 'problem' }, exponent(error)) : exponent(error),
      ...[p50_ms, p99_ms, max_ms].map(milliseconds)];
  });
  return table('numbers', ['graph', 'tensors', 'error', 'p50 ms', 'p99 ms', 'max ms'], rows);
}

function shown({ name, dtype, shape }) {
  return [name, describe(dtype, shape)];
}

function table(kind, titles, rows) {
  const line = (cells, name) => element('tr', {}, ...cells.map((cell) => element(name, {}, cell)));
  const made = element('table', { class: kind });
  if (titles.length) made.append(element('thead', {}, line(titles, 'th')));
  made.append(element('tbody', {}, ...rows.map((cells) => line(cells, 'td'))));
  return element('div', { class: 'scrolling' }, made); // wide tables scroll, not the page
}

function card(title, note, ...children) {
  const heading = element('div', { class: 'heading' }, element('h3', {}, title));
  if (note) heading.append(element('p', { class: 'muted' }, note));
  const made = element('article', {}, heading);
  for (const child of children) (child.matches('.pill') ? heading : made).append(child);
  return made;
}

function bytesOf(bytes) {
  return bytes < 2 ** 20 ? `${Math.ceil(bytes / 2 ** 10)} KB` : `${(bytes / 2 ** 20).toFixed(1)} MB`;
}
