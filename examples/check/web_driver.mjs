// node web_driver.mjs PACKAGES JOB: opens the page in Chromium, uses it as a person would, and prints what happened.
//
// JOB is JSON: { url, chromium, profile, webgpu, scheme, width, choose, drop, stream, screenshot, seconds }. Printed is
// { result, numbers, state, errors }: window.edificeResult, what the stream shows, and the errors of the console.

import { createRequire } from 'node:module';
import path from 'node:path';

const [packages, text] = process.argv.slice(2);
const job = JSON.parse(text);
const { chromium } = createRequire(path.join(packages, 'package.json'))('playwright-core');

const context = await chromium.launchPersistentContext(job.profile, {
  executablePath: job.chromium,
  headless: true,
  colorScheme: job.scheme ?? 'light',
  viewport: { width: job.width ?? 1280, height: 900 },
  ignoreDefaultArgs: ['--disable-gpu'],
  args: [
    '--no-sandbox',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    ...(job.webgpu ? ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader'] : []),
  ],
});
const [page] = context.pages();
const errors = [];
page.on('console', (message) => message.type() === 'error' && errors.push(message.text()));
page.on('pageerror', (error) => errors.push(String(error)));

const finished = () =>
  page.waitForFunction(() => window.edificeResult, null, { timeout: 1000 * job.seconds, polling: 100 });

/** Drops a folder of the disk on the page, as the mouse would: a synthetic event has no folders. */
async function drop(folder) {
  const session = await context.newCDPSession(page);
  const data = { items: [], files: [folder], dragOperationsMask: 1 };
  for (const type of ['dragEnter', 'dragOver', 'drop']) {
    await session.send('Input.dispatchDragEvent', { type, x: 200, y: 200, data });
  }
}

await page.goto(job.url);
await finished();
if (job.choose || job.drop) {
  errors.length = 0; // what the page was opened with is not what is looked at
  const opened = page.waitForFunction(() => !window.edificeResult, null, { timeout: 30000, polling: 10 });
  if (job.choose) await page.setInputFiles('#folder', job.choose);
  else await drop(job.drop);
  await opened;
  await finished();
}
const result = await page.evaluate(() => window.edificeResult);
const numbers = {};
let state = null;
if (job.stream) {
  await page.click('#play');
  await page.waitForTimeout(1000 * job.stream);
  await page.click('#rewind');
  await page.waitForTimeout(1500);
  const texts = (all) => all.map((pair) => [...pair.children].map((child) => child.innerText));
  const pairs = await page.$$eval('#numbers div', texts);
  Object.assign(numbers, Object.fromEntries(pairs));
  state = await page.innerText('#state');
}
if (job.screenshot) await page.screenshot({ path: job.screenshot, fullPage: true });
if (job.stream) await page.click('#play');
await context.close();
console.log(JSON.stringify({ result, numbers, state, errors }));
