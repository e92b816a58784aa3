// Opens a bundle, checks it on each provider of this browser, and streams it.
//
// The address may say: ?bundle=../bundle (a folder of the server), provider=wasm or webgpu (only that one), threads=1,
// frames=600 (how many are timed). When the self-check is over, window.edificeResult says how it went, for programs:
// { status, error, reports }, with the exit status that the command-line samples have and, unless it is 0, the error.

import { Bundle, CheckError, EdificeError, Model, RequestError, printable } from '../javascript/edifice.mjs';
import { selfCheck } from '../javascript/self_check.mjs';
import { StreamView } from './stream_view.mjs';
import { chosenFiles, droppedFiles, findBundle, fromFiles, fromServer } from './sources.mjs';
import { reportCard, showManifest } from './view.mjs';

const OPTIONS = ['bundle', 'provider', 'threads', 'frames'];
const PROVIDERS = ['wasm', 'webgpu'];
const $ = (selector) => document.querySelector(selector);

$('#error').hidden = true; // what it said was for pages on which this does not run
const streamView = new StreamView(showError);
let models = [];
let opening = 0; // a newer bundle ends the work on an older one

/** Opens a bundle and does all that the page does with it. */
async function open(name, read) {
  const turn = ++opening;
  const current = () => {
    if (turn !== opening) throw new Superseded();
  };
  delete window.edificeResult;
  for (const selector of ['#error', '#bundle', '#check', '#stream']) $(selector).hidden = true;
  $('#name').textContent = 'Opening';
  $('#source').textContent = printable(name);
  const reports = [];
  try {
    await streamView.close();
    for (const model of models.splice(0)) await model.release();
    const settings = parseAddress();
    const bundle = await Bundle.open(name, read);
    current();
    $('#name').textContent = printable(bundle.manifest.program.name);
    document.title = `${$('#name').textContent} – edifice bundle`;
    showManifest(bundle);
    for (const selector of ['#bundle', '#check']) $(selector).hidden = false;
    const errors = await checkAll(bundle, settings, reports, current);
    if (bundle.has('stream') && models.length) {
      $('#stream').hidden = false;
      streamView.show(models);
    }
    const problems = reports.flatMap((report) => report.problems);
    if (problems.length) errors.push(new CheckError(`bundle ${name}: ${problems.join('; ')}`));
    if (errors.length) throw errors[0];
    window.edificeResult = { status: 0, reports };
  } catch (error) {
    if (turn !== opening) return;
    if (!reports.length) $('#check').hidden = true; // nothing runs on
    showError(error);
    window.edificeResult = { status: error.status ?? 1, error: $('#error').textContent, reports };
  }
}

class Superseded extends Error {}

/** The self-check on each provider, one after the other: fills `reports` and gives the errors. */
async function checkAll(bundle, { providers, threads, frames }, reports, current) {
  const outcomes = new Map(PROVIDERS.filter((name) => providers.includes(name)).map((name) => [name, {}]));
  const show = () => $('#reports').replaceChildren(...[...outcomes].map((pair) => reportCard(...pair)));
  const errors = [];
  let rested = performance.now();
  const progress = async (what) => {
    current();
    $('#progress').textContent = what;
    if (performance.now() - rested < 50) return;
    await new Promise((resolve) => setTimeout(resolve)); // lets the page draw
    rested = performance.now();
  };
  show();
  for (const provider of outcomes.keys()) {
    const reason = provider === 'webgpu' ? await lackOfWebGPU() : null;
    if (reason && providers.length === 1) {
      throw new RequestError(`provider 'webgpu' can't be had: ${reason}; take wasm`);
    }
    if (reason) {
      outcomes.set(provider, { absent: `There is none: ${reason}.` });
    } else {
      const model = new Model(bundle, await loadRuntime(provider, threads), { provider });
      try {
        const report = await selfCheck(model, { language: 'web', frames, progress });
        current();
        outcomes.set(provider, { report });
        reports.push(report);
        models.push(model);
      } catch (error) {
        await model.release();
        if (!(error instanceof EdificeError)) throw error;
        outcomes.set(provider, { error: error.message }); // the other provider may do better
        errors.push(error);
      }
    }
    current();
    show();
  }
  $('#progress').textContent = '';
  return errors;
}

async function lackOfWebGPU() {
  if (!navigator.gpu) return 'this browser has no WebGPU, or the page is not from https or http://localhost';
  return (await navigator.gpu.requestAdapter()) ? null : 'this browser gives no WebGPU adapter';
}

/** The runtime: the one for WebGPU is larger, and slower where all runs as WebAssembly. */
async function loadRuntime(provider, threads) {
  let ort;
  try {
    ort = await (provider === 'webgpu' ? import('onnxruntime-web/webgpu') : import('onnxruntime-web/wasm'));
  } catch (error) {
    throw new RequestError(`onnxruntime-web can't be loaded (${error.message}); run npm ci in the page's folder`);
  }
  ort.env.wasm.numThreads = threads;
  return ort;
}

function parseAddress() {
  const parameters = new URLSearchParams(location.search);
  for (const name of parameters.keys()) {
    if (!OPTIONS.includes(name)) throw new RequestError(`unknown option '${name}'; there are ${OPTIONS.join(', ')}`);
  }
  const count = (name, usual) => {
    const text = parameters.get(name) ?? String(usual);
    if (/^[1-9]\d{0,8}$/.test(text)) return Number(text);
    throw new RequestError(`${name} takes a number from 1, got '${text}'`);
  };
  const provider = parameters.get('provider');
  if (provider !== null && !PROVIDERS.includes(provider)) {
    throw new RequestError(`provider '${provider}' can't be had: there are ${PROVIDERS.join(', ')}; take one of these`);
  }
  const threads = count('threads', 1);
  if (threads > 1 && !crossOriginIsolated) {
    throw new RequestError(
      `${threads} threads can't be had: the page is not cross-origin isolated; ` +
        'serve it with COOP same-origin and COEP require-corp, or take 1',
    );
  }
  return { providers: provider ? [provider] : PROVIDERS, threads, frames: count('frames', 600) };
}

function showError(error) {
  const known = error instanceof EdificeError;
  if (!known) console.error(error);
  $('#error').textContent = known ? error.message : printable(String(error));
  $('#error').hidden = false;
  $('#progress').textContent = '';
  if (!$('#name').textContent || $('#name').textContent === 'Opening') $('#name').textContent = 'No bundle';
}

async function openFiles(files) {
  const found = findBundle(files);
  await open(found.name, fromFiles(found.name, found.files));
}

$('#choose').addEventListener('click', () => $('#folder').click());
$('#folder').addEventListener('change', (event) => openFiles(chosenFiles(event.target)));
addEventListener('dragover', (event) => {
  event.preventDefault();
  document.body.classList.add('dropping');
});
addEventListener('dragleave', (event) => {
  if (!event.relatedTarget) document.body.classList.remove('dropping');
});
addEventListener('drop', async (event) => {
  event.preventDefault();
  document.body.classList.remove('dropping');
  await openFiles(await droppedFiles(event.dataTransfer));
});

const address = new URLSearchParams(location.search).get('bundle') ?? '../bundle';
open(address, fromServer(address));
