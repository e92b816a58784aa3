// Checks a bundle of edifice-export on this machine, and times it:
//
//     node main.mjs [BUNDLE=../bundle] [--provider NAME=cpu] [--threads N=1] [--frames N=10000] [--json]

import { parseArgs } from 'node:util';

import * as ort from 'onnxruntime-node';

import { Bundle, Model, RequestError, printable } from '../javascript/edifice.mjs';
import { selfCheck } from '../javascript/self_check.mjs';
import { openFolder } from './folder.mjs';

const USAGE = 'node main.mjs [BUNDLE] [--provider NAME] [--threads N] [--frames N] [--json]';

ort.env.logLevel = 'fatal'; // errors are thrown as well, and are printed below

try {
  const { folder, provider, threads, frames, json } = parseArguments();
  const bundle = await Bundle.open(folder, await openFolder(folder));
  checkProvider(provider);
  const model = new Model(bundle, ort, { provider, threads });
  const { problems, ...report } = await selfCheck(model, { language: 'node', frames });
  await model.release();
  console.log(json ? printable(JSON.stringify(report)) : table(report).map(printable).join('\n'));
  if (problems.length) fail(`bundle ${folder}: ${problems.join('; ')}`, 1);
} catch (error) {
  fail(error.message, error.status ?? 1);
}

function fail(message, status) {
  console.error(`error: ${printable(message.replace(/\s+/g, ' '))}`);
  process.exitCode = status;
}

function parseArguments() {
  let parsed;
  try {
    parsed = parseArgs({
      allowPositionals: true,
      options: {
        provider: { type: 'string', default: 'cpu' },
        threads: { type: 'string', default: '1' },
        frames: { type: 'string', default: '10000' },
        json: { type: 'boolean', default: false },
      },
    });
  } catch (error) {
    throw new RequestError(`${error.message.split('. ')[0]}; usage: ${USAGE}`);
  }
  const { values, positionals } = parsed;
  if (positionals.length > 1) throw new RequestError(`${positionals.length} bundles were given; usage: ${USAGE}`);
  const count = (name) => {
    if (/^[1-9]\d{0,8}$/.test(values[name])) return Number(values[name]);
    throw new RequestError(`--${name} takes a number from 1, got '${values[name]}'; usage: ${USAGE}`);
  };
  return { ...values, folder: positionals[0] ?? '../bundle', threads: count('threads'), frames: count('frames') };
}

function checkProvider(provider) {
  const names = ort.listSupportedBackends().map(({ name }) => name);
  if (names.includes(provider)) return;
  throw new RequestError(`provider '${provider}' can't be had: there are ${names.join(', ')}; take one of these`);
}

function table({ language, runtime, provider, program, rollbacks, refused, graphs, ok }) {
  const row = (cells) => cells.map((cell, i) => (i ? cell.padStart(9) : cell.padEnd(8))).join('  ');
  const ms = (time) => time.toFixed(3);
  return [
    `${program} in ${language}, ONNX Runtime ${runtime} on ${provider}`,
    row(['graph', 'tensors', 'error', 'p50 ms', 'p99 ms', 'max ms']),
    ...graphs.map(({ graph, tensors, error, p50_ms, p99_ms, max_ms }) =>
      row([graph, String(tensors), error.toExponential(1), ms(p50_ms), ms(p99_ms), ms(max_ms)]),
    ),
    ...(rollbacks ? [`rolled back ${rollbacks} times, bitwise the same`] : []),
    `refused: ${refused}`,
    ok ? 'ok' : 'failed',
  ];
}
