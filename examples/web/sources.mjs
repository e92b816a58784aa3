// Where a bundle's files come from: a server, or a folder that the user gave to the page. Each is a reader for
// Bundle.open: path -> bytes, or null where there is no such file.

import { RequestError } from '../javascript/edifice.mjs';

export function fromServer(url) {
  return async (path) => {
    const address = `${url.replace(/\/$/, '')}/${path.split('/').map(encodeURIComponent).join('/')}`;
    let response;
    try {
      response = await fetch(address, { cache: 'no-cache' });
      if (response.ok) return new Uint8Array(await response.arrayBuffer());
    } catch (error) {
      throw new RequestError(`bundle ${url}: '${path}' can't be fetched (${error.message}); check the address`);
    }
    if (response.status === 404) return null;
    throw new RequestError(`bundle ${url}: '${path}' can't be fetched (status ${response.status}); check the server`);
  };
}

/** @param {Map<string, File>} files by path */
export function fromFiles(name, files) {
  return async (path) => {
    const file = files.get(path);
    if (!file) return null;
    try {
      return new Uint8Array(await file.arrayBuffer());
    } catch (error) {
      throw new RequestError(`bundle ${name}: '${path}' can't be read (${error.message}); choose the folder again`);
    }
  };
}

/** The bundle among files that were chosen: a name, and its files by their paths in it. */
export function findBundle(files) {
  const manifests = [...files.keys()].filter((path) => path.split('/').pop() === 'manifest.json');
  manifests.sort((a, b) => a.split('/').length - b.split('/').length);
  const folder = manifests.length ? manifests[0].slice(0, -'manifest.json'.length) : '';
  const inside = [...files].filter(([path]) => path.startsWith(folder));
  const name = folder.split('/').at(-2) ?? [...files.keys()][0]?.split('/')[0] ?? 'folder';
  return { name, files: new Map(inside.map(([path, file]) => [path.slice(folder.length), file])) };
}

/** The files of <input type="file" webkitdirectory>. */
export function chosenFiles(input) {
  return new Map(Array.from(input.files, (file) => [file.webkitRelativePath || file.name, file]));
}

/** The files of a drop: its folders are walked. */
export async function droppedFiles(transfer) {
  const files = new Map();
  const walk = async (entry, path) => {
    if (entry.isFile) {
      files.set(path, await new Promise((resolve, reject) => entry.file(resolve, reject)));
      return;
    }
    const reader = entry.createReader();
    for (;;) { // a call gives some of the entries, and none when there are no more
      const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!entries.length) return;
      for (const inner of entries) await walk(inner, `${path}/${inner.name}`);
    }
  };
  const entries = Array.from(transfer.items, (item) => item.webkitGetAsEntry()).filter(Boolean);
  for (const entry of entries) await walk(entry, entry.name);
  return files;
}
